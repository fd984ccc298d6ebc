"""A hand-made vision-language decoder of three layers: the contract of `Model` without a library.

It has what makes real families awkward: a head tied to the token embedding, one linear that stores
[in out], a feed-forward part that flattens rows and tokens, a bias, norms, pixels and a projector.
Legend: B rows · L tokens · D width · H heads.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Batch, Inputs, KVCache, Model, ModelCard, Query
from errata.functional.forward.batches import gather_tokens, prompt_end_mask

LAYERS, WIDTH, INNER, HEADS, VOCAB, CONTEXT, PIXELS = 3, 16, 24, 2, 40, 32, 5
END = 1


def _card() -> ModelCard:
    linears = {"projector": (WIDTH, PIXELS)}
    for layer in range(LAYERS):
        for part in ("attn.q", "attn.k", "attn.v", "attn.o"):
            linears[f"layers.{layer}.{part}"] = (WIDTH, WIDTH)
        linears[f"layers.{layer}.up"] = (INNER, WIDTH)
        linears[f"layers.{layer}.down"] = (WIDTH, INNER)
    linears["head"] = (VOCAB, WIDTH)
    return ModelCard(
        family="toy",
        id="tests/toy",
        config_hash="c" * 64,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        max_positions=CONTEXT,
        layers="layers",
        head="head",
        norm="norm",
        token_embedding="tokens",
        projector="projector",
        part_names={"attn": "attn", "attn.q": "attn.q", "mlp.up": "up", "mlp.down": "down"},
        linear_shapes=linears,
        transposed=frozenset(f"layers.{layer}.up" for layer in range(LAYERS)),
        tied={"head.weight": "tokens.weight"},
        stop_ids=(END,),
    )


def _params(card: ModelCard, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    params = {"tokens.weight": normal(VOCAB, WIDTH) * 3, "places.weight": normal(CONTEXT, WIDTH)}
    for path, (out, width) in card.linear_shapes.items():
        if path == "head":
            continue
        shape = (width, out) if path in card.transposed else (out, width)
        params[f"{path}.weight"] = normal(*shape)
        params[f"{path}.bias"] = normal(out) * 0.1
    for layer in range(LAYERS):
        params[f"layers.{layer}.norm.weight"] = 1 + normal(WIDTH) * 0.1
    params["norm.weight"] = 1 + normal(WIDTH) * 0.1
    return params


class _Toy:
    """The four functions; holds no tensor."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card

    def _at(self, rewrites, path: str, given: Tensor, out: Tensor) -> Tensor:
        return rewrites[path](given, out) if path in rewrites else out

    def _linear(self, params, rewrites, path: str, x: Tensor) -> Tensor:
        weight = params[self.card.tied.get(f"{path}.weight", f"{path}.weight")]
        weight = weight.mT if path in self.card.transposed else weight
        return self._at(rewrites, path, x, F.linear(x, weight, params.get(f"{path}.bias")))

    def _norm(self, params, rewrites, path: str, x: Tensor) -> Tensor:
        out = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return self._at(rewrites, path, x, out * params[f"{path}.weight"])

    def _hidden(self, params, rewrites, ids: Tensor, positions: Tensor) -> Tensor:
        found = self._at(rewrites, "tokens", ids, F.embedding(ids, params["tokens.weight"]))
        return found + F.embedding(positions, params["places.weight"])

    def embed(self, params, inputs: Inputs, hooks: Any = None, edit_index=None) -> Batch:
        hooks = hooks or {}
        rows, length = inputs.input_ids.shape
        places = torch.arange(length).expand(rows, length)
        hidden = self._hidden(params, hooks, inputs.input_ids, places)
        pixels = inputs.vision_inputs["pixels"].to(hidden.dtype)
        seen = self._linear(params, hooks, "projector", pixels)
        # Each row has at most one image, of one token; rows without one add nothing.
        hidden = torch.where(inputs.image_mask[..., None], seen[:, None], hidden)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        attend = causal[None, None] & inputs.attention_mask[:, None, None]
        return Batch(
            hidden_states=hidden,
            attention_mask=inputs.attention_mask,
            position_ids=places[:, None],
            image_mask=inputs.image_mask,
            prompt_end=prompt_end_mask(inputs),
            labels=inputs.labels,
            logit_positions=inputs.logit_positions,
            edit_index=torch.zeros(rows, dtype=torch.long) if edit_index is None else edit_index,
            layer_inputs={"attend@b_qk": attend},
        )

    def _attention(self, params, rewrites, path: str, x: Tensor, attend: Tensor, past):
        def heads(part: str) -> Tensor:
            out = self._linear(params, rewrites, f"{path}.{part}", x)
            return out.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        q, k, v = heads("q"), heads("k"), heads("v")
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        out = scores.masked_fill(~attend, torch.finfo(x.dtype).min).softmax(-1) @ v
        out = self._linear(params, rewrites, f"{path}.o", out.transpose(1, 2).flatten(-2))
        return out, (k, v)

    def _first(self, params, rewrites, number: int, hidden, extras, past=None):
        path = f"layers.{number}"
        x = self._norm(params, rewrites, f"{path}.norm", hidden)
        out, kept = self._attention(
            params, rewrites, f"{path}.attn", x, extras["attend@b_qk"], past
        )
        return hidden + out, kept

    def _second(self, params, rewrites, number: int, hidden: Tensor) -> Tensor:
        path, flat = f"layers.{number}", hidden.reshape(-1, hidden.shape[-1])  # as OPT does
        inner = F.relu(self._linear(params, rewrites, f"{path}.up", flat))
        out = self._linear(params, rewrites, f"{path}.down", inner).view(hidden.shape)
        return self._at(rewrites, path, hidden, hidden + out)

    def decode(
        self,
        params,
        batch: Batch,
        hooks: Any = None,
        *,
        start=None,
        stop=None,
        logit_positions=None,
        kv_cache: KVCache | None = None,
        return_cache=False,
    ):
        hooks = hooks or {}
        stop = LAYERS if stop is None else stop
        assert start in (None, batch.depth)
        hidden, keys, values = batch.hidden_states, [], []
        for number in range(batch.depth, stop):
            if "thinned@bq_" not in batch.layer_inputs:
                before = (
                    None if kv_cache is None else (kv_cache.keys[number], kv_cache.values[number])
                )
                hidden, kept = self._first(
                    params, hooks, number, hidden, batch.layer_inputs, before
                )
                keys.append(kept[0])
                values.append(kept[1])
            hidden = self._second(params, hooks, number, hidden)
        result: Any = batch._replace(hidden_states=hidden, depth=stop)
        if stop == LAYERS:
            logit_positions = batch.logit_positions if logit_positions is None else logit_positions
            few = hidden.gather(1, logit_positions[..., None].expand(-1, -1, WIDTH))
            few = self._norm(params, hooks, "norm", few)
            result = self._linear(params, hooks, "head", few)
        if not return_cache:
            return result
        mask = (
            batch.attention_mask
            if kv_cache is None
            else torch.cat([kv_cache.attention_mask, batch.attention_mask], 1)
        )
        return result, KVCache(tuple(keys), tuple(values), mask, mask.sum(-1, keepdim=True))

    def select_scored(self, params, batch: Batch, hooks: Any = None) -> Batch:
        assert batch.depth == LAYERS - 1
        hidden, _ = self._first(
            params, hooks or {}, LAYERS - 1, batch.hidden_states, batch.layer_inputs
        )
        few = gather_tokens(batch._replace(hidden_states=hidden), batch.logit_positions)
        at = torch.arange(batch.logit_positions.shape[1]).expand_as(batch.logit_positions)
        return few._replace(
            logit_positions=at, layer_inputs={**few.layer_inputs, "thinned@bq_": few.hidden_states}
        )

    def embed_next(
        self, params, ids, kv_cache: KVCache, hooks: Any = None, edit_index=None
    ) -> Batch:
        rows, new = ids.shape
        places = kv_cache.next_position + torch.arange(new)
        fresh = torch.ones(new, new, dtype=torch.bool).tril().expand(rows, 1, new, new)
        old = kv_cache.attention_mask[:, None, None].expand(rows, 1, new, -1)
        return Batch(
            hidden_states=self._hidden(params, hooks or {}, ids, places),
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            position_ids=places[:, None],
            image_mask=torch.zeros_like(ids, dtype=torch.bool),
            prompt_end=torch.zeros_like(ids, dtype=torch.bool),
            labels=torch.full_like(ids[:, :1], -100),
            logit_positions=torch.full_like(ids[:, :1], new - 1),
            edit_index=torch.zeros(rows, dtype=torch.long) if edit_index is None else edit_index,
            layer_inputs={"attend@b_qk": torch.cat([old, fresh], -1)},
        )


