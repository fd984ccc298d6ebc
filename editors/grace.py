"""GRACE: a codebook of activations at one linear map; the weights stay as they are.

With q the map's input at the last token of the prompt, keys k_n, radii r_n and values v_n:

    n = argmin |k_n - q|;   the map's output there is v_n if |k_n - q| <= r_n

An edit adds its q as a key, unless a key of the same target is near enough to be widened, and
trains its value to give the target: min over v of mean_j -log p(x*_j | image, prompt, x*_<j ; v).

Sources: Hartvigsen et al. 2023 (arXiv 2211.11031), Thartvigsen/GRACE `grace/editors/grace.py`;
EasyEdit `models/grace/GRACE.py` for its settings on vision-language models. Different from both:

* Targets are compared by content. They compare the mean of the label row, padding of the prompt
  included, so that two answers can look the same and one answer can look like two.
* An edit whose key is the same as that of another target takes the key over. There the radii
  become -1e-5 and 0 and the first key wins the tie: neither edit acts any more.
* The key is read at each row's own last prompt token; EasyEdit reads it where the *last edit* had
  its own, mostly another token.
* A widened radius leaves room for rounding, so that another batch shape still finds the edit.

Cost of an edit: the rows once up to the site; tokens before the key once more, whose keys and
values are kept; then `num_steps` forwards and backwards of the few tokens from the key on, through
the layers from the site on. Legend: B rows · E edits · N keys · I, O width of a key, of a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from errata.functional import (
    Batch,
    Codebook,
    Delta,
    Editor,
    EditRecord,
    Model,
    Past,
    Query,
    prefix,
    rows,
)
from errata.functional.codebook import at_prompt, put, tokens
from errata.functional.errors import BadInput, BadSettings, ModelUnsupported
from errata.functional.header import Where
from errata.functional.losses import nll
from errata.functional.records import header_for
from errata.functional.stacks import per_edit
from errata.functional.taps import tap
from errata.kernels import codebook as kernel

from .descent import Rule, descend

__all__ = ["PRESETS", "Book", "GraceConfig", "Memory", "grace", "remember"]


class GraceConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grace"
):
    """Settings of GRACE; the default layer fits any decoder."""

    site: str = "mlp.down"  # a linear map of a layer
    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 2 / 3  # number, or share of the depth
    where: Where = "last"  # the tokens that a value replaces
    radius: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    start: Literal["cold", "warm"] = "cold"  # values from U[0, 1), or from the map's output
    lr: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 200
    stop_loss: Annotated[float, msgspec.Meta(ge=0)] = 1e-2  # an edit stops below it; 0: never
    end: bool = True  # teach the end of the answer too, so that free generation stops there


class Book(NamedTuple):
    """Keys with their values, radii and targets."""

    keys: Tensor  # [N I]
    values: Tensor  # [N O]
    radii: Tensor  # [N]
    targets: tuple[str, ...]  # of each key, as its record has it


class Memory(NamedTuple):
    """State: the book, the edits so far, and the key of each."""

    book: Book
    edits: tuple[EditRecord, ...] = ()
    owners: tuple[int, ...] = ()
    seed: int = 0  # of cold values


class Ready(NamedTuple):
    """Rows before the site's layer, from the first prompt's end on, and what the site is given."""

    batch: Batch
    past: Past | None  # of the tokens before
    inputs: Tensor  # [B I] at each row's last prompt token
    outputs: Tensor  # [B O] there


class Site(NamedTuple):
    """The linear map with the codebook."""

    path: str
    layer: int

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"


def remember(
    book: Book, key: Tensor, value: Tensor, target: str, radius: float, noise: float = 0.0
) -> tuple[Book, int]:
    """The book with one more edit, and the number of its key.

    With n the nearest key and d its distance, the first that holds:

        d > radius + r_n     a new key with `radius`
        same target          the same key, r_n = max(r_n, d + noise |key|)       (expand)
        d/2 <= 1e-5, or      key n, with the new value and target, since balls so small
          d/2 <= noise |key|   could not be told apart                           (take over)
        else                 a new key with radius d/2, and r_n = d/2 - 1e-5     (split)

    `noise`: by how much rounding may move a key, relative to its length. Raises BadInput for a key
    that is not finite.

    >>> book = Book(torch.zeros(0, 2), torch.zeros(0, 1), torch.zeros(0), ())
    >>> book, _ = remember(book, torch.tensor([0.0, 0.0]), torch.ones(1), "a", 1.0)
    >>> book, number = remember(book, torch.tensor([1.0, 0.0]), torch.ones(1), "b", 1.0)
    >>> number, book.radii
    (1, tensor([0.5000, 0.5000]))
    """
    if not bool(key.isfinite().all()):
        raise BadInput("the model's activations at the codebook's site must be finite.")
    count = len(book.targets)
    if not count:
        return _longer(book, key, value, target, radius), 0
    found = kernel.nearest(key[None], book.keys)
    near, distance = int(found.index), float(found.distance)
    slack = noise * float(key.norm())
    radii = book.radii.clone()
    if distance > radius + float(radii[near]):
        return _longer(book, key, value, target, radius), count
    if book.targets[near] == target:
        if distance > float(radii[near]):
            radii[near] = distance + slack
        return book._replace(radii=radii), near
    if distance / 2 <= max(MARGIN, slack):
        values = book.values.clone()
        values[near] = value
        targets = (*book.targets[:near], target, *book.targets[near + 1 :])
        return book._replace(values=values, targets=targets), near
    radii[near] = distance / 2 - MARGIN
    return _longer(book._replace(radii=radii), key, value, target, distance / 2), count


MARGIN = 1e-5  # between two balls that touch


def _longer(book: Book, key: Tensor, value: Tensor, target: str, radius: float) -> Book:
    return Book(
        torch.cat([book.keys, key[None]]),
        torch.cat([book.values, value[None]]),
        torch.cat([book.radii, book.radii.new_tensor([radius])]),
        (*book.targets, target),
    )


def grace(config: GraceConfig = GraceConfig()) -> Editor:
    """GRACE as an editor: the delta is a `codebook` at one linear map.

    State: the book. A sequence grows it, and `remove` takes edits out of the delta by id: their
    keys go, radii that they narrowed stay narrow. Raises UnknownSite when the site is not in the
    model, BadSettings where the value could not act on the answer.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = grace(GraceConfig(num_steps=2))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> delta.header.entries[0].num_keys
    1
    """

    def init(model: Model, generator: torch.Generator) -> Memory:
        place = site_of(model, config)
        weight = model.params[place.weight]
        out, inner = model.card.linears[place.path]
        options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
        book = Book(
            torch.zeros(0, inner, **options),
            torch.zeros(0, out, **options),
            torch.zeros(0, **options),
            (),
        )
        return Memory(book, seed=int(torch.randint(0, 2**62, (), generator=generator)))

    def header(model: Model, queries: Sequence[Query], num_keys: int, owners, earlier, stack: int):
        place = site_of(model, config)
        entry = Codebook(
            name=place.weight,
            checkpoint=model.card.checkpoint.get(place.weight, place.weight),
            shape=tuple(model.params[place.weight].shape),
            num_keys=num_keys,
            owners=owners,
            where=config.where,
            transposed=place.path in model.card.transposed,
        )
        return header_for(model, "grace", config, (entry,), queries, earlier=earlier, stack=stack)

    def edit(model: Model, state: Memory, queries: Sequence[Query]):
        place = site_of(model, config)
        ready = prepare(model, place, queries, config)
        book, owners = state.book, state.owners
        records = header(model, queries, 1, (), (), 0).edits
        for row, record in enumerate(records):
            known = book.targets
            book, key = _add(book, ready, row, record, state.seed, config)
            if key < len(known) and known[key] != record.target:  # taken over
                owners = tuple(-1 if owner == key else owner for owner in owners)
            owners = (*owners, key)
        mine = owners[len(state.owners) :]
        trained = sorted(set(mine) - {-1})
        slots = [trained.index(key) if key >= 0 else -1 for key in mine]
        values = book.values.clone()
        values[trained] = train(model, place, ready, slots, book.values[trained], config)
        state = Memory(book._replace(values=values), state.edits + records, owners, state.seed)
        described = header(
            model, queries, len(book.targets), owners, state.edits[: -len(records)], 0
        )
        return _delta(described, [state.book]), state

    def each(model: Model, state: Memory, queries: Sequence[Query]) -> Delta:
        place = site_of(model, config)
        ready = prepare(model, place, queries, config)
        records = header(model, queries, 1, (), (), 0).edits
        added = [
            _add(state.book, ready, row, record, state.seed, config)
            for row, record in enumerate(records)
        ]
        owners = tuple(key for _, key in added)
        start = torch.stack([book.values[key] for book, key in added])
        values = train(model, place, ready, range(len(queries)), start, config)
        longest = max(len(book.targets) for book, _ in added)
        books = []
        for (book, key), value in zip(added, values):
            own = book.values.clone()
            own[key] = value
            books.append(_padded(book._replace(values=own), longest))
        return _delta(header(model, queries, longest, owners, (), len(queries)), books)

    return Editor("grace", config, init, edit, each)


def site_of(model: Model, config: GraceConfig) -> Site:
    """The map that the settings mean; a share of the depth leaves two layers above the site.

    Later tokens of an answer see the value only through the attention of layers above, and one such
    layer is too few for answers of several tokens (reliability 87 there, 99 with two, on the micro
    models).
    """
    count, layer = model.card.num_layers, config.layer
    if isinstance(layer, float):
        layer = max(0, min(int(count * layer), count - 3))
    path = model.card.linear(f"layers.{layer}.{config.site}")
    number = model.card.layer_of(path)
    assert number is not None
    if config.where == "prompt" and number == count - 1:
        raise BadSettings(
            'where="prompt" replaces tokens before the one that predicts the answer, which see '
            f"nothing of each other behind layer {number - 1}: choose a lower layer or another "
            "`where`."
        )
    return Site(path, number)


def prepare(model: Model, site: Site, queries: Sequence[Query], config: GraceConfig) -> Ready:
    """Read the rows and run them up to the site's layer: what does not change is run once."""
    inputs = model.read(queries, end=True) if config.end else model.read(queries)
    batch = prefix.cut(model, inputs, prefix.reach(model.card, [site.weight]))
    assert isinstance(batch, Batch)
    past = None
    thinned = batch.hidden.shape[1] != inputs.ids.shape[1]
    with torch.no_grad():
        if config.where == "last" and not thinned:
            batch, past = _behind(model, batch)
        stop = site.layer + 1
        _, seen = tap(model.decode, model.params, batch, [site.path], stop=stop, past=past)
    given = seen[site.path]
    return Ready(
        batch, past, at_prompt(batch, given.input).float(), at_prompt(batch, given.output).float()
    )


