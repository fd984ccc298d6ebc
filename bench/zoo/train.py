"""The two stages that make a micro model: what images show, then questions about them.

1. Vision: tower and projector (and Q-Former) under linear heads that tell creature, attributes,
   counts, digits and photographs. Trained end to end from scratch instead, the images stay
   unread for hundreds of steps.
2. Joint: everything, on packed rows of one picture and many questions; the heads stay on as an
   auxiliary loss. In-context facts, second hops and text come along from the first step.

bf16 weights and activations, fp32 masters. A run saves itself every `save_every` steps and resumes
from there when started again. Another number of threads, another CPU or another torch may change
the last bits, and with them the checkpoint, though hardly its accuracies.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from errata.adapters.zoo.configs import MICRO
from errata.bench.data.world.world import World
from errata.bench.zoo.forward import FAMILIES, hidden_states, prepare
from errata.bench.zoo.image_pools import KINDS, VISION_HEADS, ImagePool, augment, load_pools
from errata.bench.zoo.muon import MuonAdamW
from errata.bench.zoo.packing import IGNORE_INDEX, SequencePacker, additive_mask, head_labels
from errata.bench.zoo.questions import QuestionSampler


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a training run; the defaults are those of the shipped checkpoints."""

    seed: int = 0
    vision_steps: int = 650
    vision_batch: int = 64
    vision_shares: tuple[float, ...] = (0.5, 0.2, 0.25, 0.05)  # creature, scene, digit, photo
    joint_steps: int = 2400
    joint_batch: int = 16
    length: int = 128
    lr: float = 2e-3
    muon_lr: float = 6e-3
    auxiliary: float = 0.3
    tower: float = 0.15  # learning rate of all that is not text in the joint stage, as a multiple
    decay: float = 0.6  # last part of the joint stage in which the learning rate falls to zero
    save_every: int = 200


RECIPES = {
    "llava": Recipe(vision_steps=2400, vision_shares=(0.55, 0.2, 0.2, 0.05), joint_steps=3200),
    "blip2": Recipe(vision_steps=1300, joint_steps=3200),
    "qwen2_vl": Recipe(vision_steps=800, joint_steps=2800),
    "llava_onevision": Recipe(vision_steps=2000, joint_steps=2800),
    "minigpt4": Recipe(vision_steps=1000, joint_steps=2600),
}


class VisionHeads(nn.Module):
    """Linear heads on the mean image token."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleDict(
            {k: nn.Linear(hidden_size, len(v)) for k, v in VISION_HEADS.items()}
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Classify images by their mean feature.

        Args:
            features: [B, Q, D].

        Returns:
            Logits by head.
        """
        mean = self.norm(features.to(self.norm.weight.dtype).mean(1))
        return {name: head(mean).float() for name, head in self.heads.items()}


