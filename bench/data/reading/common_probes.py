"""The probes that MMEdit, VLKEB, MMKE-Bench and ADS-Edit share."""

from __future__ import annotations

from typing import Any

from errata.bench.data.reading.benchmark import RecordContext
from errata.functional.queries import Query

__all__ = ["common_probes"]


def common_probes(
    record: Any, edit: Query, context: RecordContext, wrap: str = "{}"
) -> dict[str, tuple[Query, ...]]:
    """The probes that MMEdit, VLKEB, MMKE-Bench and ADS-Edit share; one without its data is absent.

    Text generality: rephrased prompt (in `wrap`), same image. Image generality: same prompt, other
    image.
    """
    probes: dict[str, tuple[Query, ...]] = {}
    if rephrased := context.rephrased_prompt(record.rephrase):
        probes["rephrase"] = (edit._replace(prompt=wrap.replace("{}", rephrased)),)
    if isinstance(record.image_rephrase, str) and record.image_rephrase:
        probes["image_rephrase"] = (
            edit._replace(images=context.find_images(record.image_rephrase)),
        )
    if record.loc and record.loc_ans:
        prompt = context.wrap_prompt("text_loc", record.loc)
        probes["text_locality"] = (Query(prompt, context.clean_text(record.loc_ans)),)
    if record.m_loc and record.m_loc_q and record.m_loc_a:
        prompt = context.wrap_prompt("image_loc", record.m_loc_q)
        answer = context.clean_text(record.m_loc_a)
        probes["image_locality"] = (Query(prompt, answer, context.find_images(record.m_loc)),)
    return probes
