"""Settings of the first version, refused with their new name. No torch. Goes with release 0.2."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["RENAMED_SETTINGS", "RENAMED_TRAINING", "RENAMED_VALUES"]

_EOS = {"end": "append_eos"}
_WEIGHTS = {"trained": "weights"}
_CLAMP = {"clamp": "norm_constraint"}

RENAMED_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "finetune": {**_EOS, **_CLAMP, "whole": "all_parameters"},
    "lora": {**_EOS, "gamma": "lr_decay", "targets": "target_modules"},
    "grace": {**_EOS, "where": "replacement", "start": "value_init"},
    "ike": {
        "fact": "fact_template",
        "ask": "question_template",
        "demo": "demonstration_template",
        "forms": "statement_forms",
        "k": "num_demonstrations",
        "demonstrations": "demonstration_source",
        "cases": "num_source_cases",
        "shares": "copy_update_retain",
        "by": "demonstration_key",
        "order": "demonstration_order",
        "look": "match_images",
        "least": "min_similarity",
        "least_look": "min_image_similarity",
        "most": "max_facts",
        "pictured": "include_images",
        "room": "reserved_tokens",
    },
    "mend": {**_EOS, **_WEIGHTS, "num_hidden": "num_hidden_layers"},
    "serac": {
        **_EOS,
        **_WEIGHTS,
        "width": "dim",
        "heads": "num_heads",
        "classifier": "num_classifier_layers",
        "counterfactual": "num_counterfactual_layers",
        "inner": "ffn_dim",
        "key": "key_dim",
        "looks": "num_image_queries",
    },
    "liveedit": {
        **_EOS,
        **_WEIGHTS,
        "width": "feature_dim",
        "slots": "num_query_tokens",
        "heads": "num_heads",
        "strength": "expert_scale",
        "places": "num_answer_positions",
        "sentinel": "num_sentinel_tokens",
        "sentinel_text": "num_text_sentinel_tokens",
        "sure": "min_self_margin",
        "blend": "routing_input",
        "most": "top_k",
    },
    "wise": {
        **_EOS,
        **_CLAMP,
        "statistic": "gate_statistic",
        "texts": "unrelated_texts",
        "questions": "unrelated_questions",
        "num_texts": "num_unrelated",
        "beside": "own_negatives",
        "stop_change": "stop_improvement",
        "replay": "num_replayed",
        "save_every": "save_freq",
        "merge_every": "merge_freq",
        "merge": "merge_alg",
    },
}
"""Method to old setting to new one."""

RENAMED_VALUES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("finetune", "objective"): {"target": "target_tokens", "last": "last_prompt_token"},
    ("liveedit", "routing_input"): {"both": "query_and_vision"},
    ("wise", "own_negatives"): {"picture": "image"},
}
"""(method, setting) to old value to new one."""

RENAMED_TRAINING: Mapping[str, str] = {
    "together": "batch_size",
    "accumulate": "gradient_accumulation_steps",
    "asks": "questions_per_probe",
    "lr_of": "lr_by_group",
    "warmup": "warmup_steps",
    "decay": "linear_decay",
    "clip": "max_grad_norm",
    "weights": "loss_weights",
    "held": "num_validation_cases",
    "validate_every": "eval_every",
    "patience": "early_stopping_patience",
    "memory": "prefix_cache_bytes",
    "disk": "prefix_disk_bytes",
}
"""Old setting of a training to new one."""
