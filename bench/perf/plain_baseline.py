"""The plain way to edit, as a yardstick: copy the model, edit it in place, whole forwards only.

One case = five probes on the base, an edit of a deep copy (batch of one, every step through the
whole model, vision tower included), five probes on the copy. This is what the field's code bases
do, without their accidental costs (host copies of logits, repeated tokenisation of one string).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.functional import IGNORE_INDEX, Case, Inputs, Model

__all__ = ["finetune_in_place", "lora_in_place", "run_single"]

Train = Callable[[torch.nn.Module, Callable[[], Tensor]], None]


def forward(module: torch.nn.Module, inputs: Inputs) -> Tensor:
    """Run the module's own forward on one row; text alone goes to its decoder.

    Args:
        module: A Hugging Face model.
        inputs: One row.

    Returns:
        Logits [1 L V].
    """
    run: Any = module if inputs.vision_inputs else module.language_model
    return run(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask.long(),
        use_cache=False,
        **inputs.vision_inputs,
    ).logits


def scored_ids(logits: Tensor, inputs: Inputs) -> tuple[int, ...]:
    """The predicted ids at scored positions.

    Args:
        logits: [1 L V].
        inputs: One row.

    Returns:
        Ids.
    """
    picked = logits[0, inputs.logit_positions[0]].argmax(-1)
    return tuple(picked[inputs.labels[0] != IGNORE_INDEX].tolist())


def run_single(
    module: torch.nn.Module, model: Model, cases: Iterable[Case], train: Train
) -> list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The single protocol without any reuse: answers before and after each edit, per probe.

    Args:
        module: A Hugging Face model.
        model: The same model, for its preprocessing.
        cases: Cases.
        train: Trains a copy of the module, given its loss.

    Returns:
        Answers (token ids) by probe, for each case.
    """
    results = []
    for case in cases:
        probes = {n: model.preprocess(queries) for n, queries in case.probes.items()}
        with torch.no_grad():
            before = {n: scored_ids(forward(module, i), i) for n, i in probes.items()}
        edited = copy.deepcopy(module)
        inputs = model.preprocess([case.edit])

        def loss(edited=edited, inputs=inputs) -> Tensor:
            logits = forward(edited, inputs)[0, inputs.logit_positions[0]].float()
            return torch.nn.functional.cross_entropy(
                logits, inputs.labels[0], ignore_index=IGNORE_INDEX
            )

        train(edited, loss)
        with torch.no_grad():
            after = {n: scored_ids(forward(edited, i), i) for n, i in probes.items()}
        results.append({n: (before[n], after[n]) for n in probes})
    return results


def finetune_in_place(names: Sequence[str], lr: float, num_steps: int) -> Train:
    """Train the named parameters with AdamW; everything else is frozen.

    Args:
        names: Parameters.
        lr: Learning rate.
        num_steps: Steps.

    Returns:
        The training function.
    """

    def train(module: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
        module.requires_grad_(False)
        chosen = [module.get_parameter(name).requires_grad_() for name in names]
        optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    return train


class _LoraLinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, down: Tensor, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.down = torch.nn.Parameter(down.clone())
        self.up = torch.nn.Parameter(torch.zeros(linear.out_features, len(down)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.T) @ self.up.T


def lora_in_place(
    paths: Sequence[str], rank: int, alpha: float, lr: float, num_steps: int
) -> Train:
    """Train a LoRA of the named linear maps with Adam, inserted as modules.

    Args:
        paths: Linear maps.
        rank: Rank.
        alpha: The scale is alpha / rank.
        lr: Learning rate.
        num_steps: Steps.

    Returns:
        The training function.
    """

    def train(module: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
        module.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        chosen = []
        for path in paths:
            linear = module.get_submodule(path)
            assert isinstance(linear, torch.nn.Linear)
            bound = 1 / math.sqrt(linear.in_features)
            down = torch.empty(rank, linear.in_features)
            adapted = _LoraLinear(
                linear, down.uniform_(-bound, bound, generator=generator), alpha / rank
            )
            module.set_submodule(path, adapted)
            chosen += [adapted.down, adapted.up]
        optimizer = torch.optim.Adam(chosen, lr=lr)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    return train
