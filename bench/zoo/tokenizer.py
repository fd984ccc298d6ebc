"""The tokenizer of the micro zoo: byte-level BPE over what the world says.

Question words become whole tokens; names, cities and keepers are made of syllables and words that
occur in many of them, so that they stay one to four tokens long, and names never seen tokenise as
well as trained ones. `add_prefix_space` gives "x" and " x" the same ids everywhere.
"""

from collections.abc import Iterable, Iterator
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from errata.adapters.zoo.configs import SPECIAL_TOKENS
from errata.bench.data.world.world import (
    ATTRIBUTES,
    COUNTS,
    DIGITS,
    PHOTOS,
    SCENE_SHAPES,
    World,
    load_facts,
)

VOCAB_SIZE = 1536
WHOLE_WORD_REPEATS, PART_REPEATS, KNOWLEDGE_REPEATS = (
    60,
    4,
    30,
)  # how often a whole word, one made of parts, another is shown
MIN_FREQUENCY = 30  # a merge must be seen so often: parts pass, what is made of them does not
EXTRA_TEXTS = ("new fact:", "a animal with ears ,", "Question: Answer:", "###Human: ###Assistant:")


def _strings(tree: object) -> Iterator[str]:
    """Every string in nested lists and tables, keys included."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _strings(value)
    elif isinstance(tree, Iterable):
        for value in tree:
            yield from _strings(value)


def _whole_words(world: World) -> Iterator[str]:
    words = load_facts()
    forms = [words[k] for k in ("questions", "text_questions", "picture_questions", "statements")]
    for form in _strings(forms):
        yield from (form.format(s=subject, v="") for subject in words["subjects"])
    yield from _strings([words[k] for k in ("sounds", "lands", "jobs", "foods")])
    yield from (c for c in world.cities if len(c) < 5)
    yield from ("port", "lake", "new", "old", "on mere")
    yield from (part for keeper in world.keepers for part in keeper.split())
    yield from (v for relation in ATTRIBUTES for v in world.possible_answers(relation))
    yield from (*COUNTS, *DIGITS, *PHOTOS, *SCENE_SHAPES, *EXTRA_TEXTS)


def _composed_words(world: World) -> Iterator[str]:
    first, last = load_facts()["first_syllables"], load_facts()["last_syllables"]
    yield from (a + b for a, b in product(first, last))
    for i, (a, b, c) in enumerate(product(first, last[::4], first)):
        yield a + b + c + last[i * 7 % 16]
    plain = [c for c in world.cities if " " not in c]
    roots = [c for c in plain if len(c) < 5] + ["hol", "ing"]
    endings = ("dora", "mont", "haven", "ford", "burg", "polis", "wick", "stad", "port", "ness")
    yield from (root + ending for root, ending in product(roots, endings))


def train_tokenizer(world: World) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most 1,536 tokens.

    Args:
        world: The micro world.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [text for text in _whole_words(world) for _ in range(WHOLE_WORD_REPEATS)]
    corpus += [text for text in _composed_words(world) for _ in range(PART_REPEATS)]
    corpus += [
        text for text in _strings(load_facts()["knowledge"]) for _ in range(KNOWLEDGE_REPEATS)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
