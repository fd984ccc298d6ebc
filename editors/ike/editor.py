"""IKE: the weights do not change; the new fact is prepended to the question.

    read(q) = read( d_1 ... d_k  fact  q ),   fact and demonstrations retrieved for q from a memory

An edit adds its fact to the memory, with a key of its question and one of its image. For each
question the matching facts are retrieved by both (`functional/kinds/prompt/apply.py` has the
formula), and the demonstrations nearest to fact and question: a fact with its own question (copy),
with a rephrased one (update), or with an unrelated one (retain), from training cases.

Sources: Zheng et al. 2023 (arXiv 2305.12740); EasyEdit `models/ike/ike_main.py`, `util.py` and
`editors/multimodal_editor.py` for vision-language models. Different from both:

* A sequence keeps all its facts and retrieves the right one for each question. They prepend each
  edit's own fact to every question, so that earlier edits are lost.
* The target of a question has no influence. They build a prompt for one known fact, and EasyEdit
  retrieves its demonstrations with the answer in the query.
* With `min_similarity` or `min_image_similarity` above -1 a question that matches no fact is read
  unchanged; they prepend the fact to every question, which is why their localities are low.
* Where the backbone takes several images, demonstrations and facts may show theirs
  (`include_images`).

Cost of an edit: its question and its image are encoded once and added to the memory; nothing is
trained. Cost of a question: one product with the memory's keys, and the prepended tokens.
Legend: E edits · N facts · D demonstrations · d, v widths of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from errata.editors.common.guards import guarded
from errata.editors.ike.config import IkeConfig, _strip_path, _validate, _without_paths
from errata.editors.ike.demonstrations import _make_demonstrations, _template_values
from errata.functional import Case, Delta, Editor, EditRecord, Model, Query
from errata.functional.deltas.records import make_header
from errata.functional.errors import InvalidInputError, InvalidSettingsError, join_messages
from errata.functional.forward.retrieval_keys import get_encoder, image_keys, resolve_encoder
from errata.functional.kinds.prompt.algebra import CHUNK_BYTES, merge_memories
from errata.functional.kinds.prompt.apply import without_memories
from errata.functional.kinds.prompt.memory import fill_template, strip_placeholders
from errata.functional.kinds.schema import Prompt
from errata.functional.queries import IMAGE_PLACEHOLDER

__all__ = ["IkeState", "ike_editor"]


class IkeState(NamedTuple):
    """State: the memory, its edits, and the demonstrations that all of them share."""

    facts: tuple[str, ...]
    memory: Mapping[str, Tensor]  # by suffix: .questions [N d], .images [N v], .shown, .sizes
    edits: tuple[EditRecord, ...]
    demonstrations: Mapping[str, Tensor]  # by suffix: .demos, .ends, .demo_keys, .demo_shown, ...


def ike_editor(config: IkeConfig = IkeConfig(), cases: Sequence[Case] | None = None) -> Editor:
    """IKE as an editor: a `prompt` entry, a memory of facts as text.

    The state is the memory. Facts are retrieved by question and image, and placed before the
    question. No parameter changes.

    Args:
        config: The settings.
        cases: Training cases that demonstrations are made of.

    Returns:
        The editor.

    Raises:
        InvalidSettingsError: If a template lacks {question}, or an encoder cannot be loaded.
        InvalidInputError: If demonstrations are asked for without cases.

    References:
        Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?",
        arXiv:2305.12740.

    Example:
        >>> from errata import adapters
        >>> from errata.functional import bind
        >>> from errata.functional.kinds.prompt.apply import expand_prompts
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
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
                f"ike.num_demonstrations = {config.num_demonstrations} demonstrations are made of "
                "training cases, and there are "
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
        entry = msgspec.structs.replace(
            entry, num_facts=num_facts, shared_slots=tuple(range(len(state.facts)))
        )
        header = make_header(
            model,
            "ike",
            _without_paths(config),
            (entry,),
            queries,
            earlier_edits=state.edits,
            stack=len(queries),
        )
        return _make_delta(header, {**memory, **state.demonstrations})

    return guarded(Editor("ike", config, init, edit, edit_each))


def encode_facts(
    model: Model, config: IkeConfig, queries: Sequence[Query]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Format edits as facts to prepend, and compute their retrieval keys.

    Args:
        model: Model to edit.
        config: Settings.
        queries: Edits.

    Returns:
        The facts' texts, and the tensors of the memory.

    Raises:
        InvalidInputError: If a prompt or a target is empty.
    """
    messages = [
        f"query {n + 1} ({query.prompt[:40]!r}): prompt and target must not be empty"
        for n, query in enumerate(queries)
        if not (query.prompt.strip() and query.target.strip())
    ]
    if messages:
        raise InvalidInputError(f"{join_messages(messages)}.")
    model = without_memories(model)
    model.preprocess(queries)  # what cannot be read cannot be edited: said now, of all at once
    image_files = [
        [model.encode_image(image) for image in query.images]
        if _includes_images(model, config, query)
        else []
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


def _pack_images(image_files: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor]:
    """PNG files [N S W], padded with zeros, and their sizes [N S]."""
    max_images = max(map(len, image_files))
    max_bytes = max(len(file) for own in image_files for file in own)
    images = torch.zeros(
        len(image_files),
        max_images,
        -(-max_bytes // CHUNK_BYTES) * CHUNK_BYTES,
        dtype=torch.uint8,
        device="cpu",
    )
    sizes = torch.zeros(len(image_files), max_images, dtype=torch.int64, device="cpu")
    for n, query_files in enumerate(image_files):
        for s, file in enumerate(query_files):
            images[n, s, : len(file)] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
            sizes[n, s] = len(file)
    return images, sizes


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
        checkpoint_name=model.card.checkpoint_name(embedding_name),
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


def _make_delta(header: Any, tensors: Mapping[str, Tensor]) -> Delta:
    name = header.entries[0].name
    return Delta(header, {f"{name}{suffix}": tensor for suffix, tensor in tensors.items()})
