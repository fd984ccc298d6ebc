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

__all__ = ["model_files", "open_cases", "open_model", "weights_path"]

MICRO_PREFIX, TINY_PREFIX = "micro/", "tiny/"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
OTHER_SUFFIXES = (".json", ".jinja", ".model", ".txt")


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
        device=None if settings.device_map else device,
        device_map=settings.device_map or None,
        revision=settings.revision or None,
        template=settings.template,
    )


def model_files(settings: ModelSettings) -> tuple[Path, list[Path], list[Path]]:
    """The files that a model is loaded from. A hub id is downloaded first.

    Args:
        settings: The model.

    Returns:
        The folder, the files of its weights, and its other files that are read. No files for
        `tiny/NAME`, whose weights follow from the code.
    """
    from errata.adapters.loading.checkpoint_files import checkpoint_folder
    from errata.adapters.zoo.assets import WEIGHTS

    if settings.id.startswith(TINY_PREFIX):
        return Path(), [], []
    if settings.id.startswith(MICRO_PREFIX):
        folder = WEIGHTS / settings.id.removeprefix(MICRO_PREFIX)
    else:
        folder = checkpoint_folder(settings.id, settings.revision or None)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES]
    other = [path for path in files if path.suffix in OTHER_SUFFIXES]
    return folder, weights, other


def weights_path(editor: str, config: Any, model: ModelSettings) -> Path | None:
    """The file of an editor's trained weights.

    Args:
        editor: Type of the editor.
        config: Its settings.
        model: The model it edits.

    Returns:
        The file. None if the settings name none, or one that is not shipped for this model.
    """
    from errata.editors.common.checkpoint import WEIGHTS

    name = getattr(config, "weights", "")
    if name != "shipped":
        return Path(name) if name else None
    path = WEIGHTS / f"{editor}-{model.id.removeprefix(MICRO_PREFIX)}.safetensors"
    return path if model.id.startswith(MICRO_PREFIX) and path.is_file() else None


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
