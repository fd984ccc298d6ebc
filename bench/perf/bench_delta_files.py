"""Delta files: saving, loading, looking, merging and taking an edit out again.

A lifelong edit of a thousand rank-one changes in five layers, as MEMIT leaves it, at a quarter of a
7B model's width. Run `pytest bench/perf/bench_delta_files.py`.
"""

from __future__ import annotations

import pytest
import torch

from errata.functional import (
    BaseModel,
    Delta,
    EditRecord,
    Header,
    load_delta,
    merge,
    remove,
    save_delta,
)
from errata.functional.deltas.inspection import inspect_delta
from errata.functional.kinds.schema import LowRank

WIDE, TALL, LAYERS = 2752, 1024, 5


def make_delta(count: int, first: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(first)
    entries = tuple(
        LowRank(
            name=f"model.layers.{layer}.mlp.down_proj.weight",
            checkpoint_name=f"model.layers.{layer}.mlp.down_proj.weight",
            shape=(TALL, WIDE),
            rank=count,
            edit_ranks=(1,) * count,
        )
        for layer in range(LAYERS)
    )
    records = tuple(EditRecord(id=str(first + n), prompt=f"{first + n:064x}") for n in range(count))
    header = Header(base=BaseModel(id="someone/model"), entries=entries, edits=records)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, (_, shape) in header.tensor_specs().items()
    }
    return Delta(header, tensors)


@pytest.fixture(scope="module")
def thousand() -> Delta:
    return make_delta(1000)


@pytest.fixture(scope="module")
def path(thousand, tmp_path_factory):
    file = tmp_path_factory.mktemp("deltas") / "thousand.safetensors"
    save_delta(file, thousand)
    return file


def equal_deltas(a: Delta, b: Delta) -> bool:
    return a.header == b.header and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def bench_save(benchmark, thousand, tmp_path):
    benchmark(save_delta, tmp_path / "x.safetensors", thousand)
    assert equal_deltas(load_delta(tmp_path / "x.safetensors"), thousand)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "mapped only"])
def bench_load(benchmark, thousand, path, verify):
    assert equal_deltas(benchmark(load_delta, path, verify=verify), thousand)


def bench_inspect(benchmark, thousand, path):
    assert benchmark(inspect_delta, path).header == thousand.header


def bench_merge(benchmark):
    fifty = [make_delta(20, 20 * n) for n in range(50)]
    merged = benchmark(merge, *fifty)
    assert [edit.id for edit in merged.header.edits] == [str(n) for n in range(1000)]


def bench_remove(benchmark, thousand):
    left = benchmark(remove, thousand, ["500"])
    assert left.header.entries[0].rank == 999
    assert equal_deltas(remove(left, range(1, 999)), remove(thousand, range(1, 1000)))
