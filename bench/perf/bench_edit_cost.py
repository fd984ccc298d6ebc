"""What an editor costs, in passes: per case, against the floor and the plain way.

    pytest bench/perf/bench_edit_cost.py -k "blip2 and single"

*Floor*: one batched forward of the base over the same probes, whole rows, heads on scored
positions. *Plain*: the same edits one by one, whole forwards of one row (`whole_forward.py`); for
FT and LoRA also on the Hugging Face module in place (`plain_baseline.py`). Answers are compared, so
that what is timed is known to be the same work. The rivals take turns in every round;
figures are CPU time of one thread, ratios are of the least of each. Peak memory is that of the
edited run alone, over the process with the model in it.
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
from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.batching import make_batches
from errata.bench.evaluation.memory import measure_peak, resident_bytes
from errata.bench.evaluation.questions import EvaluationConfig, questions_of
from errata.bench.perf import plain_baseline, random_models, whole_forward
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.single import run_single
from errata.editors import make_editor
from errata.editors.finetune import FinetuneConfig
from errata.editors.grace import GraceConfig
from errata.editors.ike import IkeConfig
from errata.editors.liveedit import LiveEditConfig
from errata.editors.liveedit.editor import liveedit_trainable as liveedit_course
from errata.editors.lora import LoraConfig
from errata.editors.mend import MendConfig
from errata.editors.mend.editor import mend_trainable as mend_course
from errata.editors.serac import SeracConfig
from errata.editors.training.config import TrainingConfig
from errata.editors.wise import WiseConfig
from errata.functional.metrics.conventions import SCORERS
from errata.functional.metrics.readout import read_out

NUM_CASES = {"blip2": 8, "llava": 4, "qwen2_vl": 6}
NUM_PLAIN_CASES = {
    "blip2": 1,
    "llava": 1,
    "qwen2_vl": 1,
}  # cases of the plain way, which takes its time
ROUNDS = 1
BATCH_SIZE = 8  # edits side by side; left to itself the protocol tries the first case alone, which
# with so few cases would count for more than it does in a run

TIMED_EDITORS = {
    "finetune": FinetuneConfig(num_steps=25, lr=1e-3, stop_loss=0.0, append_eos=False),
    "lora": LoraConfig(rank=8, alpha=16.0, num_steps=5, lr=1e-3, stop_loss=0.0, append_eos=False),
    "grace": GraceConfig(num_steps=20, stop_loss=0.0, append_eos=False),
    "wise": WiseConfig(num_steps=10, num_unrelated=1, stop_loss=0.0, append_eos=False),
    "mend": MendConfig(untrained=True, edit_lr=-1e-3),
    "liveedit": LiveEditConfig(untrained=True, append_eos=False),
    "serac": SeracConfig(untrained=True, append_eos=False),
    "ike": IkeConfig(),
}


@functools.cache
def model_and_cases(name: str):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns that torchvision is absent
        module, processor = random_models.MODELS[name]()
        return module, adapters.from_module(module, processor), random_models.cases(NUM_CASES[name])


def evaluation_config_for(module) -> EvaluationConfig:
    """A quarter of what the model weighs, for everything else."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return EvaluationConfig(scorers=(SCORERS["errata"],), memory_bytes=weights // 4)


def base_pass_cost(model, cases, evaluation_config) -> None:
    """One batched base forward over the probes of these cases."""
    asked = [query for case in cases for _, _, query in questions_of(case)]
    for chosen in make_batches(model, asked, 4 * evaluation_config.memory_bytes):
        read_out(model, model.preprocess([asked[k] for k in chosen]))


def run_one_editor(model, config, cases, evaluation_config, protocol=run_single):
    """One editor on these cases: nothing is left from another."""
    editor = make_editor(config)
    base_pass = SharedBasePass(model, cases, evaluation_config)
    base_pass.record_depth(editor)
    options = {"batch_size": BATCH_SIZE} if protocol is run_single else {}
    return list(protocol(model, editor, cases, evaluation_config, base_pass=base_pass, **options))


