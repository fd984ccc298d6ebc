"""The probes that MMEdit, VLKEB, MMKE-Bench and ADS-Edit share."""

from __future__ import annotations

from typing import Any

from errata.bench.data.reading.benchmark import RecordContext
from errata.functional.queries import Query

__all__ = ["common_probes"]


def common_probes(
    record: Any, edit: Query, context: RecordContext, wrap: str = "{}"
) -> dict[str, tuple[Query, ...]]:
    """Make the probes that MMEdit, VLKEB, MMKE-Bench and ADS-Edit share.

    Text generality uses the rephrased prompt with the same image. Image generality uses the same
    prompt with the other image. A probe whose fields are empty is absent.

    Args:
        record: A record with the fields `rephrase`, `image_rephrase`, `loc`, `loc_ans`, `m_loc`,
            `m_loc_q` and `m_loc_a`.
        edit: The query of the edit.
        context: How the file is read.
        wrap: Template of the rephrased prompt. `{}` stands for the prompt.

    Returns:
        Probe name to its queries.

    Raises:
        InvalidInputError: If an image name or a missing image is an error.
        SkipRecord: If an image is missing and `missing_images` is "skip".
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
