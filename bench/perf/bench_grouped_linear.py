"""One matrix per edit: rows grouped by edit, against gathering a matrix per row.

Run `pytest bench/perf/bench_grouped_linear.py`. Sizes are those of FT's last MLP on a decoder of
width 768 with two to four scored tokens per row; "mixed" rows come in any order, two per edit.
"""

import pytest
import torch

from errata.functional.forward.grouped_linear import grouped_linear

EDITS, OUT, IN, TOKENS = 16, 768, 3072, 4
ROWS = {
    "in-order": torch.arange(EDITS),
    "mixed": torch.randperm(2 * EDITS, generator=torch.Generator().manual_seed(0)) % EDITS,
}


def gathered_bmm(x, maps, edit_index):
    """The definition: copies a matrix per row."""
    return torch.bmm(x, maps[edit_index].mT)


PROVIDERS = {"grouped": grouped_linear, "gathered": gathered_bmm}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("way", ["forward", "backward"])
def bench_grouped_linear(benchmark, way, provider, rows):
    generator = torch.Generator().manual_seed(0)
    edit_index = ROWS[rows]
    x = torch.randn(len(edit_index), TOKENS, IN, generator=generator)
    maps = torch.randn(EDITS, OUT, IN, generator=generator)

    def run(product):
        if way == "forward":
            return product(x, maps, edit_index)
        return torch.func.grad(lambda m: product(x, m, edit_index).square().sum())(maps)

    benchmark.group = f"{way}-{rows}"
    got = benchmark.pedantic(run, (PROVIDERS[provider],), rounds=5, warmup_rounds=1)
    torch.testing.assert_close(got, run(gathered_bmm), rtol=1e-4, atol=1e-2)
