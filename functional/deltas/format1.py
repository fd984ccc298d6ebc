"""Read delta files of format 1: one table of renamed keys and tensors per kind. No torch.

A file of format 1 is checked under its own rules: canonical JSON, and a digest over the text and
the tensor names it was written with. Then its keys and tensors are renamed. Tensors keep their
bytes, so a converted delta gives bit-equal logits. Saved again, it is a file of format 2 with a
new digest. This reader will be removed in release 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["StoredNames", "convert_description", "rename_tensors"]

DESCRIPTION = {"form": "arithmetic", "recursive": "order_dependent"}
BASE = {"config": "config_hash", "touched": "parameter_hashes"}
ENTRY = {"checkpoint": "checkpoint_name", "owners": "edit_slots"}
KEYS: Mapping[str, Mapping[str, str]] = {
    "dense": {},
    "lowrank": {"rows": "edit_ranks"},
    "codebook": {"where": "replacement"},
    "masked": {"counts": "num_values", "statistic": "gate_statistic"},
    "experts": {
        "hidden": "hidden_size",
        "slots": "num_query_tokens",
        "width": "feature_dim",
        "heads": "num_heads",
        "sentinel": "num_sentinel_tokens",
        "sentinel_text": "num_text_sentinel_tokens",
        "blend": "routing_input",
        "most": "top_k",
    },
    "prompt": {
        "width": "key_size",
        "most": "max_facts",
        "ask": "question_template",
        "look": "image_key_size",
        "least": "min_similarity",
        "least_look": "min_image_similarity",
        "k": "num_demonstrations",
        "by": "demonstration_key",
        "order": "demonstration_order",
        "room": "reserved_tokens",
        "num_shown": "num_images",
        "shown_bytes": "image_bytes",
        "num_demos": "num_stored_demonstrations",
        "demo_bytes": "demonstration_bytes",
        "num_demo_shown": "num_demonstration_images",
        "demo_shown_bytes": "demonstration_image_bytes",
    },
    "scope": {
        "slots": "num_slots",
        "replies": "max_answer_tokens",
        "prompts": "max_prompt_tokens",
    },
}
SIZES = {  # of a `scope` entry
    "model": "hidden_size",
    "width": "dim",
    "heads": "num_heads",
    "classifier": "num_classifier_layers",
    "counterfactual": "num_counterfactual_layers",
    "inner": "ffn_dim",
    "key": "key_dim",
    "looks": "num_image_queries",
}
VALUES = {("experts", "blend", "both"): "query_and_vision"}
TENSORS: Mapping[str, Mapping[str, str]] = {
    "experts": {
        "norm": "input_norm",
        "asked.norm": "prompt.norm",
        "asked.rows": "prompt.queries",
        "asked.value": "prompt.value",
        "asked.bias": "prompt.value_bias",
        "seen.query": "vision.query",
        "seen.shift": "vision.query_bias",
        "seen.key": "vision.key",
        "seen.value": "vision.value",
        "seen.bias": "vision.value_bias",
        "query.rows": "query.queries",
        "query.bias": "query.value_bias",
    },
    "prompt": {
        "questions": "question_keys",
        "pictures": "image_keys",
        "shown": "images",
        "sizes": "image_sizes",
        "demos": "demonstrations",
        "ends": "demonstration_ends",
        "demo_keys": "demonstration_keys",
        "demo_shown": "demonstration_images",
        "demo_shown_ends": "demonstration_image_ends",
        "demo_shows": "demonstration_image_index",
    },
    "scope": {
        "shrink": "down_projection",
        "bias": "down_projection_bias",
        "roles": "segment_embeddings",
        "looks": "image_queries",
        "look": "image_key_value",
        "see": "image_to_key",
        "read": "text_to_key",
        "norms": "final_norms",
        "ask": "pointer_query",
        "match": "pointer_key",
        "near": "pointer_position_bias",
        "out": "up_projection",
        "classify.norms": "classifier.norms",
        "classify.attend": "classifier.qkv",
        "classify.join": "classifier.attention_output",
        "classify.up": "classifier.up",
        "classify.down": "classifier.down",
        "say.norms": "counterfactual.norms",
        "say.attend": "counterfactual.qkv",
        "say.join": "counterfactual.attention_output",
        "say.up": "counterfactual.up",
        "say.down": "counterfactual.down",
        "replies": "answer_states",
        "scenes": "image_states",
        "prompts": "prompt_states",
        "answers": "answer_outputs",
    },
}


class StoredNames(NamedTuple):
    """The text and the tensor names in a file of format 1, for its digest.

    Attributes:
        text: Its description with an empty digest.
        tensors: Name in format 2 -> name in the file, of renamed tensors.
    """

    text: str
    tensors: Mapping[str, str]


def convert_description(body: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a format 1 description.

    Args:
        body: The parsed description, without its digest.

    Returns:
        The same description with the keys of format 2. A key that is not in format 1 keeps its
        name, so that the check against the schema reports it.

    Raises:
        ValueError: If a file of format 1 has a key of format 2.
    """
    renamed = _rename(body, DESCRIPTION, "the description")
    renamed["format"] = 2
    if isinstance(body.get("base"), Mapping):
        renamed["base"] = _rename(body["base"], BASE, "base")
    if isinstance(body.get("entries"), list):
        renamed["entries"] = [_convert_entry(entry) for entry in body["entries"]]
    return renamed


def _convert_entry(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kind = entry.get("type")
    keys = {**ENTRY, **(KEYS.get(kind, {}) if isinstance(kind, str) else {})}
    renamed = _rename(entry, keys, f"an entry of kind {str(kind)[:20]!r}")
    for (owner, key, old), new in VALUES.items():
        if owner == kind and entry.get(key) == old:
            renamed[keys[key]] = new
    if kind == "scope" and isinstance(entry.get("sizes"), Mapping):
        renamed["sizes"] = _rename(entry["sizes"], SIZES, "sizes")
    return renamed


def _rename(body: Mapping[str, Any], keys: Mapping[str, str], where: str) -> dict[str, Any]:
    strangers = sorted((set(body) & set(keys.values())) - set(keys))
    if strangers:
        raise ValueError(f"{where} of a delta of format 1 has no {', '.join(strangers)}")
    return {keys.get(key, key): value for key, value in body.items()}


def rename_tensors(body: Mapping[str, Any]) -> dict[str, str]:
    """Map the renamed tensors of a format 1 description to the names in its file.

    Args:
        body: The parsed description.

    Returns:
        Name in format 2 to name in the file. Names that did not change are left out.
    """
    names = {}
    entries = body.get("entries")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("type"), str):
            name = entry.get("name")
            parts = TENSORS.get(entry["type"], {})
            names |= {f"{name}.{new}": f"{name}.{old}" for old, new in parts.items()}
    return names
