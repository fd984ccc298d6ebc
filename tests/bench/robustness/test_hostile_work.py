"""Kills, odd images and hostile settings, briefly: the long run is `errata.bench.robustness`."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies

from errata.bench.robustness.crash_runs import kill_and_swap
from errata.bench.robustness.fuzz_inputs import fuzz_images, fuzz_settings
from errata.bench.robustness.fuzz_states import fuzz_states
from errata.bench.runs.settings_file import parse_settings
from errata.bench.storage.log_records import DamagedLogWarning
from errata.bench.storage.results_log import read_rows
from errata.functional.errors import ErrataError


def test_a_run_killed_with_its_weights_swapped_once_ends_with_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    outcome = kill_and_swap(tmp_path, num_cases=24, kills=4)
    assert outcome.same
    assert outcome.kills >= 2


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged metadata
@pytest.mark.parametrize(
    ("fuzz", "count"), [(fuzz_images, 300), (fuzz_settings, 150), (fuzz_states, 300)]
)
def test_hostile_inputs_are_read_or_refused_in_a_sentence(fuzz, count):
    report = fuzz(count, seed=3)
    assert report.findings == []
    assert sum(report.refused.values())
    assert sum(report.loaded.values())


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(strategies.text() | strategies.binary().map(lambda raw: raw.decode("utf-8", "replace")))
def test_any_text_is_settings_or_refused(text):
    with pytest.raises(ErrataError) as refused:
        parse_settings(text)
    assert len(str(refused.value)) <= 2000


ROW = (
    '{"kind":"unit"}',
    '{"kind":"void","leg":"a/b/c","units":[0]}',
    "{",
    "",
    "\x00",
    '{"kind":"unit","leg":"a/b/single","unit":-1}',
)


@settings(max_examples=150, deadline=None)
@given(lines=strategies.lists(strategies.sampled_from(ROW) | VALUES.map(json.dumps), max_size=8))
def test_any_log_gives_its_good_rows_or_a_sentence(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("log")
    for name in ("results.jsonl", "progress.jsonl"):
        (folder / name).write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refusal = ""
        try:
            read_rows(folder)
        except ErrataError as error:
            refusal = str(error)
    assert len(refusal) <= 2000
    assert {one.category for one in caught} <= {DamagedLogWarning}
