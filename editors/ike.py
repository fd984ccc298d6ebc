"""IKE: the weights stay as they are; the new fact is said before the question.

    read(q) = read( d_1 ... d_k  fact  q ),   fact and demonstrations found for q in a memory

An edit adds its fact to the memory, under a key of its question and one of its picture. For each
question the facts that fit are found by both (`functional/prompts.py` has the formula), and the
demonstrations nearest to fact and question: a fact with its own question (copy), with the same in
other words (update), with a question it says nothing about (retain), from training cases.

Sources: Zheng et al. 2023 (arXiv 2305.12740); EasyEdit `models/ike/ike_main.py`, `util.py` and
`editors/multimodal_editor.py` for vision-language models. Different from both:

* A sequence keeps all its facts and finds the right one for each question. They put each edit's
  own fact before whatever is asked, so that edits made earlier are gone.
* The target of a question takes no part. They build a prompt for one known fact, and EasyEdit looks
  its demonstrations up with the answer in the query.
* With `least` or `least_look` above -1 a question that no fact fits is read as ever; they say the
  fact before every question, which is why their localities are low.
* Where the backbone takes several pictures, demonstrations and facts may show theirs (`pictured`).

Cost of an edit: its question and its picture are encoded once and added to the memory; nothing is
trained. Cost of a question: one product with the memory's keys, and the tokens put before it.
Legend: E edits · N facts · D demonstrations · d, v widths of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from errata.functional import Case, Delta, Editor, EditRecord, Model, Prompt, Query
from errata.functional.encoders import get_encoder, image_keys, resolve_encoder
from errata.functional.entries import DemonstrationKey, DemonstrationOrder
from errata.functional.errors import InvalidInputError, InvalidSettingsError, join_messages
from errata.functional.prompt_algebra import CHUNK_BYTES, merge_memories
from errata.functional.prompts import as_png, fill_template, strip_placeholders, without_memories
from errata.functional.queries import IMAGE_PLACEHOLDER
from errata.functional.records import make_header

__all__ = ["PRESETS", "IkeState", "IkeConfig", "ike_editor"]

Count = Annotated[int, Meta(ge=0)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class IkeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ike"):
    """Settings of IKE.

    `fact` and `demo` may hold {prompt}, {target} and {statement}, `demo` also {question} and
    {answer}, `ask` {question}. A statement says prompt and target as a sentence, by the first of
    `forms` that the prompt has: ("where does {s} live?", "{s} lives in {target}."). Without one it
    is "{prompt} {target}".
    """

    fact_template: str = "New Fact: {prompt} {target}\n"
    question_template: str = "Prompt: {question}"
    demonstration_template: str = "New Fact: {prompt} {target}\nPrompt: {question} {answer}\n\n"
    statement_forms: tuple[tuple[str, str], ...] = ()
    num_demonstrations: Count = 0  # demonstrations before the fact
    demonstration_source: str = ""  # the training cases they are made of: "world", or a file
    num_source_cases: Count = 0  # how many of these cases; 0: all
    copy_update_retain: tuple[Count, Count, Count] = (
        1,
        1,
        1,
    )  # copy, update, retain of each, at most
    demonstration_key: DemonstrationKey = "question"
    demonstration_order: DemonstrationOrder = "nearest-last"
    encoder: str = "hashed"  # of questions: `functional/encoders.py`
    match_images: bool = True  # find by pictures too
    min_similarity: Cosine = (
        -1.0
    )  # similarity of questions below which a fact is not put in; -1: always
    min_image_similarity: Cosine = -1.0  # the same of pictures
    max_facts: Annotated[int, Meta(ge=1)] = 1  # facts before a question
    include_images: bool = False  # facts and demonstrations show their pictures
    reserved_tokens: Count = 32  # tokens of the context that demonstrations leave for the answer


class IkeState(NamedTuple):
    """State: the memory, its edits, and the demonstrations that all of them share."""

    facts: tuple[str, ...]
    memory: Mapping[str, Tensor]  # by suffix: .questions [N d], .pictures [N v], .shown, .sizes
    edits: tuple[EditRecord, ...]
    demonstrations: Mapping[str, Tensor]  # by suffix: .demos, .ends, .demo_keys, .demo_shown, ...


def ike_editor(config: IkeConfig = IkeConfig(), cases: Sequence[Case] | None = None) -> Editor:
    """IKE as an editor: the delta is a `prompt`, a memory of facts in words.

    `cases` are the training cases that demonstrations are made of; `errata run` reads those that
    `config.demonstrations` names. `remove` takes edits out of the delta by id. Raises BadSettings
    for demonstrations without cases, or an encoder that can not be had.

    >>> from errata import adapters
    >>> from errata.functional import bind
    >>> from errata.functional.prompts import expand_prompts
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = ike_editor()
    >>> state = editor.init(model, torch.Generator())
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> expand_prompts(bind(model, delta), [Query("who may this be?")])[0].prompt
    'New Fact: who is it? bo\\nPrompt: who may this be?'
    """
    _validate(config)

    def init(model: Model, generator: torch.Generator) -> IkeState:
        if config.num_demonstrations and not cases:
            raise InvalidSettingsError(
                f"ike.num_demonstrations = {config.num_demonstrations} demonstrations are made of training cases, and there are "
                "none: give ike(config, cases), or name them in `demonstration_source`."
            )
        demonstrations = (
            _make_demonstrations(model, config, list(cases or ()))
            if config.num_demonstrations
            else {}
        )
        return IkeState((), {}, (), demonstrations)

    def edit(model: Model, state: IkeState, queries: Sequence[Query]) -> tuple[Delta, IkeState]:
        facts, memory = encode_facts(model, config, queries)
        memory = merge_memories([state.memory, memory]) if state.facts else memory
        facts = state.facts + facts
        header = make_header(
            model,
            "ike",
            _without_paths(config),
            (_make_entry(model, config, facts, memory, state.demonstrations),),
            queries,
            earlier_edits=state.edits,
        )
        delta = _make_delta(header, {**memory, **state.demonstrations})
        return delta, IkeState(facts, memory, header.edits, state.demonstrations)

    def edit_each(model: Model, state: IkeState, queries: Sequence[Query]) -> Delta:
        new_facts, keys = encode_facts(model, config, queries)
        new_memories = [{s: x[e : e + 1] for s, x in keys.items()} for e in range(len(queries))]
        memories = [
            merge_memories([state.memory, new]) if state.facts else new for new in new_memories
        ]
        facts = tuple(text for fact in new_facts for text in (*state.facts, fact))
        memory = _stack_memories(memories)
        num_facts = len(state.facts) + 1
        edit_slots = (num_facts - 1,) * len(queries)
        entry = _make_entry(model, config, facts, memory, state.demonstrations, edit_slots)
        entry = msgspec.structs.replace(entry, num_facts=num_facts)
        header = make_header(
            model, "ike", _without_paths(config), (entry,), queries, stack=len(queries)
        )
        return _make_delta(header, {**memory, **state.demonstrations})

    return Editor("ike", config, init, edit, edit_each)


def encode_facts(
    model: Model, config: IkeConfig, queries: Sequence[Query]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Facts as they stand before a question, and their keys: what an edit adds to the memory."""
    messages = [
        f"query {n + 1} ({query.prompt[:40]!r}): prompt and target must not be empty"
        for n, query in enumerate(queries)
        if not (query.prompt.strip() and query.target.strip())
    ]
    if messages:
        raise InvalidInputError(f"{join_messages(messages)}.")
    model = without_memories(model)
    model.preprocess(queries)  # what can not be read can not be edited: said now, of all at once
    image_files = [
        [as_png(image) for image in query.images] if _includes_images(model, config, query) else []
        for query in queries
    ]
    facts = tuple(
        IMAGE_PLACEHOLDER * len(own) + _format_fact(config, query)
        for query, own in zip(queries, image_files)
    )
    encode = get_encoder(config.encoder, model)
    memory = {
        ".question_keys": encode(
            [strip_placeholders(query.prompt).strip() for query in queries]
        ).float()
    }
    if config.match_images and model.card.takes_images:
        memory[".image_keys"] = image_keys(model, queries)
    if any(image_files):
        memory |= dict(zip((".images", ".image_sizes"), _pack_images(image_files)))
    device = next(iter(model.params.values())).device
    return facts, {suffix: tensor.to(device) for suffix, tensor in memory.items()}