def train(
    model: Model,
    site: Site,
    ready: Ready,
    slots: Sequence[int],
    start: Tensor,
    config: GraceConfig,
) -> Tensor:
    """The values [S O] that make each row say its target; row b has value slots[b], -1: none."""
    batch = ready.batch
    slot = torch.tensor(list(slots), device=start.device)  # [B]
    where = tokens(batch, config.where)

    def loss(tensors):
        chosen = tensors["values"][slot.clamp_min(0)]  # [B O]
        rewrites = {site.path: lambda x, y: put(y, chosen, where)}
        logits = model.decode(model.params, batch, rewrites, past=ready.past)
        each = per_edit(nll(logits, batch.labels), slot, start.shape[0])
        return each.sum(), each.detach()

    rule = Rule(
        optimizer="adam", lr=config.lr, num_steps=config.num_steps, stop_loss=config.stop_loss
    )
    return descend(torch.func.grad(loss, has_aux=True), {"values": start}, rule, None)["values"]


def _behind(model: Model, batch: Batch) -> tuple[Batch, Past | None]:
    """The tokens from the earliest prompt's end on, and the keys and values of those before."""
    first = int(batch.prompt.int().argmax(1).min())
    if first == 0:
        return batch, None
    before = rows.earlier(batch, first)
    try:
        _, past = model.decode(model.params, before, at=before.at[:, :1], keep=True)
    except ModelUnsupported:  # a family whose layers take no cache of ours: whole rows in each step
        return batch, None
    return rows.later(batch, first), past


