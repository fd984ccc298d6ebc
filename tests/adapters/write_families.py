"""Measure every family on a tiny random model and write adapters/families/FAMILIES.md.

Run from the repository root: `python tests/adapters/write_families.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from errata.adapters.families import unlisted  # noqa: E402
from errata.adapters.families.table import FAMILIES, REFUSED
from errata.adapters.hf import attention, functional_model, structure, verification
from errata.adapters.hf import decoder as core
from errata.functional.errors import UnsupportedModelError
from tests.adapters.hf.test_verification import module_of
from tests.adapters.zoo_of_families.models import NAMES, made, queries
from tests.adapters.zoo_of_families.others import OTHERS

# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402
# noqa: E402

HEAD = """# Families

Measured on tiny random models in fp32 by `python tests/adapters/write_families.py`; figures are the
largest difference of logits, in units of the largest logit. *full forward*: decode against the
module's own Hugging Face forward. *layer cut*: cut at a layer against whole (largest over the
layers tried).
*batch invariance*: rows alone, padded, in another order. *scored only*: last layer on scored
positions only.
*KV cache*: cut in time and continued from keys and values. "–": refused there, with the reason
behind.
"""
COLUMNS = "| family | full forward | layer cut | batch invariance | scored only | KV cache | remarks |\n|---|---|---|---|---|---|---|\n"  # noqa: E501


def line(name: str, proofs, remarks: str) -> str:
    def most(field: str) -> str:
        values = [getattr(proof, field) for proof in proofs]
        known = [value for value in values if value is not None]
        return f"{max(known):.0e}" if known and max(known) else ("0" if known else "–")

    figures = [
        most(field)
        for field in ("full_forward", "layer_cut", "batch_invariance", "scored_only", "kv_cache")
    ]
    return f"| `{name}` | {' | '.join(figures)} | {remarks} |\n"


def remarks(decoder: core.FunctionalDecoder) -> str:
    told = []
    if decoder.attention_name != attention.EXPLICIT_ATTENTION:
        told.append("its own eager attention")
    if decoder.select_refusal:
        told.append(f"no scored-only pass: {decoder.select_refusal}")
    if decoder.runner.layout.cache_refusal:
        told.append(f"no KV cache: {decoder.runner.layout.cache_refusal}")
    return "; ".join(told).replace("|", "/")


TEXT_DECODERS = {"qwen3": "qwen3", "opt": "opt_350m"}  # model type -> its module among OTHERS


def named() -> str:
    text = "\n## With a line in the table\n\n" + COLUMNS
    known = {made(name).module.config.model_type: name for name in NAMES}
    for model_type, family in FAMILIES.items():
        if model_type in known:
            name = known[model_type]
            module, model = made(name)
            card, given = model.card, [model.preprocess(queries(name)[:1]), *picture_rows(name)]
        else:
            module, _ = module_of(TEXT_DECODERS[model_type])
            card = structure.describe_module(module, family)
            given = verification.sample_inputs(card, module, None)
        decoder = core.FunctionalDecoder(card, module, family)
        where = structure.decoder_path(module)
        proofs = [verification.verify(module, where, decoder, one) for one in given]
        text += line(model_type, proofs, remarks(decoder))
    return text


def picture_rows(name: str):
    """Batches whose rows all have images, as the proof runs Hugging Face's own forward."""
    model = made(name).model
    rows = [query for query in queries(name) if query.images]
    return [model.preprocess(rows)] if rows else []


def found() -> str:
    passing = "\n## Found by structure\n\n" + COLUMNS
    refused = "\n## Refused\n\n| family | reason |\n|---|---|\n"
    for name in OTHERS:
        module, given = module_of(name)
        family = unlisted.generic(module.config.model_type)
        try:
            card = structure.describe_module(module, family)
            samples = [*verification.sample_inputs(card, module, None), *([given] if given else [])]
            model = functional_model.functionalize(card, module, None, None, family, samples)
        except UnsupportedModelError as error:
            reason = REFUSED.get(module.config.model_type) or str(error)
            reason = " ".join(reason.replace("|", "/").split())
            refused += f"| `{name}` | refused: {reason} |\n"
            continue
        decoder = model.decode.__self__
        note = remarks(decoder) if given else "; ".join(filter(None, ["text", remarks(decoder)]))
        passing += line(name, decoder.verification, note)
    return passing + refused


if __name__ == "__main__":
    (ROOT / "adapters" / "families" / "FAMILIES.md").write_text(HEAD + named() + found())
