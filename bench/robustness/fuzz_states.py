"""Mutated files of trained weights and of sequences: refused, or read as what they say."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils import _pytree as pytree

from errata import adapters
from errata.bench.robustness.fuzz_delta import FuzzReport
from errata.bench.robustness.mutations import MALICIOUS_VALUES, flip_bits
from errata.bench.robustness.samples import SAMPLE_EDITORS
from errata.bench.storage import checkpoint as sequences
from errata.editors import configure, make_editor
from errata.editors.common import checkpoint as weights
from errata.functional import Query
from errata.functional.errors import ErrataError

__all__ = ["fuzz_states"]


class _File(NamedTuple):
    raw: bytes
    read: Callable[[Path], Any]  # None for a refused sequence
    want: Any


def fuzz_states(num_files: int, seed: int = 0) -> FuzzReport:
    """Read mutated files of trained weights (MEND, SERAC, LiveEdit) and of sequences of edits.

    Args:
        num_files: Files.
        seed: Seed.

    Returns:
        What was refused, loaded and found.
    """
    draw = random.Random(seed)
    report = FuzzReport(Counter(), Counter(), 0.0, [])
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "state.safetensors"
        files = _originals(path)
        for number in range(num_files):
            name = draw.choice(sorted(files))
            file = files[name]
            path.write_bytes(_mutated(file.raw, draw))
            spent = time.process_time()
            fault = ""
            try:
                got = file.read(path)
            except ErrataError as error:
                report.refused[name] += 1
                fault = "" if len(str(error)) <= 2000 else "too long an error"
            except BaseException as error:  # noqa: BLE001 - anything else is a finding
                fault = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                (report.refused if got is None else report.loaded)[name] += 1
                if got is not None and not _equal(got, file.want):
                    fault = "other values were read"
            seconds = time.process_time() - spent
            slowest = max(slowest, seconds)
            if seconds > 1:
                fault = f"took {seconds:.2f} s of processor time"
            if fault:
                report.findings.append(f"state {number} of seed {seed} ({name}): {fault}")
    return report._replace(slowest=slowest)


def _originals(path: Path) -> dict[str, _File]:
    model = adapters.from_module(*adapters.tiny_model("llava"))
    image = Image.new("RGB", (32, 32), (200, 40, 60))
    query = Query("who is it?", "bo", image)
    files = {}
    for name, settings in SAMPLE_EDITORS.items():
        editor = make_editor(configure(name, **settings))
        state = editor.init(model, torch.Generator().manual_seed(0))
        if name in ("mend", "serac", "liveedit"):
            tree = {"mend": "weights", "serac": "network", "liveedit": "networks"}[name]
            part = getattr(state, tree)
            weights.save_checkpoint(path, part, {"editor": name})
            files[f"weights of {name}"] = _File(
                path.read_bytes(),
                lambda p, part=part, name=name: weights.load_checkpoint(p, part, {"editor": name}),
                part,
            )
        delta, after = editor.edit(model, state, [query])
        try:
            sequences.save_checkpoint(path, "run", sequences.SequenceCheckpoint(1, after, delta))
        except TypeError:  # a state that is not written
            continue
        files[f"sequence of {name}"] = _File(
            path.read_bytes(),
            lambda p, fresh=state: sequences.load_checkpoint(p, "run", fresh, torch.device("cpu")),
            sequences.SequenceCheckpoint(1, after, delta),
        )
    return files


def _mutated(raw: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(6)
    size = int.from_bytes(raw[:8], "little")
    if way == 0:
        return flip_bits(raw, draw)
    if way == 1:
        return raw[: draw.randrange(len(raw))]
    if way == 2:
        at = draw.randrange(8 + size)
        return raw[:at] + draw.randbytes(draw.randint(1, 16)) + raw[at + draw.randint(1, 16) :]
    if way == 3:
        return raw[:8] + bytes(flip_bits(raw[8 : 8 + size], draw)) + raw[8 + size :]
    # forge a number or a name in the text: the length stays right, so the loader reads on
    text = raw[8 : 8 + size].decode("utf-8", "replace")
    old = draw.choice(
        ['"F32"', '"I64"', '"tensor"', '"plain"', '"dict"', '"fields"', '"order"', "0", "1", "8"]
    )
    new = str(draw.choice([*MALICIOUS_VALUES, '"BOOL"', '"F64"', '"x"']))
    forged = text.replace(old, new, draw.randint(1, 3)).encode("utf-8", "replace")
    return len(forged).to_bytes(8, "little") + forged + raw[8 + size :]


def _equal(one: Any, two: Any) -> bool:
    """Whether two states have the same tensors, bit for bit."""
    first, second = (
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        for tree in (one, two)
    )
    return len(first) == len(second) and all(map(torch.equal, first, second))
