"""Named prompt conventions: ours, and those under which the peers' published numbers were made.

Four code bases put different strings before the model for the "same" metric, so a score carries
the name of its template. Under `*` is what holds for every family that has no line of its own.

Sources: zjunlp/EasyEdit `trainer/blip2_models/`, `evaluate/multimodal_evaluate.py` and
`dataset/vqa.py`; VLKEB/VLKEB (`trainer/llava/`) and MMKE-Bench, forks of it; qizhou000/LiveEdit
`editor/vllms_for_edit/`; bigai-ai/ICE.
"""

from __future__ import annotations

import difflib

from msgspec.structs import replace

from errata.functional.errors import BadSettings

from .text import Template

__all__ = ["PRESETS", "preset"]

_LAVIS = Template(chat=False, raw=("{prompt}",), gap=" ", bos=False)
_WRAPPED = Template(
    # prompt_wrap tokenises what stands before and behind the picture apart from the question
    chat=False, raw=("{images}", "{prompt}"), picture="###Human: <Img>{}</Img> ", gap=" ",
    bos=False,
)  # fmt: skip
_BARE = Template(
    # the picture is spliced in behind <s>, question and answer are one text behind it
    chat=False, raw=("{images}", "{prompt}"), gap=" ",
)  # fmt: skip
_LINE = Template(chat=False, raw=("{images}{prompt}",), picture="{}\n")

PRESETS: dict[str, dict[str, Template]] = {
    # the family's own way: its chat template, or the prompt its makers publish
    "default": {"*": Template()},
    # no template at all: pictures, question, answer
    "plain": {"*": Template(chat=False, raw=("{images}{prompt}",))},
    # EasyEdit's editor: chat template and answer, nothing between; BLIP-2 and MiniGPT-4 bare
    "easyedit": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": Template(gap="")},
    # EasyEdit's trainer and its datasets put a space before every answer
    "easyedit-trainer": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": Template(gap=" ")},
    # f"{question} {answer}" without chat words; LLaVA too
    "vlkeb": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": _BARE},
    "mmke": {"blip-2": _LAVIS, "minigpt4": _WRAPPED, "*": _BARE},
    # no chat words; a space unless one is there; BLIP-2's pictures come before its </s>
    "liveedit": {"blip-2": Template(chat=False, raw=("{prompt}",)), "*": _LINE},
    # text models, bare
    "ice": {"*": Template(chat=False, raw=("{images}{prompt}",), gap=" ")},
}


def preset(name: str | Template, family: str) -> Template:
    """The template called `name` for a family (`config.model_type`); a Template is itself.

    Raises BadSettings with the names that exist.

    >>> preset("easyedit", "blip-2").gap, preset("easyedit", "qwen2_vl").gap
    (' ', '')
    """
    if isinstance(name, Template):
        return name
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadSettings(f"template must be one of {', '.join(PRESETS)}; got {name!r}.{hint}")
    table = PRESETS[name]
    chosen = table.get(family, table["*"])
    return replace(chosen, name=name)
