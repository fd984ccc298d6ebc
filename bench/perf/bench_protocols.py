"""What an editor costs, in passes: per case, beside the floor and beside the plain way.

    pytest bench/perf/bench_protocols.py -k "blip2 and single"

*Floor*: one batched forward of the base over the same probes, whole rows, heads on scored
positions. *Plain*: the same edits one by one, whole forwards of one row (`whole.py`); for FT and
LoRA also on the Hugging Face module in place (`plain.py`). Answers are compared, so that what is
timed is known to be the same work. The rivals take turns in every round; figures are CPU time of
one thread, ratios are of the least of each. Peak memory is that of the edited run alone, over the
process with the model in it.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable

import pytest
import torch

from errata import adapters
from errata.bench.memory import measured, resident
from errata.bench.perf import mid, plain, whole
from errata.bench.probes import Terms, batches
from errata.bench.protocols import sequential, single
from errata.bench.shared import Shared
from errata.bench.sources import queries_of
from errata.editors import (
    FinetuneConfig,
    GraceConfig,
    IkeConfig,
    LiveEditConfig,
    LoraConfig,
    MendConfig,
    SeracConfig,
    WiseConfig,
    make,
)  # fmt: skip
from errata.editors.fit import FitConfig
from errata.editors.liveedit import course as liveedit_course
from errata.editors.mend import course as mend_course
from errata.functional.answers import answers
from errata.functional.metrics import SCORERS

CASES = {"blip2": 8, "llava": 4, "qwen2_vl": 6}
PLAIN = {"blip2": 1, "llava": 1, "qwen2_vl": 1}  # cases of the plain way, which takes its time
ROUNDS = 1
TOGETHER = 8  # edits side by side; left to itself the protocol tries the first case alone, which
# with so few cases would count for more than it does in a run

EDITORS = {
    "finetune": FinetuneConfig(num_steps=25, lr=1e-3, stop_loss=0.0, end=False),
    "lora": LoraConfig(rank=8, alpha=16.0, num_steps=5, lr=1e-3, stop_loss=0.0, end=False),
    "grace": GraceConfig(num_steps=20, stop_loss=0.0, end=False),
    "wise": WiseConfig(num_steps=10, num_texts=1, stop_loss=0.0, end=False),
    "mend": MendConfig(edit_lr=-1e-3),
    "liveedit": LiveEditConfig(end=False),
    "serac": SeracConfig(end=False),
    "ike": IkeConfig(),
}


@functools.cache
def subject(name: str):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns that torchvision is absent
        module, processor = mid.MODELS[name]()
        return module, adapters.adapt(module, processor), mid.cases(CASES[name])


def terms_of(module) -> Terms:
    """A quarter of what the model weighs, for everything beside it."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return Terms(scorers=(SCORERS["errata"],), budget=weights // 4)


def floor(model, cases, terms) -> None:
    """One batched base forward over the probes of these cases."""
    asked = [query for case in cases for _, _, query in queries_of(case)]
    for chosen in batches(model, asked, 4 * terms.budget):
        answers(model, model.read([asked[k] for k in chosen]))


def alone(model, config, cases, terms, protocol=single):
    """One editor on these cases: nothing is left from another."""
    editor = make(config)
    shared = Shared(model, cases, terms)
    shared.expect(editor)
    more = {"together": TOGETHER} if protocol is single else {}
    return list(protocol(model, editor, cases, terms, shared=shared, **more))


def together(model, configs, cases, terms):
    """All editors in one run, taking turns as `errata run` has them."""
    shared = Shared(model, cases, terms)
    made = [make(config) for config in configs]
    for editor in made:
        shared.expect(editor)
    legs = [
        [0, single(model, editor, cases, terms, together=TOGETHER, shared=shared)]
        for editor in made
    ]
    while legs:
        leg = min(legs, key=lambda leg: leg[0])
        step = next(leg[1], None)
        if step is None:
            legs.remove(leg)
        else:
            leg[0] += step.cases


def said(steps) -> dict:
    found = [result for step in steps for result in step.results]
    return {(r.case.id, r.probe, r.index): (r.before.text, r.after.text) for r in found}


