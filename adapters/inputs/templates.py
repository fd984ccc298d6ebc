"""Named prompt conventions: ours, and those under which the peers' published numbers were made.

Four code bases put different strings before the model for the "same" metric, so a score carries
the name of its template. Templates that differ by family are in
`Family.templates`, and a family's own prompt in its `VisionFormat.raw_template`: see
the family's file, such as `adapters/families/llava.py`.

Sources: zjunlp/EasyEdit `trainer/blip2_models/`, `evaluate/multimodal_evaluate.py` and
`dataset/vqa.py`; VLKEB/VLKEB (`trainer/llava/`) and MMKE-Bench, forks of it; qizhou000/LiveEdit
`editor/vllms_for_edit/`; bigai-ai/ICE.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.functional.errors import InvalidSettingsError, unknown_name

__all__ = ["TEMPLATES", "get_template"]

_BARE = PromptTemplate(
    # the image is inserted after <s>; question and answer are one text after it
    chat=False,
    raw_template=("{images}", "{prompt}"),
    answer_separator=" ",
)
_LINE = PromptTemplate(chat=False, raw_template=("{images}{prompt}",), image_wrapper="{}\n")

TEMPLATES: Mapping[str, PromptTemplate] = {
    # the family's own way: its chat template, or the prompt its makers publish
    "default": PromptTemplate(),
    # no template at all: images, question, answer
    "plain": PromptTemplate(chat=False, raw_template=("{images}{prompt}",)),
    # EasyEdit's editor: chat template and answer, nothing between
    "easyedit": PromptTemplate(answer_separator=""),
    # EasyEdit's trainer and its datasets put a space before every answer
    "easyedit-trainer": PromptTemplate(answer_separator=" "),
    # f"{question} {answer}" without chat words; LLaVA too
    "vlkeb": _BARE,
    "mmke": _BARE,
    # no chat words; a space unless one is there
    "liveedit": _LINE,
    # text models, bare
    "ice": PromptTemplate(chat=False, raw_template=("{images}{prompt}",), answer_separator=" "),
}
"""Template names and their defaults. A family's own are in `Family.templates`."""


def get_template(
    name: str | PromptTemplate, family_templates: Mapping[str, PromptTemplate] = {}
) -> PromptTemplate:
    """Return the prompt template of a name.

    Args:
        name: A name of `TEMPLATES`. A `PromptTemplate` is returned as it is.
        family_templates: `Family.templates`, which take precedence.

    Returns:
        The template, with its name.

    Raises:
        InvalidSettingsError: If there is no template of this name.

    Example:
        >>> get_template("easyedit").answer_separator
        ''
    """
    if isinstance(name, PromptTemplate):
        return name
    if name not in TEMPLATES:
        raise InvalidSettingsError(f"{unknown_name('template', name, TEMPLATES)}.")
    return replace(family_templates.get(name, TEMPLATES[name]), name=name)
