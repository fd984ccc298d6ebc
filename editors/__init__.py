"""The methods of the field, each a factory of pure functions: settings in, `Editor` out.

`EDITORS` is the only registry. A new method is one file, one line here, and one test file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from errata.editors.finetune import PRESETS as FINETUNE_PRESETS
from errata.editors.finetune import FinetuneConfig, finetune_editor
from errata.editors.grace import PRESETS as GRACE_PRESETS
from errata.editors.grace import GraceConfig, grace_editor
from errata.editors.ike import PRESETS as IKE_PRESETS
from errata.editors.ike import IkeConfig, ike_editor
from errata.editors.liveedit import PRESETS as LIVEEDIT_PRESETS
from errata.editors.liveedit import LiveEditConfig, liveedit_editor
from errata.editors.lora import PRESETS as LORA_PRESETS
from errata.editors.lora import LoraConfig, lora_editor
from errata.editors.mend import PRESETS as MEND_PRESETS
from errata.editors.mend import MendConfig, mend_editor
from errata.editors.serac import PRESETS as SERAC_PRESETS
from errata.editors.serac import SeracConfig, serac_editor
from errata.editors.wise import PRESETS as WISE_PRESETS
from errata.editors.wise import WiseConfig, wise_editor
from errata.functional import Case, Editor
from errata.functional.errors import InvalidSettingsError, unknown_name

__all__ = ["METHODS", "Method", "configure", "make_editor"]


class Method(NamedTuple):
    """One row of the registry."""

    config: type[msgspec.Struct]
    factory: Callable[..., Editor]
    presets: dict[str, Any]
    summary: str


METHODS: dict[str, Method] = {
    "finetune": Method(
        FinetuneConfig,
        finetune_editor,
        FINETUNE_PRESETS,
        "gradient descent on chosen parameters (FT)",
    ),
    "grace": Method(
        GraceConfig,
        grace_editor,
        GRACE_PRESETS,
        "a codebook of activations and their replacements",
    ),
    "ike": Method(
        IkeConfig, ike_editor, IKE_PRESETS, "new facts said before the question, found in a memory"
    ),
    "liveedit": Method(
        LiveEditConfig,
        liveedit_editor,
        LIVEEDIT_PRESETS,
        "trained networks make an expert of each edit, and choose among them by picture and words",
    ),
    "lora": Method(LoraConfig, lora_editor, LORA_PRESETS, "a low-rank change trained on the edit"),
    "mend": Method(
        MendConfig,
        mend_editor,
        MEND_PRESETS,
        "a trained network turns a gradient into an edit",
    ),
    "serac": Method(
        SeracConfig,
        serac_editor,
        SERAC_PRESETS,
        "edits in a memory, a trained classifier of their scope, a small model of what they say",
    ),
    "wise": Method(
        WiseConfig,
        wise_editor,
        WISE_PRESETS,
        "gated side memories of one map, trained on the edits",
    ),
}


def configure(name: str, preset: str = "", **settings: Any) -> msgspec.Struct:
    """The settings of method `name`: a preset's, or the defaults, with `settings` over them.

    Raises BadSettings naming the unknown method, preset or setting, or the value that can not be.

    >>> configure("lora", rank=4).rank
    4
    """
    if name not in METHODS:
        raise InvalidSettingsError(unknown_name("editor", name, METHODS))
    method = METHODS[name]
    faults = []
    if preset and preset not in method.presets:
        faults.append(unknown_name(f"preset of {name}", preset, method.presets).rstrip("."))
        preset = ""
    base = msgspec.to_builtins(method.presets[preset]) if preset else {"type": name}
    fields = {field.name: field.type for field in msgspec.structs.fields(method.config)}
    for key in sorted(settings, key=lambda key: (key in fields, key)):
        if key not in fields:
            faults.append(unknown_name(f"setting of {name}", key, fields).rstrip("."))
            continue
        try:
            msgspec.convert({"type": name, key: settings[key]}, method.config)
        except msgspec.ValidationError as fault:
            faults.append(
                f"{name}.{key} {_expected_values(fault, fields[key])}; got {settings[key]!r}"
            )
    if faults:
        raise InvalidSettingsError("; ".join(faults) + ".")
    return msgspec.convert({**base, **settings}, method.config)


def _expected_values(error: msgspec.ValidationError, field_type: Any) -> str:
    """What must hold: the choices there are, or msgspec's words without backquotes and path."""
    if get_origin(field_type) is Literal:
        return f"must be one of {', '.join(map(str, get_args(field_type)))}"
    text = str(error).split(" - at ")[0].partition(", got")[0].replace("`", "")
    return text.replace("Expected", "must be")


def make_editor(config: msgspec.Struct, cases: Sequence[Case] | None = None) -> Editor:
    """The editor with these settings; `cases` are for a method that shows training cases (IKE).

    >>> make_editor(FinetuneConfig(num_steps=10)).name
    'finetune'
    """
    for method in METHODS.values():
        if type(config) is method.config:
            extra_arguments = (
                {"cases": cases} if cases is not None and method.factory is ike_editor else {}
            )
            return method.factory(config, **extra_arguments)
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise InvalidSettingsError(f"settings must be one of {known}; got {type(config).__name__}.")