def _add(
    book: Book, ready: Ready, row: int, record: EditRecord, seed: int, config: GraceConfig
) -> tuple[Book, int]:
    value = ready.outputs[row]
    if config.start == "cold":
        # Drawn by the edit's own name: the same in any order and in any company.
        name = hashlib.sha256(f"{seed} {record.id}".encode()).digest()[:8]
        own = torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)
        value = torch.rand(value.shape, generator=own).to(value.device)
    noise = 4 * torch.finfo(ready.batch.hidden.dtype).eps
    return remember(book, ready.inputs[row], value, record.target, config.radius, noise)


def _padded(book: Book, length: int) -> Book:
    """The book with copies of its first key, of negative radius: they lose every tie."""
    for _ in range(length - len(book.targets)):
        book = _longer(book, book.keys[0], book.values[0], book.targets[0], -1.0)
    return book


def _delta(header, books: Sequence[Book]) -> Delta:
    parts = ("keys", "values", "radii")
    name = header.entries[0].name
    stacked = {part: torch.stack([getattr(book, part) for book in books]) for part in parts}
    tensors = {f"{name}.{p}": x if header.stack else x[0] for p, x in stacked.items()}
    return Delta(header, tensors)


PRESETS: dict[str, GraceConfig] = {
    # the micro zoo's four layers: three above the value say a two-token answer that two can not
    "micro": GraceConfig(layer=0, lr=10.0, num_steps=100),
    # EasyEdit's yaml: `layers[18].mlp.down_proj` for LLaVA-OneVision and Qwen2-VL, 23 for Qwen3-VL.
    "easyedit": GraceConfig(layer=18, lr=1.0, num_steps=20, stop_loss=0.0, end=False),
    "easyedit-qwen3-vl": GraceConfig(layer=23, lr=1.0, num_steps=20, stop_loss=0.0, end=False),
    "grace-original": GraceConfig(where="prompt", lr=1.0, num_steps=100, stop_loss=0.0, end=False),
}
