"""Named prompt conventions: ours, and those under which the peers' published numbers were made.

Four code bases put different strings before the model for the "same" metric, so a score carries
the name of its template. Under `*` is what holds for every family that has no line of its own.

Sources: zjunlp/EasyEdit `trainer/blip2_models/`, `evaluate/multimodal_evaluate.py` and
`dataset/vqa.py`; VLKEB/VLKEB (`trainer/llava/`) and MMKE-Bench, forks of it; qizhou000/LiveEdit
`editor/vllms_for_edit/`; bigai-ai/ICE.
"""

from __future__ import annotations

from msgspec.structs import replace

from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.functional.errors import InvalidSettingsError, unknown_name

__all__ = ["TEMPLATES", "get_template"]

_LAVIS = PromptTemplate(chat=False, raw_template=("{prompt}",), answer_separator=" ", add_bos=False)
_WRAPPED = PromptTemplate(
    # prompt_wrap tokenises what stands before and behind the picture apart from the question
    chat=False,
    raw_template=("{images}", "{prompt}"),
    image_wrapper="###Human: <Img>{}</Img> ",
    answer_separator=" ",
    add_bos=False,
)
_BARE = PromptTemplate(
    # the picture is spliced in behind <s>, question and answer are one text behind it
    chat=False,
    raw_template=("{images}", "{prompt}"),
    answer_separator=" ",
)
_LINE = PromptTemplate(chat=False, raw_template=("{images}{prompt}",), image_wrapper="{}\n")

TEMPLATES: dict[str, dict[str, PromptTemplate]] = {
    # the family's own way: its chat template, or the prompt its makers publish
    "default": {"*": PromptTemplate()},
    # no template at all: pictures, question, answer
    "plain": {"*": PromptTemplate(chat=False, raw_template=("{images}{prompt}",))},
    # EasyEdit's editor: chat template and answer, nothing between; BLIP-2 and MiniGPT-4 bare
    "easyedit": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": PromptTemplate(answer_separator="")},
    # EasyEdit's trainer and its datasets put a space before every answer
    "easyedit-trainer": {
        "blip-2": _LAVIS,
        "minigpt4": _WRAPPED,
        "*": PromptTemplate(answer_separator=" "),
    },
    # f"{question} {answer}" without chat words; LLaVA too
    "vlkeb": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": _BARE},
    "mmke": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": _BARE},
    # no chat words; a space unless one is there; BLIP-2's pictures come before its </s>
    "liveedit": {"blip-2": PromptTemplate(chat=False, raw_template=("{prompt}",)), "*": _LINE},
    # text models, bare
    "ice": {
        "*": PromptTemplate(chat=False, raw_template=("{images}{prompt}",), answer_separator=" ")
    },
}


def get_template(name: str | PromptTemplate, family: str) -> PromptTemplate:
    """The template called `name` for a family (`config.model_type`); a Template is itself.

    Raises BadSettings with the names that exist.

    >>> get_template("easyedit", "blip-2").answer_separator, get_template("easyedit", "qwen2_vl").answer_separator
    (' ', '')
    """
    if isinstance(name, PromptTemplate):
        return name
    if name not in TEMPLATES:
        raise InvalidSettingsError(f"{unknown_name('template', name, TEMPLATES)}.")
    table = TEMPLATES[name]
    chosen = table.get(family, table["*"])
    return replace(chosen, name=name)