def _includes_images(model: Model, config: IkeConfig, query: Query) -> bool:
    return (
        config.include_images
        and model.card.takes_several_images
        and bool(query.images)
        and not query.video
    )


def _format_fact(config: IkeConfig, query: Query) -> str:
    return fill_template(config.fact_template, _template_values(config, query))


def _template_values(config: IkeConfig, query: Query) -> dict[str, str]:
    prompt, target = strip_placeholders(query.prompt).strip(), query.target.strip()
    return {
        "prompt": prompt,
        "target": target,
        "statement": to_statement(config.statement_forms, prompt, target),
    }


def to_statement(statement_forms: Sequence[tuple[str, str]], prompt: str, target: str) -> str:
    """Prompt and target as a sentence, by the first form that the prompt has.

    >>> to_statement([("where does {s} live?", "{s} lives in {target}.")], "where does bo live?", "rome")
    'bo lives in rome.'
    """
    for question, statement in statement_forms:
        before, _, after = question.partition("{s}")
        fits = prompt.startswith(before) and prompt.endswith(after)
        if fits and len(prompt) > len(before) + len(after):
            subject = prompt[len(before) : len(prompt) - len(after)]
            return fill_template(statement, {"s": subject, "target": target})
    return f"{prompt} {target}"


def _pack_images(image_files: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor]:
    """PNG files [N S W], padded with zeros, and their sizes [N S]."""
    max_images = max(map(len, image_files))
    max_bytes = max(len(file) for own in image_files for file in own)
    images = torch.zeros(
        len(image_files), max_images, -(-max_bytes // CHUNK_BYTES) * CHUNK_BYTES, dtype=torch.uint8
    )
    sizes = torch.zeros(len(image_files), max_images, dtype=torch.int64)
    for n, query_files in enumerate(image_files):
        for s, file in enumerate(query_files):
            images[n, s, : len(file)] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
            sizes[n, s] = len(file)
    return images, sizes


def _make_demonstrations(model: Model, config: IkeConfig, cases: list[Case]) -> dict[str, Tensor]:
    """Copy, update and retain texts of training cases, their pictures and their keys."""
    cases = cases[: config.num_source_cases or None]
    texts: list[str] = []
    image_files: list[bytes] = []
    image_index: list[int] = []
    for case in cases:
        values = _template_values(config, case.edit)
        image_number = -1
        if config.include_images and model.card.takes_several_images and len(case.edit.images) == 1:
            image_files.append(as_png(case.edit.images[0]))
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
            "the training cases give no demonstration: check `copy_update_retain` and `num_source_cases`."
        )
    raw = [text.encode() for text in texts]
    encode = get_encoder(config.encoder, without_memories(model))
    tensors = {
        ".demonstrations": _concat_bytes(raw),
        ".demonstration_ends": torch.tensor([len(text) for text in raw]).cumsum(0),
        ".demonstration_keys": encode([strip_placeholders(text) for text in texts]).float(),
    }
    if image_files:
        tensors |= {
            ".demonstration_images": _concat_bytes(image_files),
            ".demonstration_image_ends": torch.tensor([len(file) for file in image_files]).cumsum(
                0
            ),
            ".demonstration_image_index": torch.tensor(image_index),
        }
    device = next(iter(model.params.values())).device
    return {suffix: tensor.to(device) for suffix, tensor in tensors.items()}


