"""`PROBES` and `SCORERS`: the conventions of the field as data (EasyEdit, VLKEB, MMKE, LiveEdit
...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from errata.functional.errors import InvalidSettingsError

__all__ = ["PROBES", "SCORERS", "Agreement", "Probe", "Scorer", "get_probe", "get_scorer"]


class Probe(msgspec.Struct, frozen=True):
    """What a probe key means: its name in prose and in tables, and how it is scored."""

    title: str
    column: str
    kind: Literal["success", "locality"]


PROBES: Mapping[str, Probe] = {
    "reliability": Probe("Reliability", "Rel", "success"),
    "text_reliability": Probe("Text reliability", "T-Rel", "success"),
    "image_reliability": Probe("Image reliability", "I-Rel", "success"),
    "rephrase": Probe("Text generality", "T-Gen", "success"),
    "image_rephrase": Probe("Image generality", "M-Gen", "success"),
    "text_locality": Probe("Text locality", "T-Loc", "locality"),
    "image_locality": Probe("Image locality", "M-Loc", "locality"),
    "same_entity_locality": Probe("Same-entity locality", "E-Loc", "locality"),
    "hard_locality": Probe("Hard locality", "H-Loc", "locality"),
    "portability": Probe("Portability", "Port", "success"),
    "kgi": Probe("Knowledge generalization", "KGI", "success"),
    "kpi": Probe("Knowledge preservation", "KPI", "success"),
}


def get_probe(name: str) -> Probe:
    """What a probe key means; suffixed keys follow their family, a key of your own is a success.

    `portability_2hop` is a portability, `text_locality_forgetfulness` a text locality.

    >>> get_probe("portability_2hop").column, get_probe("image_locality").kind, get_probe("humour").kind
    ('Port 2hop', 'locality', 'success')

    Args:
        name: Key of a probe in results.

    Returns:
        Title, column heading and kind.
    """  # noqa: E501
    if name in PROBES:
        return PROBES[name]
    known = [stem for stem in PROBES if name.startswith(f"{stem}_")]
    if known:
        stem = max(known, key=len)
        rest = name[len(stem) + 1 :].replace("_", " ")
        family = PROBES[stem]
        return Probe(f"{family.title} ({rest})", f"{family.column} {rest}", family.kind)
    title = name.replace("_", " ").capitalize()
    return Probe(title, title, "locality" if "locality" in name else "success")


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How two models are compared: their k likeliest tokens, at some positions."""

    k: int = 1
    ordered: bool = True
    positions: Literal["answer", "all"] = "answer"


class Scorer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the field's conventions, as data; `SCORERS` holds them by name."""

    name: str
    source: str
    success: Literal["token_accuracy", "exact_match"] = "token_accuracy"
    text: Agreement = Agreement()
    image: Agreement = Agreement()
    pools_kinds: bool = False
    """Kinds of portability, and of locality, are averaged as one pool of a case's questions."""

    @property
    def num_ranks(self) -> int:
        """How many of the likeliest tokens a reading must keep."""
        return max(self.text.k, self.image.k)

    @property
    def needs_all_positions(self) -> bool:
        """Whether locality needs every position of the row, not only the answer's."""
        return "all" in (self.text.positions, self.image.positions)


_TOP_1, _TOP_10 = Agreement(k=1, positions="all"), Agreement(k=10, positions="all")

SCORERS: Mapping[str, Scorer] = {
    one.name: one
    for one in (
        Scorer(name="errata", source="this library: answer positions, base against edited argmax"),
        Scorer(
            name="easyedit",
            source="zjunlp/EasyEdit evaluate/multimodal_evaluate.py, util/vl_utils.py:135-159",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="vlkeb",
            source="VLKEB/VLKEB trainer/MultimodalTrainer.py",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="mmke",
            source="mmke-bench-bigai/mmke-bench trainer/MultimodalTrainer.py:502-582",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="comprehendedit",
            source="yaohui120/ComprehendEdit editors/multimodal_editor.py:400-427",
            image=Agreement(k=10),
        ),
        Scorer(name="liveedit", source="qizhou000/LiveEdit evaluation/vllm_editor_eval.py:108-173"),
        Scorer(
            name="ice",
            source="bigai-ai/ICE eval.py:60-107; EasyEdit evaluate_utils.py:242-317",
            pools_kinds=True,
        ),
    )
}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    >>> get_scorer("liveedit").image
    Agreement(k=1, ordered=True, positions='answer')

    Args:
        name: Name in `SCORERS`.

    Returns:
        The scorer.

    Raises:
        InvalidSettingsError: For an unknown name.
    """
    if name not in SCORERS:
        raise InvalidSettingsError(f"scorer must be one of {', '.join(SCORERS)}; got {name!r}.")
    return SCORERS[name]
