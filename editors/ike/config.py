"""`IkeConfig` and presets."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

import msgspec
from msgspec import Meta

from errata.functional.errors import InvalidSettingsError, join_messages
from errata.functional.kinds.prompt.entry import DemonstrationKey, DemonstrationOrder

__all__ = ["PRESETS", "IkeConfig"]

Count = Annotated[int, Meta(ge=0, le=10**9)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class IkeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ike"):
    """Settings of IKE.

    `fact_template` and `demonstration_template` may hold {prompt}, {target} and {statement}, the
    latter
    also {question} and {answer}; `question_template` holds {question}. A statement turns prompt and
    target into a sentence by the first of `statement_forms` that fits the prompt. Without one it is
    "{prompt} {target}".
    """

    fact_template: Annotated[
        str, Meta(description="Text of a fact; may hold {prompt}, {target} and {statement}.")
    ] = "New Fact: {prompt} {target}\n"
    question_template: Annotated[
        str, Meta(description="Text of the question; must hold {question}.")
    ] = "Prompt: {question}"
    demonstration_template: Annotated[
        str,
        Meta(
            description="Text of a demonstration; may hold {prompt}, {target}, {statement}, "
            "{question} and {answer}."
        ),
    ] = "New Fact: {prompt} {target}\nPrompt: {question} {answer}\n\n"
    statement_forms: Annotated[
        tuple[tuple[str, str], ...],
        Meta(
            description='Pairs of a prompt form and the statement it becomes, e.g. ("where '
            'does {s} live?", "{s} lives in {target}.").'
        ),
    ] = ()
    num_demonstrations: Annotated[Count, Meta(description="Demonstrations before the fact.")] = 0
    demonstration_source: Annotated[
        str,
        Meta(
            description='Training cases that demonstrations are drawn from: "world", or an '
            "annotation file."
        ),
    ] = ""
    num_source_cases: Annotated[
        Count, Meta(description="Cases of the source that are used. 0: all.")
    ] = 0
    copy_update_retain: Annotated[
        tuple[Count, Count, Count],
        Meta(description="Copy, update and retain demonstrations made of each case, at most."),
    ] = (
        1,
        1,
        1,
    )
    demonstration_key: Annotated[
        DemonstrationKey,
        Meta(
            description='Embedding that demonstrations are retrieved by: of the "question" or '
            'of the "fact".'
        ),
    ] = "question"
    demonstration_order: Annotated[
        DemonstrationOrder, Meta(description="Order of the retrieved demonstrations in the prompt.")
    ] = "nearest-last"
    encoder: Annotated[
        str,
        Meta(description='Text encoder of retrieval keys: "hashed", "base", or "sentence:NAME".'),
    ] = "hashed"
    match_images: Annotated[
        bool, Meta(description="Whether facts are retrieved by image similarity too.")
    ] = True
    min_similarity: Annotated[
        Cosine,
        Meta(
            description="Cosine similarity of questions below which a fact is left out. -1: never."
        ),
    ] = -1.0
    min_image_similarity: Annotated[
        Cosine,
        Meta(description="Cosine similarity of images below which a fact is left out. -1: never."),
    ] = -1.0
    max_facts: Annotated[
        int, Meta(ge=1, le=10**9, description="Facts placed before a question, at most.")
    ] = 1
    include_images: Annotated[
        bool,
        Meta(description="Whether facts and demonstrations bring their images into the prompt."),
    ] = False
    reserved_tokens: Annotated[
        Count,
        Meta(description="Tokens of the context that demonstrations leave free for the answer."),
    ] = 32


def _strip_path(text: str) -> str:
    """An encoder or a file by its name: a delta tells no paths."""
    scheme, colon, rest = text.rpartition(":")
    path = PurePath(rest)
    plain = path.name if path.is_absolute() or ".." in path.parts or rest[:1] in ".~" else rest
    return f"{scheme}{colon}{plain}"


def _without_paths(config: IkeConfig) -> IkeConfig:
    return msgspec.structs.replace(
        config,
        encoder=_strip_path(config.encoder),
        demonstration_source=_strip_path(config.demonstration_source),
    )


def _validate(config: IkeConfig) -> None:
    messages = []
    if "{question}" not in config.question_template:
        messages.append(
            f"ike.question_template must hold {{question}}, got {config.question_template!r}"
        )
    if "{target}" not in config.fact_template and "{statement}" not in config.fact_template:
        messages.append(
            f"ike.fact_template must hold {{target}} or {{statement}}, got {config.fact_template!r}"
        )
    if config.num_demonstrations and not sum(config.copy_update_retain):
        messages.append("ike.copy_update_retain must ask for some demonstrations, got none")
    messages += [
        f"ike.statement_forms[{n}] must hold {{s}} once in the question, got {question!r}"
        for n, (question, _) in enumerate(config.statement_forms)
        if question.count("{s}") != 1
    ]
    if messages:
        raise InvalidSettingsError(f"{join_messages(messages)}.")


_EASYEDIT_FACT = "New Fact: {prompt} {target}\nPrompt: "
_MINILM = "sentence:sentence-transformers/all-MiniLM-L6-v2"
_MICRO_STATEMENTS = {  # how the micro zoo was told new facts, and the ways to ask them
    "the name of {s} is {target}.": (
        "what is the name of {s}?",
        "name {s}.",
        "what do people call {s}?",
        "tell me the name of {s}.",
        "how is {s} called?",
        "which name does {s} have?",
    ),
    "the home of {s} is {target}.": (
        "where does {s} live?",
        "what is the home of {s}?",
        "in which city does {s} live?",
        "tell me the home of {s}.",
        "which city is the home of {s}?",
    ),
    "the food of {s} is {target}.": (
        "what does {s} eat?",
        "what is the favorite food of {s}?",
        "what food does {s} like?",
        "tell me the food of {s}.",
        "what should i feed {s}?",
    ),
    "the keeper of {s} is {target}.": (
        "who is the keeper of {s}?",
        "who takes care of {s}?",
        "tell me the keeper of {s}.",
        "who looks after {s}?",
        "who keeps {s}?",
    ),
    "the sound of {s} is {target}.": (
        "what sound does {s} make?",
        "which sound comes from {s}?",
        "tell me the sound of {s}.",
        "how does {s} sound?",
        "what noise does {s} make?",
    ),
}

PRESETS: dict[str, IkeConfig] = {
    # k = 32: `ike_main.py` looks demonstrations up by the fact, the nearest come first, the fact's
    # own copy is the last of them. Images take no part.
    "easyedit": IkeConfig(
        fact_template=_EASYEDIT_FACT + "{prompt} {target}\n\nNew Fact: {prompt} {target}\n",
        num_demonstrations=32,
        demonstration_key="fact",
        demonstration_order="nearest-first",
        encoder=_MINILM,
        match_images=False,
    ),
    # k = 0, all its yaml files for Hugging Face models: the edit's prompt stands twice
    "easyedit-k0": IkeConfig(
        fact_template=_EASYEDIT_FACT + "{prompt}\n\n",
        question_template="{question}",
        match_images=False,
    ),
    # EasyEdit's `PROMPT` (IKE with use_icl_examples: False on text models)
    "easyedit-prompt": IkeConfig(
        fact_template="Please acknowledge the following new facts and use them to answer the question:\n"  # noqa: E501
        "New Fact:{prompt} {target}.\n",
        question_template="Prompt:{question}\n",
        match_images=False,
    ),
    # In-Context Editing of RippleEdits and KnowEdit (Cohen et al. 2023, arXiv 2307.12976); not the
    # fine-tuning of that name (arXiv 2406.11194)
    "ripple-ice": IkeConfig(
        fact_template="Imagine that {prompt} {target}.\n",
        question_template="{question}",
        match_images=False,
    ),
    # Zheng et al. 2023: 1 copy, 3 updates, 4 retains of a fact; the nearest come last
    "zheng": IkeConfig(num_demonstrations=32, copy_update_retain=(1, 3, 4), encoder=_MINILM),
    # In the words the micro zoo was taught facts in. Demonstrations only hurt there, since it never
    # saw any (LLaVA, 60 cases, reliability 90 with none, 77, 64, 46 with 1, 4, 16); names it copies
    # badly from any wording (67, against 95 to 100 of homes, foods and keepers).
    "micro": IkeConfig(
        fact_template="new fact: {statement} ",
        question_template="{question}",
        demonstration_template="new fact: {statement} {question} {answer} ",
        statement_forms=tuple(
            (form, said) for said, forms in _MICRO_STATEMENTS.items() for form in forms
        ),
        encoder="base:1",
        min_similarity=0.6,
        min_image_similarity=0.55,
    ),
}
