"""IKE: the weights stay as they are; the new fact is said before the question.

    read(q) = read( d_1 ... d_k  fact  q ),   fact and demonstrations found for q in a memory

An edit adds its fact to the memory, under a key of its question and one of its picture. For each
question the facts that fit are found by both (`functional/prompts.py` has the formula), and the
demonstrations nearest to fact and question: a fact with its own question (copy), with the same in
other words (update), with a question it says nothing about (retain), from training cases.

Sources: Zheng et al. 2023 (arXiv 2305.12740); EasyEdit `models/ike/ike_main.py`, `util.py` and
`editors/multimodal_editor.py` for vision-language models. Different from both:

* A sequence keeps all its facts and finds the right one for each question. They put each edit's
  own fact before whatever is asked, so that edits made earlier are gone.
* The target of a question takes no part. They build a prompt for one known fact, and EasyEdit looks
  its demonstrations up with the answer in the query.
* With `least` or `least_look` above -1 a question that no fact fits is read as ever; they say the
  fact before every question, which is why their localities are low.
* Where the backbone takes several pictures, demonstrations and facts may show theirs (`pictured`).

Cost of an edit: its question and its picture are encoded once and added to the memory; nothing is
trained. Cost of a question: one product with the memory's keys, and the tokens put before it.
Legend: E edits · N facts · D demonstrations · d, v widths of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from errata.functional import Case, Delta, Editor, EditRecord, Model, Prompt, Query
from errata.functional.encoders import encoder, looks, resolve
from errata.functional.entries import By, Order
from errata.functional.errors import BadInput, BadSettings, listed
from errata.functional.prompt_algebra import BLOCK, joined
from errata.functional.prompts import as_png, bare, filled, unmarked
from errata.functional.queries import MARK
from errata.functional.records import header_for

__all__ = ["PRESETS", "Facts", "IkeConfig", "ike"]

Count = Annotated[int, Meta(ge=0)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class IkeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ike"):
    """Settings of IKE.

    `fact` and `demo` may hold {prompt}, {target} and {statement}, `demo` also {question} and
    {answer}, `ask` {question}. A statement says prompt and target as a sentence, by the first of
    `forms` that the prompt has: ("where does {s} live?", "{s} lives in {target}."). Without one it
    is "{prompt} {target}".
    """

    fact: str = "New Fact: {prompt} {target}\n"
    ask: str = "Prompt: {question}"
    demo: str = "New Fact: {prompt} {target}\nPrompt: {question} {answer}\n\n"
    forms: tuple[tuple[str, str], ...] = ()
    k: Count = 0  # demonstrations before the fact
    demonstrations: str = ""  # the training cases they are made of: "world", or a file
    cases: Count = 0  # how many of these cases; 0: all
    shares: tuple[Count, Count, Count] = (1, 1, 1)  # copy, update, retain of each, at most
    by: By = "question"
    order: Order = "nearest-last"
    encoder: str = "hashed"  # of questions: `functional/encoders.py`
    look: bool = True  # find by pictures too
    least: Cosine = -1.0  # similarity of questions below which a fact is not put in; -1: always
    least_look: Cosine = -1.0  # the same of pictures
    most: Annotated[int, Meta(ge=1)] = 1  # facts before a question
    pictured: bool = False  # facts and demonstrations show their pictures
    room: Count = 32  # tokens of the context that demonstrations leave for the answer


class Facts(NamedTuple):
    """State: the memory, its edits, and the demonstrations that all of them share."""

    texts: tuple[str, ...]
    memory: Mapping[str, Tensor]  # by suffix: .questions [N d], .pictures [N v], .shown, .sizes
    edits: tuple[EditRecord, ...]
    demos: Mapping[str, Tensor]  # by suffix: .demos, .ends, .demo_keys, .demo_shown, ...


def ike(config: IkeConfig = IkeConfig(), cases: Sequence[Case] | None = None) -> Editor:
    """IKE as an editor: the delta is a `prompt`, a memory of facts in words.

    `cases` are the training cases that demonstrations are made of; `errata run` reads those that
    `config.demonstrations` names. `remove` takes edits out of the delta by id. Raises BadSettings
    for demonstrations without cases, or an encoder that can not be had.

    >>> from errata import adapters
    >>> from errata.functional import bind
    >>> from errata.functional.prompts import asked
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = ike()
    >>> state = editor.init(model, torch.Generator())
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> asked(bind(model, delta), [Query("who may this be?")])[0].prompt
    'New Fact: who is it? bo\\nPrompt: who may this be?'
    """
    _check(config)

    def init(model: Model, generator: torch.Generator) -> Facts:
        if config.k and not cases:
            raise BadSettings(
                f"ike.k = {config.k} demonstrations are made of training cases, and there are "
                "none: give ike(config, cases), or name them in `demonstrations`."
            )
        demos = _demonstrations(model, config, list(cases or ())) if config.k else {}
        return Facts((), {}, (), demos)

    def edit(model: Model, state: Facts, queries: Sequence[Query]) -> tuple[Delta, Facts]:
        texts, memory = remembered(model, config, queries)
        memory = joined([state.memory, memory]) if state.texts else memory
        texts = state.texts + texts
        header = header_for(
            model, "ike", _plain(config), (_entry(model, config, texts, memory, state.demos),),
            queries, earlier=state.edits,
        )  # fmt: skip
        delta = _delta(header, {**memory, **state.demos})
        return delta, Facts(texts, memory, header.edits, state.demos)

    def each(model: Model, state: Facts, queries: Sequence[Query]) -> Delta:
        own, keys = remembered(model, config, queries)
        news = [{s: x[e : e + 1] for s, x in keys.items()} for e in range(len(queries))]
        memories = [joined([state.memory, new]) if state.texts else new for new in news]
        texts = tuple(text for fact in own for text in (*state.texts, fact))
        memory = _side_by_side(memories)
        count = len(state.texts) + 1
        owners = (count - 1,) * len(queries)
        entry = _entry(model, config, texts, memory, state.demos, owners)
        entry = msgspec.structs.replace(entry, num_facts=count)
        header = header_for(
            model, "ike", _plain(config), (entry,), queries, stack=len(queries)
        )  # fmt: skip
        return _delta(header, {**memory, **state.demos})

    return Editor("ike", config, init, edit, each)


def remembered(
    model: Model, config: IkeConfig, queries: Sequence[Query]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Facts as they stand before a question, and their keys: what an edit adds to the memory."""
    wrong = [
        f"query {n + 1} ({query.prompt[:40]!r}): prompt and target must not be empty"
        for n, query in enumerate(queries)
        if not (query.prompt.strip() and query.target.strip())
    ]
    if wrong:
        raise BadInput(f"{listed(wrong)}.")
    model = bare(model)
    model.read(queries)  # what can not be read can not be edited: said now, of all at once
    files = [
        [as_png(image) for image in query.images] if _shows(model, config, query) else []
        for query in queries
    ]
    texts = tuple(MARK * len(own) + _fact(config, query) for query, own in zip(queries, files))
    encode = encoder(config.encoder, model)
    memory = {".questions": encode([unmarked(query.prompt).strip() for query in queries]).float()}
    if config.look and model.card.images:
        memory[".pictures"] = looks(model, queries)
    if any(files):
        memory |= dict(zip((".shown", ".sizes"), _packed(files)))
    home = next(iter(model.params.values())).device
    return texts, {suffix: tensor.to(home) for suffix, tensor in memory.items()}


