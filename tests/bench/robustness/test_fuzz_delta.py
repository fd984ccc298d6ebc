"""The short form of the fuzzing run; the long one is `python -m
errata.bench.robustness.fuzz_delta`."""

from __future__ import annotations

import random

import pytest

from errata.bench.robustness.fuzz_delta import fuzz
from errata.bench.robustness.fuzz_folders import fuzz_folders
from errata.bench.robustness.mutations import MUTATIONS, split_file, with_valid_digest
from errata.bench.robustness.samples import sample
from errata.functional import load_delta, save_delta


def test_hostile_files_are_refused_or_are_what_they_say(tmp_path):
    outcome = fuzz(1200, seed=7, folder=tmp_path, limit_memory=False)
    assert not outcome.findings, "\n".join(outcome.findings[:5])
    assert set(outcome.refused) == set(MUTATIONS)
    assert sum(outcome.refused.values()) + sum(outcome.loaded.values()) == 1200


def test_hostile_adapters_and_checkpoints_are_refused_or_read_right(tmp_path):
    outcome = fuzz_folders(150, seed=3, folder=tmp_path)
    assert not outcome.findings, "\n".join(outcome.findings[:5])
    assert set(outcome.refused) == {"adapter", "checkpoint"}


@pytest.mark.parametrize("kind", sorted(MUTATIONS))
def test_each_mutation_changes_the_file(tmp_path, kind):
    save_delta(tmp_path / "x", sample(0))
    raw = (tmp_path / "x").read_bytes()
    assert any(MUTATIONS[kind](raw, random.Random(seed)) != raw for seed in range(5))


def test_a_forged_file_can_be_signed_so_that_only_its_content_is_judged(tmp_path):
    save_delta(tmp_path / "x", sample(0))
    file = split_file((tmp_path / "x").read_bytes())
    file.metadata["editor"] = "forged"
    (tmp_path / "y").write_bytes(with_valid_digest(file))
    assert load_delta(tmp_path / "y").header.editor == "forged"
