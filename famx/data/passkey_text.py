"""The texts of the PassKey task: its sentences, its word vocabulary and its fillers."""

import functools

import numpy as np

from famx.data.vocabularies import ByteVocabulary, WordVocabulary

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
STATEMENT = ("The pass key is", ". Remember it.", "is the pass key.")  # a key after 1st, 2nd part
QUESTION = "What is the pass key? The pass key is"
REPEATED_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
FILLER_WORDS = (
    "river stone window garden music bread paper winter summer bridge candle forest island mirror "
    "silver copper velvet anchor basket blanket bottle branch butter castle circle cotton desert "
    "dragon engine feather finger hammer harbor jacket kitchen ladder lemon market meadow needle"
).split()


@functools.cache
def passkey_words() -> WordVocabulary:
    """The word vocabulary of the task: digits, punctuation, the words of its texts, the filler."""
    text = " ".join((HEADER, *STATEMENT, QUESTION, REPEATED_FILLER, *FILLER_WORDS))
    words = [w.strip(".,?") for w in text.split()]
    return WordVocabulary([*"0123456789.,?", *dict.fromkeys(w for w in words if w)])


def random_words(
    rng: np.random.Generator, count: int, vocabulary: WordVocabulary | ByteVocabulary
) -> np.ndarray:
    """int32 [count] tokens of words drawn uniformly from `FILLER_WORDS`."""
    if isinstance(vocabulary, WordVocabulary):
        ids = np.array(vocabulary.encode(" ".join(FILLER_WORDS)), np.int32)
        return ids[rng.integers(0, len(ids), count, np.uint8)]
    shortest = min(len(word) for word in FILLER_WORDS) + 1
    draws = rng.integers(0, len(FILLER_WORDS), -(-count // shortest), np.uint8)
    text = " ".join([FILLER_WORDS[i] for i in draws.tolist()]) + " "
    return _byte_ids(text.encode("ascii")[:count])


def python_docs(rng: np.random.Generator, count: int, evaluation: bool) -> np.ndarray:
    """int32 [count] byte ids of Python's own documentation, from a random place, wrapping round.

    Evaluation reads the last fifth of it, training the rest.
    """
    documentation = _python_documentation()
    cut = len(documentation) * 4 // 5
    part = documentation[cut:] if evaluation else documentation[:cut]
    return np.resize(np.roll(part, -int(rng.integers(len(part)))), count)


@functools.cache
def _python_documentation() -> np.ndarray:
    from pydoc_data.topics import topics

    return _byte_ids("\n".join(topics[name] for name in sorted(topics)).encode("utf-8"))


def _byte_ids(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int32) + ByteVocabulary.num_special_ids
