"""From the words of a settings file to values: models, cases, images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.runs.settings import BenchmarkCases, ModelSettings, WorldCases
from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.queries import Case

if TYPE_CHECKING:
    from errata.functional import Model

__all__ = ["open_cases", "open_model"]

MICRO_PREFIX, TINY_PREFIX = "micro/", "tiny/"


def open_model(settings: ModelSettings) -> Model:
    """Open the model that a settings file or command line names.

    `micro/NAME` is a trained model of the micro zoo, `tiny/NAME` a random one; anything else is a
    folder or a hub id.

    Args:
        settings: Model, dtype, device and template.

    Returns:
        The model.

    Raises:
        InvalidInputError: For NaN weights.
        UnsupportedModelError: For a model that cannot be cut.
    """
    import torch

    from errata import adapters
    from errata.adapters.zoo.micro import load_micro_parts

    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    device = _parse_device(settings.device)
    for start, parts in ((MICRO_PREFIX, load_micro_parts), (TINY_PREFIX, adapters.tiny_model)):
        if settings.id.startswith(start):
            module, processor = parts(settings.id.removeprefix(start))
            module = module.to(device=device, dtype=dtype)
            return adapters.from_module(
                module, processor, template=settings.template, id=settings.id
            )
    return adapters.from_pretrained(
        settings.id,
        dtype=dtype,
        device=device,
        revision=settings.revision or None,
        template=settings.template,
    )


def _parse_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise InvalidSettingsError(
            f"device must be one that torch can use here, e.g. 'cpu' or 'cuda:0'; got {name!r} "
            f"({reason})."
        ) from None
    return device


def open_cases(source: WorldCases | BenchmarkCases) -> list[Case]:
    """Open the cases that a settings file asks for, in order.

    Args:
        source: Cases of the micro world or of a benchmark.

    Returns:
        Cases.

    Raises:
        InvalidInputError: If the source has fewer than `skip` + 1, or a file cannot be read.
    """
    if isinstance(source, WorldCases):
        from errata.bench.data.world.cases import cases

        world_cases = cases(
            source.skip + source.num_cases,
            source.seed,
            split=source.split,
            subjects=source.subjects,
            relations=source.relations,
        )
        return world_cases[source.skip :]
    from errata.bench.data.benchmarks.table import open_cases as read
    from errata.bench.data.reading.benchmark import ReadOptions

    path = Path(source.path)
    if not path.exists():
        raise InvalidInputError(f"cases.path must be an annotation file; there is none at {path}.")
    options = ReadOptions(
        image_root=source.image_root,
        missing_images=source.missing_images,
        invalid_records=source.invalid_records,
        template=source.template,
        clean_rephrases=source.clean_rephrases,
        strip_whitespace=source.strip_whitespace,
        fix_encoding=source.fix_encoding,
        hop=source.hop,
        num_neighbors=source.num_neighbors,
        neighbor_answers=source.neighbor_answers,
        start=source.skip,
    )
    loaded_cases = list(
        islice(read(path, options, benchmark=source.benchmark), source.num_cases or None)
    )
    if not loaded_cases:
        raise InvalidInputError(
            f"{path} must hold cases after the first {source.skip}; it has none."
        )
    return loaded_cases
