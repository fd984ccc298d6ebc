"""The names under which a checkpoint holds a model's parameters.

transformers 5 renames (and sometimes merges) tensors while it loads them. A delta names both the
in-memory name, which `bind` uses, and the checkpoint's, which other tools know.
"""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
)

__all__ = ["map_checkpoint_names"]


def map_checkpoint_names(module: Any) -> dict[str, str]:
    """Map in-memory parameter names to checkpoint names, where they differ.

    Follows what `save_pretrained` does (`revert_weight_conversion`). A parameter that is made of
    several checkpoint tensors (merged experts) has no single name and is left out.

    Args:
        module: The model.

    Returns:
        Checkpoint name by parameter name.
    """
    transforms = getattr(module, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(module, add_legacy=False)
        # Whether a prefix was there can only be known of a model that was loaded.
        transforms = [t for t in transforms if not isinstance(t, PrefixChange)]
    reversed_transforms = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [t for t in reversed_transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in reversed_transforms if isinstance(t, WeightConverter)]
    names = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        converted = apply_converters(name, converters)[1] if converters else None
        if converted is None:
            checkpoint_name = apply_renamings(name, renamings)
            if checkpoint_name != name:
                names[name] = checkpoint_name
    return names
