"""Numbers from papers, quoted with their source: to print next to ours, never to test against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

import msgspec

__all__ = ["PublishedResult", "matching_results", "published_results"]


class PublishedResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a paper's table; values are percents, by probe."""

    benchmark: str
    models: tuple[str, ...]  # names a user may have given the same model, the first the paper's
    method: str
    scorer: str
    templates: tuple[str, ...]  # `ReadOptions.template`s that put the same words before the model
    protocol: str
    source: str
    values: Mapping[str, float]
    exact_match: Mapping[str, float] = {}  # the first of an EM/Acc pair


@lru_cache(maxsize=1)
def published_results() -> tuple[PublishedResult, ...]:
    """Every row of `published.toml`: a table gives its setting once, its rows the numbers."""
    text = (
        resources.files("errata.bench.report")
        .joinpath("published.toml")
        .read_text(encoding="utf-8")
    )
    rows = []
    for table in msgspec.toml.decode(text)["table"]:
        shared = ("benchmark", "models", "scorer", "templates", "protocol")
        setting = {name: table[name] for name in shared}
        for method, numbers in table["rows"].items():
            values = dict(zip(table["probes"], numbers, strict=True))
            row = {
                **setting,
                "method": method,
                "source": table["source"],
                "values": {
                    name: _last_value(value) for name, value in values.items() if value != []
                },
                "exact_match": {name: one[0] for name, one in values.items() if _is_pair(one)},
            }
            rows.append(msgspec.convert(row, PublishedResult))
    return tuple(rows)


def _is_pair(value: float | list[float]) -> bool:
    return isinstance(value, list) and len(value) == 2


def _last_value(value: float | list[float]) -> float:
    return value[-1] if isinstance(value, list) else value


def _normalize_name(name: str) -> str:
    return "".join(char for char in name.rsplit("/", 1)[-1].lower() if char.isalnum())


def matching_results(benchmark: str, template: str, model: str) -> list[PublishedResult]:
    """The quoted rows of a benchmark, its prompts and a model, however the model is spelled.

    >>> [row.method for row in matching_results("mmedit-vqa", "easyedit", "Salesforce/blip2-opt-2.7b")][-1]
    'MEND'

    Args:
        benchmark: Name of the benchmark.
        template: Name of the prompt template.
        model: Name of the model.

    Returns:
        Published rows.
    """  # noqa: E501
    name = _normalize_name(model)
    return [
        row
        for row in published_results()
        if row.benchmark == benchmark
        and template in row.templates
        and name in {_normalize_name(one) for one in row.models}
    ]