def _demonstration_queries(
    case: Case, copy_update_retain: Sequence[int]
) -> list[tuple[Query, bool]]:
    """The questions of a case's demonstrations, and whether they are about its own picture."""
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


def _stack_memories(memories: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Memories of one length as tensors with an axis of edits."""
    count = len(memories[0][".question_keys"])
    merged = merge_memories(memories)
    return {s: x.reshape(len(memories), count, *x.shape[1:]) for s, x in merged.items()}


def _make_entry(
    model: Model,
    config: IkeConfig,
    facts: tuple[str, ...],
    memory: Mapping[str, Tensor],
    demonstrations: Mapping[str, Tensor],
    edit_slots: tuple[int, ...] | None = None,
) -> Prompt:
    embedding_name = f"{model.card.token_embedding}.weight"

    def size(name: str, axis: int) -> int:
        tensor = memory.get(name, demonstrations.get(name))
        return 0 if tensor is None else tensor.shape[axis]

    return Prompt(
        name=embedding_name,
        checkpoint_name=model.card.checkpoint_names.get(embedding_name, embedding_name),
        shape=tuple(model.params[embedding_name].shape),
        facts=facts,
        num_facts=len(facts),
        edit_slots=tuple(range(len(facts))) if edit_slots is None else edit_slots,
        question_template=config.question_template,
        encoder=_strip_path(resolve_encoder(config.encoder, model)),
        key_size=size(".question_keys", -1),
        image_key_size=size(".image_keys", -1),
        min_similarity=config.min_similarity,
        min_image_similarity=config.min_image_similarity,
        max_facts=config.max_facts,
        num_demonstrations=config.num_demonstrations,
        demonstration_key=config.demonstration_key,
        demonstration_order=config.demonstration_order,
        reserved_tokens=config.reserved_tokens,
        num_images=size(".images", -2),
        image_bytes=size(".images", -1),
        num_stored_demonstrations=size(".demonstration_ends", 0),
        demonstration_bytes=size(".demonstrations", 0),
        num_demonstration_images=size(".demonstration_image_ends", 0),
        demonstration_image_bytes=size(".demonstration_images", 0),
    )


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


def _make_delta(header: Any, tensors: Mapping[str, Tensor]) -> Delta:
    name = header.entries[0].name
    return Delta(header, {f"{name}{suffix}": tensor for suffix, tensor in tensors.items()})


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
    # own copy is the last of them. Pictures take no part.
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
        fact_template="Please acknowledge the following new facts and use them to answer the question:\n"
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
    # Zheng et al. 2023: 1 copy, 3 updates, 4 retains of a fact; the nearest stand last
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
