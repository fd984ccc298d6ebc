"""Copy, update and retain demonstrations from training cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.editors.ike.config import IkeConfig
from errata.functional import Case, Model, Query
from errata.functional.errors import InvalidSettingsError
from errata.functional.forward.retrieval_keys import get_encoder
from errata.functional.kinds.prompt.apply import without_memories
from errata.functional.kinds.prompt.memory import fill_template, strip_placeholders
from errata.functional.queries import IMAGE_PLACEHOLDER


def _template_values(config: IkeConfig, query: Query) -> dict[str, str]:
    prompt, target = strip_placeholders(query.prompt).strip(), query.target.strip()
    return {
        "prompt": prompt,
        "target": target,
        "statement": to_statement(config.statement_forms, prompt, target),
    }


def to_statement(statement_forms: Sequence[tuple[str, str]], prompt: str, target: str) -> str:
    """Turn a prompt and its target into a sentence, by the first form that the prompt matches.

    >>> forms = [("where does {s} live?", "{s} lives in {target}.")]
    >>> to_statement(forms, "where does bo live?", "rome")
    'bo lives in rome.'

    Args:
        statement_forms: Pairs of a question form with `{s}` and a statement form with `{s}` and
            `{target}`.
        prompt: The edit's prompt.
        target: The edit's target.

    Returns:
        The sentence; prompt and target joined by a space if no form matches.
    """
    for question, statement in statement_forms:
        before, _, after = question.partition("{s}")
        fits = prompt.startswith(before) and prompt.endswith(after)
        if fits and len(prompt) > len(before) + len(after):
            subject = prompt[len(before) : len(prompt) - len(after)]
            return fill_template(statement, {"s": subject, "target": target})
    return f"{prompt} {target}"


def _make_demonstrations(model: Model, config: IkeConfig, cases: list[Case]) -> dict[str, Tensor]:
    """Copy, update and retain texts of training cases, their images and their keys."""
    cases = cases[: config.num_source_cases or None]
    texts: list[str] = []
    image_files: list[bytes] = []
    image_index: list[int] = []
    for case in cases:
        values = _template_values(config, case.edit)
        image_number = -1
        if config.include_images and model.card.takes_several_images and len(case.edit.images) == 1:
            image_files.append(model.encode_image(case.edit.images[0]))
            image_number = len(image_files) - 1
        for query, same in _demonstration_queries(case, config.copy_update_retain):
            question_values = {
                "question": strip_placeholders(query.prompt).strip(),
                "answer": query.target.strip(),
            }
            shown_image = image_number if same else -1
            texts.append(
                (IMAGE_PLACEHOLDER if shown_image >= 0 else "")
                + fill_template(config.demonstration_template, values | question_values)
            )
            image_index.append(shown_image)
    if not texts:
        raise InvalidSettingsError(
            "the training cases give no demonstration: check `copy_update_retain` and "
            "`num_source_cases`."
        )
    raw = [text.encode() for text in texts]
    encode = get_encoder(config.encoder, without_memories(model))
    tensors = {
        ".demonstrations": _concat_bytes(raw),
        ".demonstration_ends": torch.tensor(
            [len(text) for text in raw], dtype=torch.int64, device="cpu"
        ).cumsum(0),
        ".demonstration_keys": encode([strip_placeholders(text) for text in texts]).float(),
    }
    if image_files:
        tensors |= {
            ".demonstration_images": _concat_bytes(image_files),
            ".demonstration_image_ends": torch.tensor(
                [len(file) for file in image_files], dtype=torch.int64, device="cpu"
            ).cumsum(0),
            ".demonstration_image_index": torch.tensor(
                image_index, dtype=torch.int64, device="cpu"
            ),
        }
    device = next(iter(model.params.values())).device
    return {suffix: tensor.to(device) for suffix, tensor in tensors.items()}


def _demonstration_queries(
    case: Case, copy_update_retain: Sequence[int]
) -> list[tuple[Query, bool]]:
    """The questions of a case's demonstrations, and whether they are about its own image."""
    copies, updates, retains = copy_update_retain
    edit, probes = case.edit, case.probes
    rephrases = [q for name in probes if name.startswith("rephrase") for q in probes[name]]
    localities = [q for name in probes if name.startswith("text_locality") for q in probes[name]]
    localities += [
        q
        for name in probes
        if "locality" in name and not name.startswith("text_")
        for q in probes[name]
    ]
    uses = [(edit, True)] * min(copies, 1)
    uses += [(query, True) for query in rephrases[:updates]]
    uses += [(query, query.images == edit.images) for query in localities[:retains]]
    return [(query, mine) for query, mine in uses if query.target.strip()]


def _concat_bytes(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