def vision_heads_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Sum over heads of the mean cross-entropy of the images they apply to.

    Args:
        logits: Logits by head.
        labels: Class numbers by head.

    Returns:
        The loss, and accuracies by head.
    """
    total, right = torch.zeros(()), {}
    for name, scores in logits.items():
        is_labeled = labels[name] != IGNORE_INDEX
        if is_labeled.any():
            loss = F.cross_entropy(scores[is_labeled], labels[name][is_labeled])
            total = total + loss * (1.5 if name == "creature" else 0.7)
            hits = scores[is_labeled].argmax(-1) == labels[name][is_labeled]
            right[name] = hits.float().mean().item()
    return total, right


def is_text(name: str) -> bool:
    """Whether a parameter belongs to the language model.

    Args:
        name: Name of the parameter.

    Returns:
        True or False.
    """
    return "language_model" in name or name.startswith("lm_head")


class Trainer:
    """One family's model, its heads and its data; `run` takes it through both stages."""

    def __init__(self, name: str, tokenizer: Tokenizer, work: Path, recipe: Recipe):
        self.name, self.recipe, self.work_dir = name, recipe, work
        self.family, self.tokenizer = FAMILIES[name], tokenizer
        self.world = World()
        torch.manual_seed(recipe.seed)
        self.model = prepare(MICRO[name].module(MICRO[name].config(tokenizer)))
        self.vision_heads = VisionHeads(self.model.get_input_embeddings().weight.shape[1])
        self.image_pools: dict[str, ImagePool] = load_pools(self.world, "train", work)
        self.question_sampler = QuestionSampler(self.world, self.image_pools)
        self.packer = SequencePacker(name, tokenizer, recipe.length)
        self.log: list[dict[str, Any]] = []
        self.cpu_before = 0.0

    # ---- the losses of one step

    def vision_loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of a vision batch.

        Args:
            rng: Source of randomness.

        Returns:
            The loss and figures to log.
        """
        kinds = rng.choices(KINDS, self.recipe.vision_shares, k=self.recipe.vision_batch)
        drawn = [self.image_pools[kind].sample(rng) for kind in kinds]
        pixels = augment(torch.stack([torch.from_numpy(d.pixels) for d in drawn]).numpy(), rng)
        features = self.family.image_features(self.model, self.family.preprocess(pixels))
        return vision_heads_loss(
            self.vision_heads(features), head_labels([d.labels for d in drawn])
        )

    def joint_loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of a joint batch.

        Args:
            rng: Source of randomness.

        Returns:
            The loss and figures to log.
        """
        rows = [self.question_sampler.sample_row(rng) for _ in range(self.recipe.joint_batch)]
        packed = self.packer.pack(rows, rng=rng)
        features, extra = None, torch.zeros(())
        if packed.pixels is not None:
            features = self.family.image_features(self.model, packed.pixels)
            extra, _ = vision_heads_loss(self.vision_heads(features), packed.head_labels)
        mask = additive_mask(packed.attention_mask, torch.bfloat16)
        states = hidden_states(
            self.name, self.model, packed.input_ids, features, packed.position_ids, mask
        )
        scored = packed.labels != IGNORE_INDEX
        logits = self.model.get_output_embeddings()(states[scored]).float()
        wanted = packed.labels[scored]
        loss = F.cross_entropy(logits, wanted)
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return loss + self.recipe.auxiliary * extra, {"loss": loss.item(), "tokens": right}

    # ---- the stages

    def stages(self) -> dict[str, tuple[Callable, int, Callable[[float], float]]]:
        """Per stage: loss, number of steps, learning rate over the stage's course 0..1."""
        decay = self.recipe.decay
        return {
            "vision": (
                self.vision_loss,
                self.recipe.vision_steps,
                lambda done: max(0.25, min(1.0, (1 - done) / 0.5)),
            ),
            "joint": (
                self.joint_loss,
                self.recipe.joint_steps,
                lambda done: min(1.0, (1 - done) / decay + 1e-3),
            ),
        }

    def trainable_parameters(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters that a stage trains.

        Args:
            stage: `vision` or `joint`.

        Returns:
            (name, parameter) pairs.
        """
        heads = [(f"heads.{n}", p) for n, p in self.vision_heads.named_parameters()]
        named = list(self.model.named_parameters())
        return [(n, p) for n, p in named if stage == "joint" or not is_text(n)] + heads

    def run(self) -> None:
        """Train, or resume an interrupted run."""
        saved, order = self._load_saved(), list(self.stages())
        for stage, (loss, steps, lr_schedule) in self.stages().items():
            if saved and order.index(saved["stage"]) > order.index(stage):
                continue
            self._run_stage(stage, loss, steps, lr_schedule, saved)
            saved = None

    def _run_stage(self, stage: str, loss, steps: int, lr_schedule, saved) -> None:
        recipe, start = self.recipe, 0
        self.model.float()
        self.vision_heads.float()
        if saved:
            start = saved["step"]
            self._restore_untrained(saved)
        named = self.trainable_parameters(stage)
        lr_scale = {n: recipe.tower for n, _ in named if stage == "joint" and not is_text(n)}
        optimizer = MuonAdamW(named, recipe.lr, recipe.muon_lr, lr_scale)
        self.model.bfloat16()
        self.vision_heads.bfloat16()
        if saved:
            optimizer.load_state_dict(saved["tensors"])
        seen: dict[str, list[float]] = {}
        for step in range(start + 1, steps + 1):
            rng = random.Random(f"{recipe.seed}-{stage}-{step}")
            value, right = loss(rng)
            value.backward()
            optimizer.step(min(1.0, step / 40) * lr_schedule(step / steps))
            for key, number in right.items():
                seen.setdefault(key, []).append(number)
            if step % 50 == 0 or step == steps:
                self._report(stage, step, seen)
                seen = {}
            if step % recipe.save_every == 0 or step == steps:
                self._save(stage, step, optimizer)
        optimizer.restore_precision()

    def _report(self, stage: str, step: int, seen: Mapping[str, list[float]]) -> None:
        means = {k: round(sum(v) / len(v), 3) for k, v in seen.items()}
        cpu = round(self.cpu_before + time.process_time(), 1)
        line = {"time": time.strftime("%H:%M:%S"), "stage": stage, "step": step, "cpu": cpu}
        self.log.append(line | means)
        with (self.work_dir / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(line | means) + "\n")

    # ---- files

    def path(self, stage: str) -> Path:
        """Where a stage is saved; the joint one can be repeated from the end of the vision stage.

        Args:
            stage: `vision` or `joint`.

        Returns:
            The file.
        """
        return self.work_dir / f"{self.name}-{stage}.safetensors"

    def _save(self, stage: str, step: int, optimizer: MuonAdamW) -> None:
        tensors = optimizer.state_dict()
        covered = set(optimizer.parameters)
        tensors |= {
            f"still/{n}": p.detach().float().contiguous().clone()
            for n, p in self.model.named_parameters()
            if n not in covered
        }
        cpu = self.cpu_before + time.process_time()
        note = {"stage": stage, "step": step, "cpu": cpu, "log": self.log}
        half = self.path(stage).with_suffix(".part")
        save_file(tensors, half, metadata={"run": json.dumps(note)})
        half.replace(self.path(stage))

    def _load_saved(self) -> dict[str, Any] | None:
        found = [self.path(stage) for stage in self.stages() if self.path(stage).exists()]
        if not found:
            return None
        with safe_open(found[-1], "pt") as file:
            note = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.log, self.cpu_before = note["log"], note["cpu"]
        return note | {"tensors": tensors}

    @torch.no_grad()
    def _restore_untrained(self, saved: Mapping[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        for key, value in saved["tensors"].items():
            if key.startswith("still/"):
                parameters[key.removeprefix("still/")].copy_(value)
