"""Texts as token ids, without bos and eos."""

import numpy as np

from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.simple import ByteVocabulary


def token_ids(text: str | bytes, vocabulary: Vocabulary) -> np.ndarray:
    """Encode a text as int32 ids `[n]`; `bytes` are decoded as UTF-8 with replacement characters."""
    if isinstance(vocabulary, ByteVocabulary):  # a copy of the bytes, without a list of Python ints
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32) + vocabulary.num_special_ids
    text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    return np.array(vocabulary.encode(text), np.int32)


def encode_after(vocabulary: Vocabulary, text: str, before: str) -> list[int]:
    """Ids that `text` gets when it follows `before`.

    If no id boundary falls between the two, `text` is encoded alone.
    """
    if before:
        first = vocabulary.encode(before)
        ids = vocabulary.encode(before + text)
        if ids[: len(first)] == first:
            return ids[len(first) :]
    return vocabulary.encode(text)
