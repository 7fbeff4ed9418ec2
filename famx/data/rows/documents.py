"""Documents by number, which lanes and packed rows read."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from famx.base.features import VALUE_WEIGHTS, VALUES, Feature, features_of, values_of, with_features


@runtime_checkable
class Documents(Protocol):
    """Documents by number.

    Item `i` is int32 `[n]`, the token ids of a document, or a pair of these and float32 `[n]` loss
    weights. No document may be empty, and none may change during a run.

    Documents with an attribute `features`, a tuple of `famx.base.features.Feature`, have features besides
    tokens, or in their place; those with an attribute `value_width` have as many values to predict at
    each position. An item is then a dict of `tokens` (targets), `weights`, `features` by name,
    `values` and `value_weights`, each `[n, ...]`.
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
    if isinstance(document, Mapping):
        return np.asarray(document["tokens"], np.int32), np.asarray(document["weights"], np.float32)
    tokens = np.asarray(document, np.int32)
    return tokens, np.ones(len(tokens), np.float32)


def columns(documents: Any, i: int, bos_id: int) -> dict[str, np.ndarray]:
    """The arrays of document `i`, each `[n, ...]`, by their names in a batch.

    Raises:
      ValueError: a feature of the document is missing or has another shape.
    """
    document = documents[i]
    tokens, weights = tokens_and_weights(document)
    found = dict(
        decoder_input_tokens=np.concatenate([[bos_id], tokens[:-1]]).astype(np.int32),
        decoder_target_tokens=tokens,
        decoder_loss_weights=weights,
    )
    features, values = features_of(documents), values_of(documents)
    if features or values:
        of_batch = with_features({}, [document], features, values)
        found |= {name: array[0] for name, array in of_batch.items()}
    return found


def empty_rows(documents: Any, rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A batch of padding alone, with all arrays that `columns` gives for these documents."""
    features: tuple[Feature, ...] = features_of(documents)
    values = values_of(documents)
    batch = dict(
        decoder_input_tokens=np.full((rows, length), pad_id, np.int32),
        decoder_target_tokens=np.full((rows, length), pad_id, np.int32),
        decoder_loss_weights=np.zeros((rows, length), np.float32),
    )
    batch |= {feature.key: feature.zeros(rows, length) for feature in features}
    if values:
        batch[VALUES] = np.zeros((rows, length, values), np.float32)
        batch[VALUE_WEIGHTS] = np.zeros((rows, length), np.float32)
    return batch