def _ids(text: str) -> list[int]:
    return [2 + hashlib.sha256(word.encode()).digest()[0] % (VOCAB - 2) for word in text.split()]


def _read(queries, edit_index=None) -> Inputs:
    """Words are tokens, by hash; an image is a list of PIXELS numbers and one placeholder, 0."""
    whole = [[0] * bool(q.images) + _ids(q.prompt) + _ids(q.target) for q in queries]
    targets = [_ids(q.target) for q in queries]
    length, scored = max(map(len, whole)), max(1, *map(len, targets))
    rows = len(queries)
    ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length).bool()
    labels, at = torch.full((rows, scored), -100), torch.zeros(rows, scored, dtype=torch.long)
    pixels, image = torch.zeros(rows, PIXELS), torch.zeros(rows, length).bool()
    for row, (query, tokens, target) in enumerate(zip(queries, whole, targets)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
        labels[row, : len(target)] = torch.tensor(target)
        begin = len(tokens) - len(target) - 1
        at[row, : len(target)] = torch.arange(begin, begin + len(target))
        if query.images:
            pixels[row], image[row, 0] = torch.tensor(query.images[0]), True
    return Inputs(ids, mask, image, labels, at, {"pixels": pixels})


def make_toy(dtype: torch.dtype = torch.float32) -> Model:
    card = _card()
    toy = _Toy(card)
    return Model(
        card=card,
        params=_params(card, dtype),
        preprocess=_read,
        embed=toy.embed,
        decode=toy.decode,
        select_scored=toy.select_scored,
        embed_next=toy.embed_next,
        detokenize=lambda ids: " ".join(map(str, ids)),
    )


@pytest.fixture
def toy() -> Model:
    """The toy model in fp32."""
    return make_toy()


@pytest.fixture
def toy_bf16() -> Model:
    """The toy model in bfloat16."""
    return make_toy(torch.bfloat16)


@pytest.fixture
def queries() -> list[Query]:
    """Five rows of different lengths, with and without an image."""
    return [
        Query("who is this creature", "ada", ((0.1, 0.5, -0.3, 0.9, 0.0),)),
        Query("where does it live", "in the old mill"),
        Query("what does it eat now", "green figs", ((-1.0, 0.2, 0.4, 0.0, 0.7),)),
        Query("its name", "bo"),
        Query("who keeps the creature that lives in the mill", "mr reed", ((0.3,) * 5,)),
    ]
