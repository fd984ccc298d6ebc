"""Edits by IKE on tiny models, and what their memories put before a question."""

from __future__ import annotations

import torch
from PIL import Image

from errata.editors.ike import IkeConfig, ike_editor
from errata.functional import Delta, Query, bind
from errata.functional.kinds.prompt.apply import expand_prompts

__all__ = ["edited", "make_image", "put"]


def make_image(seed: int) -> Image.Image:
    noise = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(seed))
    small = Image.fromarray((noise * 255).byte().numpy())
    return small.resize((32, 32), Image.Resampling.NEAREST)


def edited(model, config: IkeConfig, *queries: Query, cases=None) -> Delta:
    editor = ike_editor(config, cases)
    state = editor.init(model, torch.Generator())
    delta = None
    for query in queries:
        delta, state = editor.edit(model, state, [query])
    assert delta is not None
    return delta


def put(model, delta: Delta, *prompts: str, images=(), edit=None) -> list[str]:
    queries = [Query(prompt, "", images) for prompt in prompts]
    return [query.prompt for query in expand_prompts(bind(model, delta), queries, edit)]
