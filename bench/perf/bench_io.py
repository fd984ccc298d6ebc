"""Delta files: saving, loading, looking, merging and taking an edit out again.

A lifelong edit of a thousand rank-one changes in five layers, as MEMIT leaves it, at a quarter of a
7B model's width. Run `pytest bench/perf/bench_io.py`.
"""

from __future__ import annotations

import pytest
import torch

from errata.functional import Base, Delta, EditRecord, Header, LowRank, load, merge, remove, save
from errata.functional.peek import peek

WIDE, TALL, LAYERS = 2752, 1024, 5


def edits(count: int, first: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(first)
    entries = tuple(
        LowRank(
            name=f"model.layers.{layer}.mlp.down_proj.weight",
            checkpoint=f"model.layers.{layer}.mlp.down_proj.weight",
            shape=(TALL, WIDE),
            rank=count,
            rows=(1,) * count,
        )
        for layer in range(LAYERS)
    )
    records = tuple(EditRecord(id=str(first + n), prompt=f"{first + n:064x}") for n in range(count))
    header = Header(base=Base(id="someone/model"), entries=entries, edits=records)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, (_, shape) in header.tensors().items()
    }
    return Delta(header, tensors)


@pytest.fixture(scope="module")
def thousand() -> Delta:
    return edits(1000)


@pytest.fixture(scope="module")
def path(thousand, tmp_path_factory):
    file = tmp_path_factory.mktemp("deltas") / "thousand.safetensors"
    save(file, thousand)
    return file


def same(a: Delta, b: Delta) -> bool:
    return a.header == b.header and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def bench_save(benchmark, thousand, tmp_path):
    benchmark(save, tmp_path / "x.safetensors", thousand)
    assert same(load(tmp_path / "x.safetensors"), thousand)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "mapped only"])
def bench_load(benchmark, thousand, path, verify):
    assert same(benchmark(load, path, verify=verify), thousand)


def bench_peek(benchmark, thousand, path):
    assert benchmark(peek, path).header == thousand.header


def bench_merge(benchmark):
    fifty = [edits(20, 20 * n) for n in range(50)]
    merged = benchmark(merge, *fifty)
    assert [edit.id for edit in merged.header.edits] == [str(n) for n in range(1000)]


def bench_remove(benchmark, thousand):
    left = benchmark(remove, thousand, ["500"])
    assert left.header.entries[0].rank == 999
    assert same(remove(left, range(1, 999)), remove(thousand, range(1, 1000)))