def run_all_editors(model, configs, cases, evaluation_config):
    """All editors in one run, taking turns as `errata run` has them."""
    base_pass = SharedBasePass(model, cases, evaluation_config)
    made_editors = [make_editor(config) for config in configs]
    for editor in made_editors:
        base_pass.record_depth(editor)
    legs = [
        [
            0,
            run_single(
                model, editor, cases, evaluation_config, batch_size=BATCH_SIZE, base_pass=base_pass
            ),
        ]
        for editor in made_editors
    ]
    while legs:
        leg = min(legs, key=lambda leg: leg[0])
        step = next(leg[1], None)
        if step is None:
            legs.remove(leg)
        else:
            leg[0] += step.cases


def answer_texts(steps) -> dict:
    found = [result for step in steps for result in step.results]
    return {(r.case.id, r.probe, r.index): (r.before.text, r.after.text) for r in found}


def cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def time_in_turns(
    benchmark, mine: Callable[[], object], *rivals: Callable[[], object]
) -> list[float]:
    """The least CPU seconds of mine, and of each rival, taking turns."""
    seconds: list[list[float]] = [[] for _ in rivals]

    def others(*_) -> None:
        for found, rival in zip(seconds, rivals):
            found.append(cpu_seconds(rival))

    benchmark.pedantic(mine, rounds=ROUNDS, teardown=others)
    return [benchmark.stats.stats.min, *map(min, seconds)]


models = pytest.mark.parametrize("name", list(random_models.MODELS))
cpu_timed = pytest.mark.benchmark(timer=time.process_time)


@cpu_timed
@models
@pytest.mark.parametrize("kind", list(TIMED_EDITORS))
def bench_single(benchmark, name, kind):
    module, model, cases = model_and_cases(name)
    config, terms, few = (
        TIMED_EDITORS[kind],
        evaluation_config_for(module),
        cases[: NUM_PLAIN_CASES[name]],
    )
    seconds, before = [], resident_bytes()
    with measure_peak(torch.device("cpu")) as peak:
        steps = run_one_editor(model, config, cases, terms)
    got = answer_texts(steps)

    def slow() -> None:
        begin = time.process_time()
        found = whole_forward.run_single(model, make_editor(config), few, questions_of)
        seconds.append(time.process_time() - begin)
        want = {(c.id, *key): pair for c, one in zip(few, found) for key, pair in one.items()}
        assert {key: got[key] for key in want} == want

    slow()
    mine, least = time_in_turns(
        benchmark,
        lambda: run_one_editor(model, config, cases, terms),
        lambda: base_pass_cost(model, cases, terms),
    )
    slowest = min(seconds)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    delta = max(
        t.numel() * t.element_size()
        for s in steps
        for d in s.deltas.values()
        for t in d.tensors.values()
    )
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


@cpu_timed
@pytest.mark.parametrize("kind", ["finetune", "lora"])
def bench_in_place(benchmark, kind):
    """Beside Hugging Face's module, copied and edited in place."""
    module, model, cases = model_and_cases("blip2")
    config, few, terms = TIMED_EDITORS[kind], cases[:2], evaluation_config_for(module)
    if kind == "finetune":
        names = [model.card.resolve_site(site) + ".weight" for site in config.sites]
        train = plain_baseline.finetune_in_place(names, config.lr, config.num_steps)
    else:
        paths = model.card.match_linears(config.target_modules)
        train = plain_baseline.lora_in_place(
            paths, config.rank, config.alpha, config.lr, config.num_steps
        )
    got = answer_texts(run_one_editor(model, config, few, terms))
    for case, found in zip(few, plain_baseline.run_single(module, model, few, train)):
        for probe, (before, after) in found.items():
            texts = (model.detokenize(before).strip(), model.detokenize(after).strip())
            assert got[case.id, probe, 0] == texts
    mine, slow = time_in_turns(
        benchmark,
        lambda: run_one_editor(model, config, cases, terms),
        lambda: plain_baseline.run_single(module, model, few, train),
    )
    benchmark.group = "single, blip2, against Hugging Face in place"
    benchmark.extra_info.update(
        plain_over_errata=round(slow / len(few) / (mine / len(cases)), 2),
        plain_seconds_per_case=round(slow / len(few), 3),
    )


