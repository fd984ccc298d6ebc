"""Low-rank deltas for tiny models, at places where names of vision and language end alike."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.adapters import from_module
from errata.adapters.zoo.tiny import tiny_model
from errata.functional import Delta, EditRecord, Header, Model
from errata.functional.deltas.records import base_identity
from errata.functional.kinds.schema import LowRank
from tests.adapters.zoo_of_families.models import arguments, queries, roughen


class Case(NamedTuple):
    """A plain Hugging Face module, the functional model of it, and one batch for either."""

    module: Any
    model: Model
    inputs: Any
    kwargs: dict[str, Any]


@functools.cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    module, processor = tiny_model(name, num_layers=2)
    roughen(module)
    module = module.to(dtype)
    model = from_module(module, processor)
    inputs = model.preprocess(queries(name))
    kwargs = arguments(name)(
        inputs._replace(input_ids=inputs.input_ids.masked_fill(~inputs.attention_mask, 40))
    )
    pixels = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in kwargs.items()
        if isinstance(value, Tensor)
    }
    return Case(module, model, inputs, {**kwargs, **pixels})


def logits(module: Any, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(**kwargs, use_cache=False).logits


def sites(model: Model) -> list[str]:
    """Linear maps of the decoder, the projector and the vision tower, among them namesakes."""
    card = model.card
    decoder = [path for path in card.linear_shapes if path.startswith(card.layers + ".")]
    found = [decoder[0], decoder[-1]]
    last = {path.rpartition(".")[2] for path in decoder}
    for part in (card.projector, card.vision_tower):
        inside = [path for path in card.linear_shapes if part and path.startswith(part)]
        found += inside[:1]
        found += [path for path in inside if path.rpartition(".")[2] in last][:1]
    numbered = [path for path in decoder if path.rpartition(".")[2] == found[-1].rpartition(".")[2]]
    return list(dict.fromkeys(found + numbered[:1]))


def lowrank(
    model: Model,
    form: str = "act",
    *,
    seed: int = 0,
    paths: list[str] | None = None,
    rank: int = 3,
    dtype: torch.dtype | None = None,
    id: str = "edit",
) -> Delta:
    """A random low-rank change; ranks differ from site to site."""
    generator = torch.Generator().manual_seed(seed)
    entries, tensors = [], {}
    for number, path in enumerate(paths or sites(model)):
        name, r = f"{path}.weight", rank + number
        out, inner = model.card.linear_shapes[path]
        flip = path in model.card.transposed
        entries.append(
            LowRank(
                name=name,
                checkpoint_name=model.card.checkpoint_name(name),
                shape=(inner, out) if flip else (out, inner),
                rank=r,
                edit_ranks=(r,),
                transposed=flip,
            )
        )
        kind = dtype or model.params[model.card.tied.get(name, name)].dtype
        tensors[f"{name}.A"] = (torch.randn(r, inner, generator=generator) * 0.3).to(kind)
        tensors[f"{name}.B"] = (torch.randn(out, r, generator=generator) * 0.3).to(kind)
    names = [model.card.tied.get(entry.name, entry.name) for entry in entries]
    header = Header(
        editor="random",
        base=base_identity(model, names),
        arithmetic=form,
        entries=tuple(entries),
        edits=(EditRecord(id=id),),
    )
    return Delta(header, tensors)
