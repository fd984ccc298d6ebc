r"""Keys for the retrieval of facts: of questions as text, and of images.

    hashed:D       words and letters, hashed to D numbers: the same everywhere, without meaning
    base:LAYER     the base's hidden state of the question, at its last token before that layer
    sentence:NAME  a sentence-transformers model, loaded by `Model.load_text_encoder`

`hashed` in full, so that another program can make the same keys: the text in lower case; words are
runs of letters, digits and underscores (Python's `\w+`). A word w has the features "w " + w and
"c " + each run of 3 and of 4 characters of "^" + w + "$". Two adjacent words have "b " + both with
a space between. A feature that occurs n times adds s (1 + ln n) to number h mod D, where h is the
crc32 (zlib's) of its UTF-8 bytes and s is +1 if h >= 2^31, else -1. The key has length 1.

Legend: B texts or questions · d, v widths of keys.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.forward.batches import prompt_end_mask
from errata.functional.queries import Query
from errata.functional.types import Model, TextEncoder

__all__ = ["get_encoder", "hashed_ngrams", "image_keys", "resolve_encoder"]

DEFAULT_KEY_DIM = 512  # of hashed keys
BATCH_SIZE = 32  # questions per batch of the base


def resolve_encoder(name: str, model: Model) -> str:
    """Return the full name of an encoder, as a delta file stores it.

    Args:
        name: "hashed", "hashed:D", "base", "base:LAYER", or the name of a sentence encoder with or
            without "sentence:".
        model: The base, whose number of layers gives the default of "base".

    Returns:
        The name with its scheme and number. The defaults are 512 and the middle layer.

    Raises:
        InvalidSettingsError: If the number is out of range.
    """
    scheme, _, rest = name.partition(":")
    if scheme not in ("hashed", "base"):
        return name if scheme == "sentence" and rest else f"sentence:{name}"
    count = model.card.num_layers
    if not rest:
        return f"hashed:{DEFAULT_KEY_DIM}" if scheme == "hashed" else f"base:{max(1, count // 2)}"
    lowest, highest = (8, 1 << 16) if scheme == "hashed" else (1, count - 1)
    if not (rest.isdecimal() and lowest <= int(rest) <= highest):
        what = "a width" if scheme == "hashed" else "a layer"
        raise InvalidSettingsError(
            f"encoder {name!r} must name {what} from {lowest} to {highest}: {scheme}:{lowest}."
        )
    return f"{scheme}:{int(rest)}"


def get_encoder(name: str, model: Model) -> TextEncoder:
    """Return the encoder of a name.

    Args:
        name: "hashed", "hashed:D", "base", "base:LAYER", or the name of a sentence encoder.
        model: The base whose hidden states "base" uses, and which loads sentence encoders.

    Returns:
        The encoder: texts to unit keys [B d].

    Raises:
        InvalidSettingsError: If the number is out of range or the encoder cannot be loaded.
    """
    scheme, _, rest = resolve_encoder(name, model).partition(":")
    if scheme == "hashed":
        return lambda texts: hashed_ngrams(texts, int(rest))
    if scheme == "base":
        return lambda texts: _base_layer_keys(model, texts, int(rest))
    return model.load_text_encoder(rest)


def hashed_ngrams(texts: Sequence[str], dim: int = DEFAULT_KEY_DIM) -> Tensor:
    """Compute hashed keys of words and letters, by the recipe at the top of this module.

    Args:
        texts: The texts.
        dim: d.

    Returns:
        Unit keys [B d] fp32; zero for a text without words.

    Example:
        >>> one, two, other = hashed_ngrams(["who is it?", "WHO is it", "a cat sat"])
        >>> bool(one @ two > 0.99), bool(one @ other < 0.5)
        (True, True)
    """
    keys = torch.zeros(len(texts), dim, dtype=torch.float64, device="cpu")
    for row, text in enumerate(texts):
        for feature, count in Counter(_ngram_features(text)).items():
            code = zlib.crc32(feature.encode("utf-8", "replace"))
            sign = 1.0 if code >= 1 << 31 else -1.0
            keys[row, code % dim] += sign * (1 + math.log(count))
    return F.normalize(keys, dim=-1).float()


def _ngram_features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    features = [f"w {word}" for word in words]
    features += [f"b {one} {two}" for one, two in zip(words, words[1:])]
    for word in words:
        marked = f"^{word}$"
        features += [f"c {marked[i : i + n]}" for n in (3, 4) for i in range(len(marked) - n + 1)]
    return features


def _base_layer_keys(model: Model, texts: Sequence[str], layer: int) -> Tensor:
    """Compute keys from the base's hidden states before a layer, at the last token of each text.

    The text is asked without an image. Two phrasings of one question have similar keys there.
    """
    parts = []
    with torch.no_grad():
        for begin in range(0, len(texts), BATCH_SIZE):
            inputs = model.preprocess([Query(text) for text in texts[begin : begin + BATCH_SIZE]])
            batch = model.decode(model.params, model.embed(model.params, inputs), stop=layer)
            last = prompt_end_mask(inputs).int().argmax(1)[:, None, None]  # [B 1 1]
            rows = batch.hidden_states.gather(1, last.expand(-1, 1, batch.hidden_states.shape[-1]))[
                :, 0
            ]
            parts.append(rows.float())
    return F.normalize(torch.cat(parts), dim=-1)


def image_keys(model: Model, queries: Sequence[Query]) -> Tensor:
    """Compute keys of the images of questions, from the base's image tokens at depth 0.

    k = normalize( mean of hidden_states[t] over image tokens t ); zero for a question without
    images.

    The image tokens are the output of the projector, so v is the hidden size, and no further
    network is needed.

    Args:
        model: The base.
        queries: The questions.

    Returns:
        [B v] fp32.

    Raises:
        InvalidInputError: If the model's visual features are not finite.
    """
    keys = torch.zeros(len(queries), model.card.hidden_size, dtype=torch.float32, device="cpu")
    with_images = [n for n, query in enumerate(queries) if query.images]
    with torch.no_grad():
        for begin in range(0, len(with_images), BATCH_SIZE):
            indices = with_images[begin : begin + BATCH_SIZE]
            image_queries = [Query("?", "", queries[n].images, queries[n].video) for n in indices]
            inputs = model.preprocess(image_queries)
            batch = model.embed(model.params, inputs)
            image_mask = batch.image_mask[..., None].float()
            mean = (batch.hidden_states.float() * image_mask).sum(1) / image_mask.sum(1).clamp_min(
                1
            )  # [b D]
            if not bool(mean.isfinite().all()):
                raise InvalidInputError("the model's visual features must be finite, and are not.")
            keys = keys.to(mean.device).index_copy(
                0,
                torch.tensor(indices, device=mean.device, dtype=torch.int64),
                F.normalize(mean, dim=-1),
            )
    return keys