@cpu_timed
@models
def bench_all_editors(benchmark, name):
    """Eight editors on the same cases in one run."""
    module, model, cases = model_and_cases(name)
    terms, configs = evaluation_config_for(module), list(TIMED_EDITORS.values())
    mine, least = time_in_turns(
        benchmark,
        lambda: run_all_editors(model, configs, cases, terms),
        lambda: base_pass_cost(model, cases, terms),
    )
    benchmark.group = "all editors in one run"
    benchmark.extra_info.update(
        over_floor=round(mine / least, 2), seconds_per_case=round(mine / len(cases), 3)
    )


@cpu_timed
@pytest.mark.parametrize("kind", list(TIMED_EDITORS))
def bench_sequential(benchmark, kind):
    """Each case probed right after its edit, and all of them at the end."""
    module, model, cases = model_and_cases("blip2")
    terms = evaluation_config_for(module)
    mine, least = time_in_turns(
        benchmark,
        lambda: run_one_editor(model, TIMED_EDITORS[kind], cases, terms, run_sequential),
        lambda: base_pass_cost(model, cases, terms),
    )
    benchmark.group = "sequential, blip2"
    benchmark.extra_info.update(
        over_floor=round(mine / least, 2), seconds_per_case=round(mine / len(cases), 3)
    )


@cpu_timed
@models
@pytest.mark.parametrize("kind", ["mend", "liveedit"])
def bench_training(benchmark, name, kind):
    """A training step on cached prefixes, against one of whole forwards."""
    from errata.editors.training.loop import train

    _, model, cases = model_and_cases(name)
    trainable = {"mend": mend_course, "liveedit": liveedit_course}[kind](TIMED_EDITORS[kind])
    steps, few = 2, cases[:4]
    config = TrainingConfig(num_steps=steps, batch_size=4, num_validation_cases=0, eval_every=99)
    losses: dict[str, list[float]] = {"kept": [], "whole": []}

    def run(subject, label, config=config):
        train(subject, trainable, few, config, progress=lambda p: losses[label].append(p.loss))

    def spent(subject, label, count):
        run_config = TrainingConfig(
            num_steps=count, batch_size=4, num_validation_cases=0, eval_every=99
        )
        return cpu_seconds(lambda: run(subject, label, run_config))

    run(model, "kept")
    whole_model = whole_forward.without_prefix_reuse(model)
    uncached_config = TrainingConfig(
        num_steps=steps, batch_size=4, num_validation_cases=0, eval_every=99, prefix_cache_bytes=0
    )
    run(whole_model, "whole", uncached_config)
    assert losses["kept"] == pytest.approx(losses["whole"], rel=1e-3)
    found = []
    for _ in range(ROUNDS):
        # of steps alone, prefixes aside: the difference of a longer and a shorter run
        longer, shorter = spent(model, "kept", 1 + 2 * steps), spent(model, "kept", 1)
        slow = cpu_seconds(lambda: run(whole_model, "whole", uncached_config)) / steps
        found.append(((longer - shorter) / (2 * steps), slow))
    kept, slow = (min(pair[k] for pair in found) for k in range(2))
    benchmark.pedantic(lambda: run(model, "kept"), rounds=1)
    benchmark.group = f"training, {name}"
    benchmark.extra_info.update(
        steps_per_second=round(1 / kept, 2), whole_over_kept=round(slow / kept, 2)
    )


@cpu_timed
def bench_growth(benchmark):
    """Cases cost what they cost, however many: seconds per case of 10 and of 160, sequentially."""
    module, model, _ = model_and_cases("blip2")
    evaluation_config, config = evaluation_config_for(module), TIMED_EDITORS["grace"]
    few, many = random_models.cases(10), random_models.cases(160)
    small = statistics.median(
        cpu_seconds(lambda: run_one_editor(model, config, few, evaluation_config)) for _ in range(3)
    )
    benchmark.pedantic(lambda: run_one_editor(model, config, many, evaluation_config), rounds=1)
    large = benchmark.stats.stats.min
    benchmark.group = "growth"
    benchmark.extra_info.update(growth_of_16=round(large / small, 2))
