"""What a model is, as data: sizes, where its parts are, and a fingerprint.

Where a parameter is used: its names, and whether it runs before the decoder or in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import msgspec

from errata.functional.errors import UnknownSiteError, nearest_names

__all__ = ["BaseModel", "ModelCard", "module_path"]

_FUSED_PARTS = {
    "attn.q": "attn.qkv",
    "attn.k": "attn.qkv",
    "attn.v": "attn.qkv",
    "mlp.gate": "mlp.gate_up",
    "mlp.up": "mlp.gate_up",
}
"""Where a family fuses maps, the part that stands for each of them (as PEFT's `c_attn`)."""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity of a base model, as a delta records it.

    Attributes:
        id: Hub id or name.
        revision: Commit of the hub id.
        family: `config.model_type`.
        config_hash: sha256 of the config in hex.
        parameter_hashes: Names of the parameters the delta depends on, and their sha256 in hex.
    """

    id: str  # hub id or folder name
    revision: str = ""  # commit of the hub snapshot, where known
    family: str = ""  # config.model_type
    config_hash: str = ""  # sha256 of the canonical config
    parameter_hashes: dict[str, str] = {}  # in-memory parameter name -> sha256 of its bytes


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and places of a model in functional form.

    Paths are dotted in-memory names of the Hugging Face module. *Neutral* names are shared by all
    families: `layers.3`, `layers.-1.mlp.down`, `layers.*.attn.q`, `projector`, `vision`, `head`;
    a path below a layer may also be the family's own (`layers.3.mlp.down_proj`).
    """

    family: str
    id: str
    revision: str = ""
    config_hash: str = ""
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int  # longest row the decoder takes, in tokens
    layers: str  # the decoder's list of layers
    head: str  # the language-model head
    norm: str = ""  # the norm before it
    token_embedding: str = ""  # the token embedding
    vision_tower: str = ""  # the vision tower; "" for a text-only decoder
    num_vision_layers: int = 0  # blocks of it that the features are read through; 0: all
    projector: str = ""  # what maps vision features to the decoder (projector, merger, Q-Former)
    part_names: dict[str, str] = {}  # neutral part of a layer -> the family's: {"mlp.down": "fc2"}
    linear_shapes: dict[str, tuple[int, int]] = {}  # path of each linear map -> (out, in)
    transposed: frozenset[str] = frozenset()  # linears that store [in, out] (GPT-2's Conv1D)
    tied: dict[str, str] = {}  # parameter name -> the name under which `params` holds it
    checkpoint_names: dict[
        str, str
    ] = {}  # in-memory parameter name -> checkpoint name, where different
    takes_images: bool = True  # takes images at all
    takes_several_images: bool = True  # takes several images in one row
    takes_videos: bool = False
    stop_ids: tuple[int, ...] = ()  # token ids that end an answer
    activation: str = ""  # of its feed-forward parts, by transformers' name, where the config says

    def resolve_site(self, name: str) -> str:
        """The full path of one site given by neutral or family name.

        Raises UnknownSiteError with the nearest names that exist.

        >>> card = ModelCard(family="llama", id="x", num_layers=2, hidden_size=8, vocab_size=9, max_positions=16,
        ...     layers="model.layers", head="lm_head", part_names={"mlp.down": "mlp.down_proj"})
        >>> card.resolve_site("layers.-1.mlp.down")
        'model.layers.1.mlp.down_proj'
        """  # noqa: E501
        if name in ("vision", "projector", "head", "norm", "embedding"):
            field = {"vision": "vision_tower", "embedding": "token_embedding"}.get(name, name)
            path = getattr(self, field)
            if not path:
                raise UnknownSiteError(
                    f"site {name!r} must exist in the model, and {self.id} has none."
                )
            return path
        if name == "layers" or name.startswith("layers."):
            index, _, part = name.removeprefix("layers.").partition(".")
            if index.lstrip("-").isdigit():
                number = int(index) + (self.num_layers if index.startswith("-") else 0)
                if not 0 <= number < self.num_layers:
                    raise UnknownSiteError(
                        f"site {name!r} names layer {index}, but {self.id} has {self.num_layers}: "
                        f"use 0 to {self.num_layers - 1}, or -1 for the last."
                    )
                part = self.part_names.get(part, part)
                return f"{self.layers}.{number}" + (f".{part}" if part else "")
            raise UnknownSiteError(
                f"site {name!r} must name a layer by number, e.g. 'layers.-1.mlp.down'."
            )
        return name

    def resolve_linear(self, name: str) -> str:
        """Like `site`, for a site that must be a linear map."""
        path = self.resolve_site(name)
        if path not in self.linear_shapes:
            raise UnknownSiteError(
                f"site {name!r} must be a linear map of {self.id}, and {path!r} is none"
                f"{nearest_names(path, self.linear_shapes)}."
            )
        return path

    def match_linears(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Every linear map that a pattern names, in the model's order.

        A pattern is a site with `*` for any layer number ('layers.*.attn.q'), a site by name, a
        glob over full paths, or the last part of a path as PEFT has it ('q_proj'). Raises
        UnknownSiteError listing every pattern that matches nothing.
        """
        matched: set[str] = set()
        missing = []
        for pattern in patterns:
            hits = self._match_pattern(pattern)
            if not hits:
                missing.append(pattern)
            matched |= hits
        if missing:
            last_names = sorted({p.rsplit(".", 1)[-1] for p in self.linear_shapes})
            raise UnknownSiteError(
                f"each target must match a linear map of {self.id}; no match for "
                f"{', '.join(map(repr, missing))}. Parts: {', '.join(sorted(self.part_names))}; "
                f"last names: {', '.join(last_names[:24])}; layers: 0 to {self.num_layers - 1}, "
                "or from -1 down."
            )
        return tuple(path for path in self.linear_shapes if path in matched)

    def _match_pattern(self, pattern: str) -> set[str]:
        if pattern.startswith("layers.*"):
            candidates = [pattern.replace("*", str(i), 1) for i in range(self.num_layers)]
        else:
            candidates = [pattern]
        candidates += [name for group in candidates for name in self._expand_part(group)]
        hits: set[str] = set()
        for name in candidates:
            try:
                path = self.resolve_site(name)
            except UnknownSiteError:
                continue
            hits |= {p for p in self.linear_shapes if p == path or p.startswith(path + ".")}
            if any(c in path for c in "*?["):
                hits |= {p for p in self.linear_shapes if fnmatch.fnmatchcase(p, path)}
        if not hits and "." not in pattern:
            layer_linears = [p for p in self.linear_shapes if p.startswith(self.layers + ".")]
            hits = {p for p in layer_linears if p.rsplit(".", 1)[-1] == pattern}
        return hits

    def _expand_part(self, name: str) -> list[str]:
        """The parts that a name below a layer stands for, where the family has none of that name.

        `layers.3.mlp` is every `mlp.*`; `layers.3.attn.q` is the fused `attn.qkv`.
        """
        layer, _, part = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers.") or part in self.part_names:
            return []
        part_names = [known for known in self.part_names if known.startswith(part + ".")]
        if _FUSED_PARTS.get(part) in self.part_names:
            part_names.append(_FUSED_PARTS[part])
        return [f"layers.{layer}.{known}" for known in part_names]

    def layer_of(self, path: str) -> int | None:
        """The number of the decoder layer a module or parameter path lies in, or None."""
        if not path.startswith(self.layers + "."):
            return None
        return int(path[len(self.layers) + 1 :].partition(".")[0])

    def checkpoint_name(self, name: str) -> str:
        """Return the name of a parameter in the checkpoint."""
        return self.checkpoint_names.get(name, name)

    def canonical_name(self, name: str) -> str:
        """Return the name under which `params` holds a parameter: its target if it is tied."""
        return self.tied.get(name, name)

    def all_names(self, name: str) -> list[str]:
        """List every name of a parameter. A tied one has several."""
        canonical = self.canonical_name(name)
        return [canonical, *(alias for alias, target in self.tied.items() if target == canonical)]

    def in_decoder(self, name: str) -> bool:
        """Whether a module or parameter may run in `decode`.

        Only the vision tower, the projector and the token embedding are known not to.
        """
        return not _is_inside(name, self.vision_tower, self.projector, self.token_embedding)

    def before_decoder(self, name: str) -> bool:
        """Whether a module or parameter may run in `embed`, before the decoder's layers.

        Only layers, final norm and head are known not to. What is unknown (a position embedding,
        a projection after the layers) counts as both before and in the decoder.
        """
        return self.layer_of(name) is None and not _is_inside(name, self.norm, self.head)


def module_path(name: str) -> str:
    """The module that has a parameter."""
    return name.rpartition(".")[0]


def _is_inside(name: str, *roots: str) -> bool:
    return any(root and (name == root or name.startswith(f"{root}.")) for root in roots)