def timed(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def turns(benchmark, mine: Callable[[], object], *rivals: Callable[[], object]) -> list[float]:
    """The least CPU seconds of mine, and of each rival, taking turns."""
    seconds: list[list[float]] = [[] for _ in rivals]

    def others(*_) -> None:
        for found, rival in zip(seconds, rivals):
            found.append(timed(rival))

    benchmark.pedantic(mine, rounds=ROUNDS, teardown=others)
    return [benchmark.stats.stats.min, *map(min, seconds)]


models = pytest.mark.parametrize("name", list(mid.MODELS))
clocked = pytest.mark.benchmark(timer=time.process_time)


@clocked
@models
@pytest.mark.parametrize("kind", list(EDITORS))
def bench_single(benchmark, name, kind):
    module, model, cases = subject(name)
    config, terms, few = EDITORS[kind], terms_of(module), cases[: PLAIN[name]]
    seconds, before = [], resident()
    with measured(torch.device("cpu")) as peak:
        steps = alone(model, config, cases, terms)
    got = said(steps)

    def slow() -> None:
        begin = time.process_time()
        found = whole.single(model, make(config), few, queries_of)
        seconds.append(time.process_time() - begin)
        want = {(c.id, *key): pair for c, one in zip(few, found) for key, pair in one.items()}
        assert {key: got[key] for key in want} == want

    slow()
    mine, least = turns(
        benchmark,
        lambda: alone(model, config, cases, terms),
        lambda: floor(model, cases, terms),
    )
    slowest = min(seconds)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    delta = max(t.numel() * t.element_size() for s in steps for d in s.deltas.values()
                for t in d.tensors.values())  # fmt: skip
    each, base = mine / len(cases), least / len(cases)
    benchmark.group = f"single, {name}"
    benchmark.extra_info.update(
        over_floor=round(each / base, 2),
        plain_over_errata=round(slowest / len(few) / each, 2),
        seconds_per_case=round(each, 3),
        floor_seconds_per_case=round(base, 3),
        plain_seconds_per_case=round(slowest / len(few), 3),
        peak_over_weights=round((peak.bytes - before) / weights, 3),
        largest_tensor_over_weights=round(delta / weights, 3),
        threads=torch.get_num_threads(),
    )


@clocked
@pytest.mark.parametrize("kind", ["finetune", "lora"])
def bench_in_place(benchmark, kind):
    """Beside Hugging Face's module, copied and edited in place."""
    module, model, cases = subject("blip2")
    config, few, terms = EDITORS[kind], cases[:2], terms_of(module)
    if kind == "finetune":
        names = [model.card.site(site) + ".weight" for site in config.sites]
        train = plain.finetune_in_place(names, config.lr, config.num_steps)
    else:
        paths = model.card.match(config.targets)
        train = plain.lora_in_place(paths, config.rank, config.alpha, config.lr, config.num_steps)
    got = said(alone(model, config, few, terms))
    for case, found in zip(few, plain.single(module, model, few, train)):
        for probe, (before, after) in found.items():
            texts = (model.write(before).strip(), model.write(after).strip())
            assert got[case.id, probe, 0] == texts
    mine, slow = turns(
        benchmark,
        lambda: alone(model, config, cases, terms),
        lambda: plain.single(module, model, few, train),
    )
    benchmark.group = "single, blip2, beside Hugging Face in place"
    benchmark.extra_info.update(
        plain_over_errata=round(slow / len(few) / (mine / len(cases)), 2),
        plain_seconds_per_case=round(slow / len(few), 3),
    )


@clocked
@models
def bench_all_editors(benchmark, name):
    """Eight editors on the same cases in one run."""
    module, model, cases = subject(name)
    terms, configs = terms_of(module), list(EDITORS.values())
    mine, least = turns(
        benchmark,
        lambda: together(model, configs, cases, terms),
        lambda: floor(model, cases, terms),
    )
    benchmark.group = "all editors in one run"
    benchmark.extra_info.update(
        over_floor=round(mine / least, 2), seconds_per_case=round(mine / len(cases), 3)
    )


@clocked
@pytest.mark.parametrize("kind", list(EDITORS))
def bench_sequential(benchmark, kind):
    """Each case probed right after its edit, and all of them at the end."""
    module, model, cases = subject("blip2")
    terms = terms_of(module)
    mine, least = turns(
        benchmark,
        lambda: alone(model, EDITORS[kind], cases, terms, sequential),
        lambda: floor(model, cases, terms),
    )
    benchmark.group = "sequential, blip2"
    benchmark.extra_info.update(
        over_floor=round(mine / least, 2), seconds_per_case=round(mine / len(cases), 3)
    )


@clocked
@models
@pytest.mark.parametrize("kind", ["mend", "liveedit"])
def bench_training(benchmark, name, kind):
    """A training step on prefixes that are kept, beside one of whole forwards."""
    from errata.editors.fit import fit

    _, model, cases = subject(name)
    course = {"mend": mend_course, "liveedit": liveedit_course}[kind](EDITORS[kind])
    steps, few = 2, cases[:4]
    config = FitConfig(num_steps=steps, together=4, held=0, validate_every=99)
    losses: dict[str, list[float]] = {"kept": [], "whole": []}

    def run(subject, label, config=config):
        fit(subject, course, few, config, progress=lambda p: losses[label].append(p.loss))

    def spent(subject, label, count):
        run_config = FitConfig(num_steps=count, together=4, held=0, validate_every=99)
        return timed(lambda: run(subject, label, run_config))

    run(model, "kept")
    unkept = whole.whole(model)
    forgetful = FitConfig(num_steps=steps, together=4, held=0, validate_every=99, memory=0)
    run(unkept, "whole", forgetful)
    assert losses["kept"] == pytest.approx(losses["whole"], rel=1e-3)
    found = []
    for _ in range(ROUNDS):
        # of steps alone, prefixes aside: the difference of a longer and a shorter run
        longer, shorter = spent(model, "kept", 1 + 2 * steps), spent(model, "kept", 1)
        slow = timed(lambda: run(unkept, "whole", forgetful)) / steps
        found.append(((longer - shorter) / (2 * steps), slow))
    kept, slow = (min(pair[k] for pair in found) for k in range(2))
    benchmark.pedantic(lambda: run(model, "kept"), rounds=1)
    benchmark.group = f"training, {name}"
    benchmark.extra_info.update(
        steps_per_second=round(1 / kept, 2), whole_over_kept=round(slow / kept, 2)
    )


@clocked
def bench_growth(benchmark):
    """Cases cost what they cost, however many: seconds per case of 10 and of 160, sequentially."""
    module, model, _ = subject("blip2")
    terms, config = terms_of(module), EDITORS["grace"]
    few, many = mid.cases(10), mid.cases(160)
    small = statistics.median(timed(lambda: alone(model, config, few, terms)) for _ in range(3))
    benchmark.pedantic(lambda: alone(model, config, many, terms), rounds=1)
    large = benchmark.stats.stats.min
    benchmark.group = "growth"
    benchmark.extra_info.update(growth_of_16=round(large / small, 2))
