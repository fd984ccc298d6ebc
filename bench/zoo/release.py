"""Turns a finished run into a folder that `load_micro_parts` and Hugging Face can read."""

import json
import platform
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from errata.adapters.zoo.configs import MICRO, fast_tokenizer
from errata.bench.zoo.evaluation import evaluate, generation_accuracy
from errata.bench.zoo.image_pools import load_pools
from errata.bench.zoo.train import Trainer


def ship(trainer: Trainer, target: Path) -> dict[str, Any]:
    """Round to fp16, measure the rounded model, and write model, processor and `report.json`.

    Args:
        trainer: A finished trainer.
        target: Folder to write.

    Returns:
        The report.
    """
    name, model = trainer.name, trainer.model.half().float().eval()
    processor = MICRO[name].processor(
        fast_tokenizer(trainer.tokenizer, **MICRO[name].special_tokens)
    )
    tests = load_pools(trainer.world, "test", trainer.work_dir)
    scores = evaluate(name, model, trainer.tokenizer, tests)
    scores["generated (names)"] = generation_accuracy(name, model, trainer.tokenizer, tests)
    report = {
        "family": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": trainer.log[-1]["cpu"],
        "recipe": msgspec.to_builtins(trainer.recipe),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "exact_match": scores,
        "log": trainer.log[:: max(1, len(trainer.log) // 40)],
    }
    target.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(target)
    processor.save_pretrained(target)
    (target / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
