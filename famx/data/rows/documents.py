"""Documents by number, which lanes and packed rows read."""

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Documents(Protocol):
    """Documents by number.

    Item `i` is int32 `[n]`, the token ids of a document, or a pair of these and float32 `[n]` loss
    weights. No document may be empty, and none may change during a run.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


@runtime_checkable
class CountedDocuments(Documents, Protocol):
    """Documents whose sizes are known without reading them.

    With `num_tokens`, a host does not read the documents of other hosts' lanes; without it, every host
    reads every document to learn its size.
    """

    def num_tokens(self, i: int) -> int:
        """Number of tokens of document `i`."""
        ...


@runtime_checkable
class CheckedDocuments(Documents, Protocol):
    """Documents that can be checked without making their tokens."""

    def check(self, i: int) -> None:
        """Raise BadRecord if document `i` cannot be used."""
        ...

    def where(self, i: int) -> str:
        """The place of document `i` for a message, such as its file and line."""
        ...


def place_of(documents: Any, i: int) -> str:
    """The place of a document for a message: its file, if the documents tell, and its number."""
    if isinstance(documents, CheckedDocuments):
        return f"Document {i} ({documents.where(i)})"
    return f"Document {i}"


def tokens_and_weights(document: Any) -> tuple[np.ndarray, np.ndarray]:
    """Int32 `[n]` ids and float32 `[n]` loss weights of a document; weights default to 1."""
    if isinstance(document, tuple):
        return document
    tokens = np.asarray(document, np.int32)
    return tokens, np.ones(len(tokens), np.float32)
