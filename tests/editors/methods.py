"""The methods under test: settings for the laws, and the rows an edit may run.

A new method adds its settings to `CASES` (the laws of `test_laws.py`) and a line to `COSTS` (the
count of `tests/bench/perf/test_edit_cost.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from errata.editors.finetune import FinetuneConfig
from errata.editors.grace import GraceConfig
from errata.editors.ike import IkeConfig
from errata.editors.liveedit import LiveEditConfig
from errata.editors.lora import LoraConfig
from errata.editors.mend import MendConfig
from errata.editors.serac import SeracConfig
from errata.editors.wise import WiseConfig

CASES = {
    "finetune": FinetuneConfig(num_steps=4, lr=5e-3),
    "finetune-sgd-last": FinetuneConfig(
        num_steps=3, optimizer="sgd", lr=0.5, objective="last_prompt_token"
    ),
    "finetune-clamped": FinetuneConfig(
        num_steps=4, optimizer="adam", lr=5e-3, norm_constraint=4e-3
    ),
    "finetune-middle": FinetuneConfig(
        sites=("layers.1.mlp",), num_steps=8, lr=2e-3, weight_decay=0.01
    ),
    "grace": GraceConfig(num_steps=4, lr=0.1),
    "ike": IkeConfig(),
    "ike-base": IkeConfig(
        encoder="base", fact_template="{statement}. ", question_template="{question}", max_facts=2
    ),
    "lora": LoraConfig(rank=2, num_steps=4, lr=2e-2),
    "lora-mlp": LoraConfig(
        target_modules=("layers.-1.mlp.up",), rank=3, num_steps=3, optimizer="sgd", lr=0.2
    ),
    # untrained, MEND is one step along alpha times the gradient: below zero it descends
    "mend": MendConfig(
        untrained=True, sites=("layers.1.mlp", "layers.-1.mlp"), rank=4, edit_lr=-0.02
    ),
    # untrained, its pointer repeats the edit's answer; its own question is in scope by definition
    "serac": SeracConfig(
        untrained=True,
        dim=32,
        num_heads=4,
        num_classifier_layers=1,
        num_counterfactual_layers=1,
        ffn_dim=32,
        key_dim=16,
    ),
    "serac-soft": SeracConfig(
        untrained=True,
        gate="soft",
        dim=32,
        num_heads=4,
        num_classifier_layers=2,
        num_counterfactual_layers=2,
        ffn_dim=32,
        key_dim=16,
        append_eos=False,
    ),
    "wise": WiseConfig(
        layer=1,
        mask_ratio=0.5,
        num_steps=4,
        lr=0.2,
        alpha=0.5,
        beta=2.0,
        gamma=1.0,
        num_unrelated=2,
    ),
    "wise-last": WiseConfig(
        site="mlp.up",
        layer=-1,
        gate_statistic="last",
        optimizer="adam",
        lr=2e-2,
        num_steps=3,
        alpha=0.5,
        beta=2.0,
        gamma=1.0,
        own_negatives=("image", "question"),
        num_unrelated=1,
        norm_constraint=None,
    ),
    "mend-last": MendConfig(
        untrained=True, sites=("layers.-1.mlp",), rank=4, edit_lr=-0.02, append_eos=True
    ),
}
# Untrained LiveEdit networks change answers at random. test_liveedit_training.py asserts that the
# shipped ones lower the edit's loss.
CASES["liveedit"] = LiveEditConfig(untrained=True, feature_dim=8, num_heads=2)
CASES["liveedit-both"] = LiveEditConfig(
    untrained=True,
    layer=0,
    feature_dim=8,
    num_query_tokens=2,
    num_heads=2,
    rank=3,
    routing_input="query_and_vision",
    top_k=2,
    append_eos=False,
)
# A random model does not use the prompt either: test_ike.py uses trained ones.
UNTRAINED = {"liveedit", "ike"}

LAYERS, STEPS = 6, 4  # of the models and editors whose rows are counted


class Cost(NamedTuple):
    """Settings of a counted edit, and the rows through decoder layers it may run."""

    config: msgspec.Struct
    edit_rows: int
    layers_above: int = LAYERS  # layers each probe of the edited model runs
    num_probes: int = 5

    @property
    def rows(self) -> int:
        """Rows of one case: the base's answers, the edit, the edited model's answers."""
        return self.num_probes * LAYERS + self.edit_rows + self.num_probes * self.layers_above


COSTS = {
    # its steps and probes run after the last attention, at scored positions
    "finetune": Cost(FinetuneConfig(num_steps=STEPS, stop_loss=0.0, lr=5e-3), 0, 0),
    "lora": Cost(LoraConfig(rank=2, num_steps=STEPS, stop_loss=0.0), STEPS * LAYERS),
    # steps, one more pass for the key, one for keys and values of the prefix
    "grace": Cost(
        GraceConfig(layer=3, num_steps=STEPS, stop_loss=0.0, lr=0.1),
        (STEPS + 2) * (LAYERS - 3),
        LAYERS - 3,
    ),
    # steps, an unrelated text up to the site, and the site's output for both
    "wise": Cost(
        WiseConfig(layer=4, num_steps=STEPS, num_unrelated=1, lr=0.1, stop_loss=0.0),
        STEPS * (LAYERS - 4) + (4 + 1) + 2,
        LAYERS - 4,
    ),
    "mend": Cost(
        MendConfig(untrained=True, sites=("layers.-2.mlp", "layers.-1.mlp"), rank=4, edit_lr=-0.02),
        2,
        2,
    ),
    "liveedit": Cost(
        LiveEditConfig(untrained=True, layer=4, feature_dim=8, num_heads=2), 1, LAYERS - 4
    ),
    # rows of the base that are in the prefix cache
    "serac": Cost(
        SeracConfig(
            untrained=True,
            dim=32,
            num_heads=4,
            num_classifier_layers=1,
            num_counterfactual_layers=1,
            ffn_dim=32,
            key_dim=16,
        ),
        0,
    ),
    "ike": Cost(IkeConfig(), 0),
}