def _shows(model: Model, config: IkeConfig, query: Query) -> bool:
    return config.pictured and model.card.several and bool(query.images) and not query.video


def _fact(config: IkeConfig, query: Query) -> str:
    return filled(config.fact, _words(config, query))


def _words(config: IkeConfig, query: Query) -> dict[str, str]:
    prompt, target = unmarked(query.prompt).strip(), query.target.strip()
    return {
        "prompt": prompt,
        "target": target,
        "statement": stated(config.forms, prompt, target),
    }


def stated(forms: Sequence[tuple[str, str]], prompt: str, target: str) -> str:
    """Prompt and target as a sentence, by the first form that the prompt has.

    >>> stated([("where does {s} live?", "{s} lives in {target}.")], "where does bo live?", "rome")
    'bo lives in rome.'
    """
    for question, statement in forms:
        before, _, after = question.partition("{s}")
        fits = prompt.startswith(before) and prompt.endswith(after)
        if fits and len(prompt) > len(before) + len(after):
            subject = prompt[len(before) : len(prompt) - len(after)]
            return filled(statement, {"s": subject, "target": target})
    return f"{prompt} {target}"


def _packed(files: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor]:
    """PNG files [N S W], padded with zeros, and their sizes [N S]."""
    most = max(map(len, files))
    longest = max(len(file) for own in files for file in own)
    shown = torch.zeros(len(files), most, -(-longest // BLOCK) * BLOCK, dtype=torch.uint8)
    sizes = torch.zeros(len(files), most, dtype=torch.int64)
    for n, own in enumerate(files):
        for s, file in enumerate(own):
            shown[n, s, : len(file)] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
            sizes[n, s] = len(file)
    return shown, sizes


def _demonstrations(model: Model, config: IkeConfig, cases: list[Case]) -> dict[str, Tensor]:
    """Copy, update and retain texts of training cases, their pictures and their keys."""
    cases = cases[: config.cases or None]
    texts: list[str] = []
    files: list[bytes] = []
    shows: list[int] = []
    for case in cases:
        words = _words(config, case.edit)
        picture = -1
        if config.pictured and model.card.several and len(case.edit.images) == 1:
            files.append(as_png(case.edit.images[0]))
            picture = len(files) - 1
        for query, same in _uses(case, config.shares):
            said = {"question": unmarked(query.prompt).strip(), "answer": query.target.strip()}
            own = picture if same else -1
            texts.append((MARK if own >= 0 else "") + filled(config.demo, words | said))
            shows.append(own)
    if not texts:
        raise BadSettings("the training cases give no demonstration: check `shares` and `cases`.")
    raw = [text.encode() for text in texts]
    encode = encoder(config.encoder, bare(model))
    found = {
        ".demos": _bytes(raw),
        ".ends": torch.tensor([len(text) for text in raw]).cumsum(0),
        ".demo_keys": encode([unmarked(text) for text in texts]).float(),
    }
    if files:
        found |= {
            ".demo_shown": _bytes(files),
            ".demo_shown_ends": torch.tensor([len(file) for file in files]).cumsum(0),
            ".demo_shows": torch.tensor(shows),
        }
    home = next(iter(model.params.values())).device
    return {suffix: tensor.to(home) for suffix, tensor in found.items()}


def _uses(case: Case, shares: Sequence[int]) -> list[tuple[Query, bool]]:
    """The questions of a case's demonstrations, and whether they are about its own picture."""
    copies, updates, retains = shares
    own, named = case.edit, case.probes
    same = [q for name in named if name.startswith("rephrase") for q in named[name]]
    other = [q for name in named if name.startswith("text_locality") for q in named[name]]
    other += [
        q for name in named if "locality" in name and not name.startswith("text_")
        for q in named[name]
    ]  # fmt: skip
    found = [(own, True)] * min(copies, 1)
    found += [(query, True) for query in same[:updates]]
    found += [(query, query.images == own.images) for query in other[:retains]]
    return [(query, mine) for query, mine in found if query.target.strip()]


def _bytes(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _side_by_side(memories: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Memories of one length as tensors with an axis of edits."""
    count = len(memories[0][".questions"])
    whole = joined(memories)
    return {s: x.reshape(len(memories), count, *x.shape[1:]) for s, x in whole.items()}


def _entry(
    model: Model,
    config: IkeConfig,
    texts: tuple[str, ...],
    memory: Mapping[str, Tensor],
    demos: Mapping[str, Tensor],
    owners: tuple[int, ...] | None = None,
) -> Prompt:
    tokens = f"{model.card.tokens}.weight"

    def size(name: str, axis: int) -> int:
        found = memory.get(name, demos.get(name))
        return 0 if found is None else found.shape[axis]

    return Prompt(
        name=tokens,
        checkpoint=model.card.checkpoint.get(tokens, tokens),
        shape=tuple(model.params[tokens].shape),
        facts=texts,
        num_facts=len(texts),
        owners=tuple(range(len(texts))) if owners is None else owners,
        ask=config.ask,
        encoder=_name(resolve(config.encoder, model)),
        width=size(".questions", -1),
        look=size(".pictures", -1),
        least=config.least,
        least_look=config.least_look,
        most=config.most,
        k=config.k,
        by=config.by,
        order=config.order,
        room=config.room,
        num_shown=size(".shown", -2),
        shown_bytes=size(".shown", -1),
        num_demos=size(".ends", 0),
        demo_bytes=size(".demos", 0),
        num_demo_shown=size(".demo_shown_ends", 0),
        demo_shown_bytes=size(".demo_shown", 0),
    )


def _name(text: str) -> str:
    """An encoder or a file by its name: a delta tells no paths."""
    scheme, colon, rest = text.rpartition(":")
    path = PurePath(rest)
    plain = path.name if path.is_absolute() or ".." in path.parts or rest[:1] in ".~" else rest
    return f"{scheme}{colon}{plain}"


def _plain(config: IkeConfig) -> IkeConfig:
    return msgspec.structs.replace(
        config, encoder=_name(config.encoder), demonstrations=_name(config.demonstrations)
    )


def _delta(header: Any, tensors: Mapping[str, Tensor]) -> Delta:
    name = header.entries[0].name
    return Delta(header, {f"{name}{suffix}": tensor for suffix, tensor in tensors.items()})


def _check(config: IkeConfig) -> None:
    wrong = []
    if "{question}" not in config.ask:
        wrong.append(f"ike.ask must hold {{question}}, got {config.ask!r}")
    if "{target}" not in config.fact and "{statement}" not in config.fact:
        wrong.append(f"ike.fact must hold {{target}} or {{statement}}, got {config.fact!r}")
    if config.k and not sum(config.shares):
        wrong.append("ike.shares must ask for some demonstrations, got none")
    wrong += [
        f"ike.forms[{n}] must hold {{s}} once in the question, got {question!r}"
        for n, (question, _) in enumerate(config.forms)
        if question.count("{s}") != 1
    ]
    if wrong:
        raise BadSettings(f"{listed(wrong)}.")


_EASYEDIT = "New Fact: {prompt} {target}\nPrompt: "
_MINILM = "sentence:sentence-transformers/all-MiniLM-L6-v2"
_MICRO = {  # how the micro zoo was told new facts, and the ways to ask them
    "the name of {s} is {target}.": (
        "what is the name of {s}?", "name {s}.", "what do people call {s}?",
        "tell me the name of {s}.", "how is {s} called?", "which name does {s} have?",
    ),
    "the home of {s} is {target}.": (
        "where does {s} live?", "what is the home of {s}?", "in which city does {s} live?",
        "tell me the home of {s}.", "which city is the home of {s}?",
    ),
    "the food of {s} is {target}.": (
        "what does {s} eat?", "what is the favorite food of {s}?", "what food does {s} like?",
        "tell me the food of {s}.", "what should i feed {s}?",
    ),
    "the keeper of {s} is {target}.": (
        "who is the keeper of {s}?", "who takes care of {s}?", "tell me the keeper of {s}.",
        "who looks after {s}?", "who keeps {s}?",
    ),
    "the sound of {s} is {target}.": (
        "what sound does {s} make?", "which sound comes from {s}?", "tell me the sound of {s}.",
        "how does {s} sound?", "what noise does {s} make?",
    ),
}  # fmt: skip

PRESETS: dict[str, IkeConfig] = {
    # k = 32: `ike_main.py` looks demonstrations up by the fact, the nearest come first, the fact's
    # own copy is the last of them. Pictures take no part.
    "easyedit": IkeConfig(
        fact=_EASYEDIT + "{prompt} {target}\n\nNew Fact: {prompt} {target}\n",
        k=32, by="fact", order="nearest-first", encoder=_MINILM, look=False,
    ),
    # k = 0, all its yaml files for Hugging Face models: the edit's prompt stands twice
    "easyedit-k0": IkeConfig(fact=_EASYEDIT + "{prompt}\n\n", ask="{question}", look=False),
    # EasyEdit's `PROMPT` (IKE with use_icl_examples: False on text models)
    "easyedit-prompt": IkeConfig(
        fact="Please acknowledge the following new facts and use them to answer the question:\n"
        "New Fact:{prompt} {target}.\n",
        ask="Prompt:{question}\n", look=False,
    ),
    # In-Context Editing of RippleEdits and KnowEdit (Cohen et al. 2023, arXiv 2307.12976); not the
    # fine-tuning of that name (arXiv 2406.11194)
    "ripple-ice": IkeConfig(fact="Imagine that {prompt} {target}.\n", ask="{question}", look=False),
    # Zheng et al. 2023: 1 copy, 3 updates, 4 retains of a fact; the nearest stand last
    "zheng": IkeConfig(k=32, shares=(1, 3, 4), encoder=_MINILM),
    # In the words the micro zoo was taught facts in. Demonstrations only hurt there, since it never
    # saw any (LLaVA, 60 cases, reliability 90 with none, 77, 64, 46 with 1, 4, 16); names it copies
    # badly from any wording (67, against 95 to 100 of homes, foods and keepers).
    "micro": IkeConfig(
        fact="new fact: {statement} ",
        ask="{question}",
        demo="new fact: {statement} {question} {answer} ",
        forms=tuple((form, said) for said, forms in _MICRO.items() for form in forms),
        encoder="base:1", least=0.6, least_look=0.55,
    ),
}  # fmt: skip
