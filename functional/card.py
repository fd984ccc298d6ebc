"""A model as data: sizes, module paths, parameter names, and a fingerprint."""

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
"""Part of a layer -> the part that contains it if a family fuses them (as PEFT's `c_attn`)."""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity of a base model, as a delta records it.

    Attributes:
        id: Hub id or folder name.
        revision: Commit of the hub snapshot, "" if unknown.
        family: `config.model_type`.
        config_hash: sha256 of the canonical config in hex.
        parameter_hashes: In-memory name of each parameter the delta depends on -> sha256 of its
            bytes in hex.
    """

    id: str
    revision: str = ""
    family: str = ""
    config_hash: str = ""
    parameter_hashes: dict[str, str] = {}


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a model, and the paths of its modules.

    Paths are dotted in-memory names of the Hugging Face module. *Neutral* names are shared by all
    families: `layers.3`, `layers.-1.mlp.down`, `layers.*.attn.q`, `projector`, `vision`, `head`.
    A path below a layer may also be the family's own (`layers.3.mlp.down_proj`).

    Attributes:
        family: `config.model_type`.
        id: Hub id or folder name.
        revision: Commit of the hub snapshot, "" if unknown.
        config_hash: sha256 of the canonical config in hex.
        num_layers: Decoder layers.
        hidden_size: Width of the decoder.
        vocab_size: Tokens in the vocabulary.
        max_positions: Longest row the decoder takes, in tokens.
        layers: Path of the decoder's list of layers.
        head: Path of the language-model head.
        norm: Path of the norm before the head.
        token_embedding: Path of the token embedding.
        vision_tower: Path of the vision tower, "" for a text-only decoder.
        num_vision_layers: Blocks of the vision tower below its features; 0 for all.
        projector: Path of the module that maps vision features to the decoder (projector, merger,
            Q-Former).
        part_names: Neutral part of a layer -> the family's, as {"mlp.down": "fc2"}.
        linear_shapes: Path of each linear map -> (out, in).
        transposed: Linears that store [in, out] (GPT-2's Conv1D).
        tied: Parameter name -> the name under which `params` holds it.
        checkpoint_names: In-memory parameter name -> checkpoint name, if they differ.
        takes_images: Whether a row may have an image.
        takes_several_images: Whether a row may have several images.
        takes_videos: Whether a row may have a video.
        stop_ids: Token ids that end an answer.
        activation: Activation of the feed-forward parts by transformers' name, "" if the config
            does
            not give it.
    """

    family: str
    id: str
    revision: str = ""
    config_hash: str = ""
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: str
    head: str
    norm: str = ""
    token_embedding: str = ""
    vision_tower: str = ""
    num_vision_layers: int = 0
    projector: str = ""
    part_names: dict[str, str] = {}
    linear_shapes: dict[str, tuple[int, int]] = {}
    transposed: frozenset[str] = frozenset()
    tied: dict[str, str] = {}
    checkpoint_names: dict[str, str] = {}
    takes_images: bool = True
    takes_several_images: bool = True
    takes_videos: bool = False
    stop_ids: tuple[int, ...] = ()
    activation: str = ""

    def resolve_site(self, name: str) -> str:
        """Resolve a neutral or family name of a site to its full path.

        Args:
            name: A neutral name, as 'layers.-1.mlp.down', or a full path, which is returned as it
                is.

        Returns:
            The path. It need not exist if `name` is a path or a family's own part.

        Raises:
            UnknownSiteError: If the model has no such site or layer.

        Example:
            >>> card = ModelCard(
            ...     family="llama", id="x", num_layers=2, hidden_size=8, vocab_size=9,
            ...     max_positions=16, layers="model.layers", head="lm_head",
            ...     part_names={"mlp.down": "mlp.down_proj"},
            ... )
            >>> card.resolve_site("layers.-1.mlp.down")
            'model.layers.1.mlp.down_proj'
        """
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
        """Resolve a site as `resolve_site` does, and check that it is a linear map.

        Args:
            name: A neutral name or a full path.

        Returns:
            The path of a linear map.

        Raises:
            UnknownSiteError: If the site is not a linear map of the model.
        """
        path = self.resolve_site(name)
        if path not in self.linear_shapes:
            raise UnknownSiteError(
                f"site {name!r} must be a linear map of {self.id}, and {path!r} is none"
                f"{nearest_names(path, self.linear_shapes)}."
            )
        return path

    def match_linears(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """List the linear maps that patterns match.

        Args:
            patterns: Each is a site with `*` for any layer number ('layers.*.attn.q'), a site by
                name, a
                glob over full paths, or the last part of a path as in PEFT ('q_proj').

        Returns:
            The paths, in the model's order.

        Raises:
            UnknownSiteError: If a pattern matches nothing. Lists every such pattern.
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
        """Return the parts that a name below a layer contains, or the fused part that contains it.

        `layers.3.mlp` is every `mlp.*`. `layers.3.attn.q` is the fused `attn.qkv`. A part that the
        family has by that name returns nothing.
        """
        layer, _, part = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers.") or part in self.part_names:
            return []
        part_names = [known for known in self.part_names if known.startswith(part + ".")]
        if _FUSED_PARTS.get(part) in self.part_names:
            part_names.append(_FUSED_PARTS[part])
        return [f"layers.{layer}.{known}" for known in part_names]

    def layer_of(self, path: str) -> int | None:
        """Return the number of the decoder layer that contains a module or parameter.

        Args:
            path: Path of the module or parameter.

        Returns:
            The number from 0, or None outside the layers.
        """
        if not path.startswith(self.layers + "."):
            return None
        return int(path[len(self.layers) + 1 :].partition(".")[0])

    def checkpoint_name(self, name: str) -> str:
        """Return the name of a parameter in the checkpoint.

        Args:
            name: In-memory name.

        Returns:
            The checkpoint's name; the same name by default.
        """
        return self.checkpoint_names.get(name, name)

    def canonical_name(self, name: str) -> str:
        """Return the name under which `params` holds a parameter: its target if it is tied.

        Args:
            name: In-memory name.

        Returns:
            The key in `params`.
        """
        return self.tied.get(name, name)

    def all_names(self, name: str) -> list[str]:
        """List every name of a parameter. A tied one has several.

        Args:
            name: Any in-memory name of it.

        Returns:
            The key in `params`, then the other names.
        """
        canonical = self.canonical_name(name)
        return [canonical, *(alias for alias, target in self.tied.items() if target == canonical)]

    def in_decoder(self, name: str) -> bool:
        """Whether a module or parameter may run in `decode`.

        Only the vision tower, the projector and the token embedding are known not to.

        Args:
            name: Path of the module or parameter.

        Returns:
            False if it is known not to.
        """
        return not _is_inside(name, self.vision_tower, self.projector, self.token_embedding)

    def before_decoder(self, name: str) -> bool:
        """Whether a module or parameter may run in `embed`, before the decoder's layers.

        Only layers, final norm and head are known not to. An unknown module (a position embedding,
        a projection after the layers) counts as both before and in the decoder.

        Args:
            name: Path of the module or parameter.

        Returns:
            False if it is known not to.
        """
        return self.layer_of(name) is None and not _is_inside(name, self.norm, self.head)


def module_path(name: str) -> str:
    """Return the path of the module that has a parameter.

    Args:
        name: Path of the parameter.

    Returns:
        The path without its last part.
    """
    return name.rpartition(".")[0]


def _is_inside(name: str, *roots: str) -> bool:
    return any(root and (name == root or name.startswith(f"{root}.")) for root in roots)
