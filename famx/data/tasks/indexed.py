"""Examples of a task that is made by index, as documents."""

from typing import Any

import numpy as np

from famx.base.features import VALUE_WEIGHTS, VALUES, Feature, features_of, values_of
from famx.data.tasks.kinds import Made


class IndexedDocuments:
    """Examples `start` to `start + count - 1` of a task as documents, all of one length.

    Item `i` is the pair (tokens int32 `[length]`, loss weights float32 `[length]`) or, if the task has
    features or values, a dict as of any documents that have such.
    """

    def __init__(self, task: Made, length: int, count: int, start: int = 0):
        self.task, self.length, self._count, self._start = task, length, count, start

    def __len__(self) -> int:
        return self._count

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features of the task besides tokens."""
        return features_of(self.task)

    @property
    def value_width(self) -> int:
        """Number of values that the task wants predicted at each position."""
        return values_of(self.task)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray] | dict[str, Any]:
        if not 0 <= i < self._count:
            raise IndexError(f"Document {i} is not one of {self._count} documents.")
        batch = self.task.batch([self._start + i], self.length)  # `example` may also decode the prompt
        tokens, weights = batch["decoder_target_tokens"][0], batch["decoder_loss_weights"][0]
        if not self.features and not self.value_width:
            return tokens, weights
        document: dict[str, Any] = {"tokens": tokens, "weights": weights}
        document["features"] = {feature.name: batch[feature.key][0] for feature in self.features}
        if self.value_width:
            document |= {"values": batch[VALUES][0], "value_weights": batch[VALUE_WEIGHTS][0]}
        return document

    def num_tokens(self, i: int) -> int:
        """Number of tokens, the same for every document."""
        return self.length
