"""What a model is, as data: sizes, where its parts are, and a fingerprint."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

import msgspec

from .errors import UnknownSite

__all__ = ["Base", "ModelCard"]

_FUSED = {
    "attn.q": "attn.qkv",
    "attn.k": "attn.qkv",
    "attn.v": "attn.qkv",
    "mlp.gate": "mlp.gate_up",
    "mlp.up": "mlp.gate_up",
}
"""Where a family fuses maps, the part that stands for each of them (as PEFT's `c_attn`)."""


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity of a base model, as a delta records it."""

    id: str  # hub id or folder name
    revision: str = ""  # commit of the hub snapshot, where known
    family: str = ""  # config.model_type
    config: str = ""  # sha256 of the canonical config
    touched: dict[str, str] = {}  # in-memory parameter name -> sha256 of its bytes


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and places of a model in functional form.

    Paths are dotted in-memory names of the Hugging Face module. *Neutral* names are shared by all
    families: `layers.3`, `layers.-1.mlp.down`, `layers.*.attn.q`, `projector`, `vision`, `head`;
    a path below a layer may also be the family's own (`layers.3.mlp.down_proj`).
    """

    family: str
    id: str
    revision: str = ""
    config: str = ""
    num_layers: int
    width: int
    vocab: int
    context: int  # longest row the decoder takes, in tokens
    layers: str  # the decoder's list of layers
    head: str  # the language-model head
    norm: str = ""  # the norm before it
    tokens: str = ""  # the token embedding
    vision: str = ""  # the vision tower; "" for a text-only decoder
    vision_depth: int = 0  # blocks of it that the features are read through; 0: all
    projector: str = ""  # what maps vision features to the decoder (projector, merger, Q-Former)
    parts: dict[str, str] = {}  # neutral part of a layer -> the family's: {"mlp.down": "fc2"}
    linears: dict[str, tuple[int, int]] = {}  # path of each linear map -> (out, in)
    transposed: frozenset[str] = frozenset()  # linears that store [in, out] (GPT-2's Conv1D)
    ties: dict[str, str] = {}  # parameter name -> the name under which `params` holds it
    checkpoint: dict[str, str] = {}  # in-memory parameter name -> checkpoint name, where different
    images: bool = True  # takes images at all
    several: bool = True  # takes several images in one row
    videos: bool = False
    stop: tuple[int, ...] = ()  # token ids that end an answer
    activation: str = ""  # of its feed-forward parts, by transformers' name, where the config says

    def site(self, name: str) -> str:
        """The full path of one site given by neutral or family name.

        Raises UnknownSite with the nearest names that exist.

        >>> card = ModelCard(family="llama", id="x", num_layers=2, width=8, vocab=9, context=16,
        ...     layers="model.layers", head="lm_head", parts={"mlp.down": "mlp.down_proj"})
        >>> card.site("layers.-1.mlp.down")
        'model.layers.1.mlp.down_proj'
        """
        if name in ("vision", "projector", "head", "norm", "tokens"):
            path = getattr(self, name)
            if not path:
                raise UnknownSite(f"site {name!r} must exist in the model, and {self.id} has none.")
            return path
        if name == "layers" or name.startswith("layers."):
            index, _, part = name.removeprefix("layers.").partition(".")
            if index.lstrip("-").isdigit():
                number = int(index) + (self.num_layers if index.startswith("-") else 0)
                if not 0 <= number < self.num_layers:
                    raise UnknownSite(
                        f"site {name!r} names layer {index}, but {self.id} has {self.num_layers}: "
                        f"use 0 to {self.num_layers - 1}, or -1 for the last."
                    )
                part = self.parts.get(part, part)
                return f"{self.layers}.{number}" + (f".{part}" if part else "")
            raise UnknownSite(
                f"site {name!r} must name a layer by number, e.g. 'layers.-1.mlp.down'."
            )
        return name

    def linear(self, name: str) -> str:
        """Like `site`, for a site that must be a linear map."""
        path = self.site(name)
        if path not in self.linears:
            near = difflib.get_close_matches(path, self.linears, n=3)
            raise UnknownSite(
                f"site {name!r} must be a linear map of {self.id}, and {path!r} is none"
                + (f"; near: {', '.join(near)}." if near else ".")
            )
        return path

    def match(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Every linear map that a pattern names, in the model's order.

        A pattern is a site with `*` for any layer number ('layers.*.attn.q'), a site by name, a
        glob over full paths, or the last part of a path as PEFT has it ('q_proj'). Raises
        UnknownSite listing every pattern that matches nothing.
        """
        found: set[str] = set()
        missing = []
        for pattern in patterns:
            hits = self._hits(pattern)
            if not hits:
                missing.append(pattern)
            found |= hits
        if missing:
            near = sorted({p.rsplit(".", 1)[-1] for p in self.linears})
            raise UnknownSite(
                f"each target must match a linear map of {self.id}; no match for "
                f"{', '.join(map(repr, missing))}. Parts: {', '.join(sorted(self.parts))}; "
                f"last names: {', '.join(near[:24])}; layers: 0 to {self.num_layers - 1}, "
                "or from -1 down."
            )
        return tuple(path for path in self.linears if path in found)

    def _hits(self, pattern: str) -> set[str]:
        if pattern.startswith("layers.*"):
            tries = [pattern.replace("*", str(i), 1) for i in range(self.num_layers)]
        else:
            tries = [pattern]
        tries += [name for group in tries for name in self._grouped(group)]
        hits: set[str] = set()
        for name in tries:
            try:
                path = self.site(name)
            except UnknownSite:
                continue
            hits |= {p for p in self.linears if p == path or p.startswith(path + ".")}
            if any(c in path for c in "*?["):
                hits |= {p for p in self.linears if fnmatch.fnmatchcase(p, path)}
        if not hits and "." not in pattern:
            inside = [p for p in self.linears if p.startswith(self.layers + ".")]
            hits = {p for p in inside if p.rsplit(".", 1)[-1] == pattern}
        return hits

    def _grouped(self, name: str) -> list[str]:
        """The parts that a name below a layer stands for, where the family has none of that name.

        `layers.3.mlp` is every `mlp.*`; `layers.3.attn.q` is the fused `attn.qkv`.
        """
        layer, _, part = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers.") or part in self.parts:
            return []
        inside = [known for known in self.parts if known.startswith(part + ".")]
        if _FUSED.get(part) in self.parts:
            inside.append(_FUSED[part])
        return [f"layers.{layer}.{known}" for known in inside]

    def layer_of(self, path: str) -> int | None:
        """The number of the decoder layer a module or parameter path lies in, or None."""
        if not path.startswith(self.layers + "."):
            return None
        return int(path[len(self.layers) + 1 :].partition(".")[0])
