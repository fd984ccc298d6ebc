"""Cost of the single protocol against the plain loop, on a random BLIP-2 of middling size.

Run `pytest bench/perf/bench_protocols.py --benchmark-group-by=group`. Both ways edit the same cases
with the same settings and score the same five probes before and after; the answers are compared
first, so that what is timed is known to be the same work. Ratios are within one run: each round of
ours is followed by a round of the plain loop (`extra_info["plain_over_errata"]`).
"""

from __future__ import annotations

import time
import warnings

import pytest
import torch

from errata import adapters
from errata.bench.perf import mid, plain
from errata.bench.probes import Terms
from errata.bench.protocols import single
from errata.editors import FinetuneConfig, LoraConfig, make
from errata.functional.metrics import SCORERS

NUM_CASES = 8

FINETUNE = FinetuneConfig(num_steps=25, lr=1e-3, stop_loss=0.0, end=False)
LORA = LoraConfig(rank=8, alpha=16.0, num_steps=5, lr=1e-3, stop_loss=0.0, end=False)


@pytest.fixture(scope="module")
def subject():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns that torchvision is absent
        module, processor = mid.blip2()
        return module, adapters.adapt(module, processor), mid.cases(NUM_CASES)


def trainer(model, config):
    """The plain way to train what `config` says."""
    if isinstance(config, FinetuneConfig):
        names = [model.card.site(site) + ".weight" for site in config.sites]
        return plain.finetune_in_place(names, config.lr, config.num_steps)
    paths = model.card.match(config.targets)
    return plain.lora_in_place(paths, config.rank, config.alpha, config.lr, config.num_steps)


def ours(model, config, cases):
    terms = Terms(scorers=(SCORERS["errata"],), budget=1 << 30)
    return [result for step in single(model, make(config), cases, terms) for result in step.results]


@pytest.mark.parametrize("config", [FINETUNE, LORA], ids=["finetune", "lora"])
def bench_single(benchmark, subject, config):
    module, model, cases = subject
    train = trainer(model, config)
    got = {(r.case.id, r.probe): (r.before.text, r.after.text) for r in ours(model, config, cases)}
    want = plain.single(module, model, cases, train)
    for case, answers in zip(cases, want):
        for probe, (before, after) in answers.items():
            texts = (model.write(before).strip(), model.write(after).strip())
            assert got[case.id, probe] == texts, f"{case.id} {probe}"
    benchmark.group = "single protocol"
    seconds = []

    def plainly():
        begin = time.perf_counter()
        plain.single(module, model, cases, train)
        seconds.append(time.perf_counter() - begin)

    rounds = 3
    benchmark.pedantic(ours, (model, config, cases), rounds=rounds, teardown=lambda *_: plainly())
    ratio = min(seconds) / benchmark.stats.stats.min
    benchmark.extra_info.update(
        plain_over_errata=round(ratio, 2),
        plain_seconds_per_case=round(min(seconds) / NUM_CASES, 3),
        errata_seconds_per_case=round(benchmark.stats.stats.min / NUM_CASES, 3),
        threads=torch.get_num_threads(),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
