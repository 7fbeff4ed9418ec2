"""Real text as filler: the documentation of the running Python, which is installed with it.

Evaluation reads the last fifth of it, training the rest. The text differs between versions of Python.
"""

import functools
import re

import numpy as np

from famx.data.vocabularies import ByteVocabulary, token_ids


def python_docs(rng: np.random.Generator, count: int, evaluation: bool) -> np.ndarray:
    """Int32 `[count]` byte ids of the documentation, from a random place on, read cyclically."""
    part = _documentation(evaluation)
    start = int(rng.integers(len(part)))
    rounds = part[start:] + part * (-(-count // len(part)))
    return token_ids(rounds[:count], ByteVocabulary())


@functools.cache
def python_docs_sentences(evaluation: bool) -> tuple[str, ...]:
    """Sentences, headings and lines of code of the documentation, in order, in ASCII."""
    text = _documentation(evaluation).decode("ascii", errors="ignore")
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    sentences = [s for paragraph in paragraphs for s in re.split(r"(?<=[.!?:]) ", paragraph)]
    return tuple(s for s in sentences if re.search("[a-z]{2}", s))


@functools.cache
def _documentation(evaluation: bool) -> bytes:
    from pydoc_data.topics import topics

    data = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    cut = len(data) * 4 // 5
    return data[cut:] if evaluation else data[:cut]
