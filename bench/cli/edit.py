"""The commands on one query: `errata edit`, `errata generate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cli.options import _format_file_size
from errata.functional.errors import InvalidInputError, InvalidSettingsError

if TYPE_CHECKING:
    from errata.functional import Model, Query
    from errata.functional.forward.generation import Sampling


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="micro/NAME, a folder, or a hub id")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda:0")
    parser.add_argument("--device-map", default="", help="auto, or another of accelerate's")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub id")
    parser.add_argument("--template", default="default", help="prompt template")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, help="sample; without these: the likeliest")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest of this mass")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def _add_query_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--prompt", required=True, help="the question")


def _edit(options: argparse.Namespace) -> None:
    import torch

    from errata import editors
    from errata.bench.data.demonstrations import demonstration_cases
    from errata.bench.evaluation.batching import check_finite
    from errata.functional.binding.bound_model import bind
    from errata.functional.deltas import serialization as io
    from errata.functional.metrics.readout import read_out

    config = editors.configure(
        options.editor, options.preset, **_parse_assignments(options.settings)
    )
    editor = editors.make_editor(config, demonstration_cases(config))
    if not options.target.strip():
        raise InvalidInputError("--target must say the answer wanted; it is empty.")
    query = _make_query(options, options.target)
    model = _open_model(options)
    check_finite(model, read_out(model, model.preprocess([query])))
    state = editor.init(model, torch.Generator().manual_seed(options.seed))
    delta, _ = editor.edit(model, state, [query])
    texts = [
        " ".join(_generate_printable(one, query).split()) for one in (model, bind(model, delta))
    ]
    io.save_delta(options.output, delta)
    print(
        f"before: {texts[0]}\nafter:  {texts[1]}\n{options.output}: "
        f"{_format_file_size(options.output)}"
    )


def _generate(options: argparse.Namespace) -> None:
    from errata.functional.binding.bound_model import bind
    from errata.functional.deltas import serialization as io
    from errata.functional.forward.generation import Sampling

    if options.max_new_tokens < 1:
        raise InvalidInputError(
            f"--max-new-tokens must be at least 1; got {options.max_new_tokens}."
        )
    if options.compare_base and not options.delta:
        raise InvalidInputError("--compare-base compares with an edit: name one by --delta FILE.")
    given = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = Sampling(**given) if given else None
    query = _make_query(options, "")
    deltas = [io.load_delta(path) for path in options.delta]
    base = model = _open_model(options)
    for delta in deltas:
        model = bind(model, delta)
    models = [base, model] if options.compare_base else [model]
    answers = [
        _generate_printable(one, query, options.max_new_tokens, sampling, options.seed)
        for one in models
    ]
    if options.compare_base:
        print(f"base:   {answers[0]}\nedited: {answers[1]}")
    else:
        print(answers[0])


def _open_model(options: argparse.Namespace) -> Model:
    from errata.bench.runs.settings import ModelSettings
    from errata.bench.runs.sources import open_model

    return open_model(
        ModelSettings(
            id=options.model,
            dtype=options.dtype,
            device=options.device,
            device_map=options.device_map,
            revision=options.revision,
            template=options.template,
        )
    )


def _make_query(options: argparse.Namespace, target: str) -> Query:
    """Make the query of the options. Opens the images before a model is loaded, to fail early."""
    from errata.adapters.inputs.images import open_image
    from errata.functional import Query

    if not options.prompt.strip():
        raise InvalidInputError("--prompt must ask something; it is empty.")
    return Query(options.prompt, target, tuple(map(open_image, options.image)))


def _generate_printable(
    model: Model,
    query: Query,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> str:
    import torch

    from errata.functional.forward.generation import generate

    max_room = (
        model.card.max_positions - model.preprocess([query._replace(target="")]).input_ids.shape[1]
    )
    device = next(iter(model.params.values())).device
    (text,) = generate(
        model,
        [query],
        max(1, min(max_new_tokens, max_room)),
        sampling=sampling,
        generator=torch.Generator(device).manual_seed(seed),
    )
    text = text.strip()
    # generated text may contain terminal control codes
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _parse_assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `--set key=value`. Values are TOML; a value that is not TOML is text."""
    import tomllib

    settings: dict[str, Any] = {}
    faults = []
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (sign and key.strip()):
            faults.append(f"--set must be KEY=VALUE, got {pair!r}")
            continue
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            settings[key.strip()] = value
    if faults:
        raise InvalidSettingsError("; ".join(faults) + ".")
    return settings
