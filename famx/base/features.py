"""Features: what a batch holds for every position of a sequence besides tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from famx.base.ranges import Name, NonNegative
from famx.base.values import checked

INPUT = "decoder_input_"  # what the names of inputs begin with in a batch
VALUES, VALUE_WEIGHTS = "decoder_target_values", "decoder_value_weights"


@checked
@dataclasses.dataclass(frozen=True)
class Feature:
    """An array of a batch, `[B, L, width]`, or `[B, L]` if the width is 0.

    Attributes:
      name: its name; in a batch it is `decoder_input_<name>`.
      width: numbers per position; 0: one number, without an axis of its own.
      dtype: "float32" or "int32".
    """

    name: Name
    width: NonNegative
    dtype: Literal["float32", "int32"] = "float32"

    @property
    def key(self) -> str:
        """The name of the array in a batch."""
        return INPUT + self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the feature of one position."""
        return (self.width,) if self.width else ()

    def zeros(self, *shape: int) -> np.ndarray:
        """The array for positions of this shape, all zeros."""
        return np.zeros((*shape, *self.shape), self.dtype)

    def check(self, array: Any, length: int) -> np.ndarray:
        """`array` as `[length, width]` in the feature's dtype; ValueError if it has another shape."""
        array = np.asarray(array, self.dtype)
        if array.shape != (length, *self.shape):
            raise ValueError(
                f"The feature {self.name!r} has the shape {list(array.shape)}, but should have"
                f" {[length, *self.shape]}."
            )
        return array

    def __str__(self) -> str:
        return f"{self.name!r} ({self.width or 'one'} {self.dtype})"


TOKENS = Feature("tokens", 0, "int32")
KINDS = Feature("kinds", 0, "int32")


def features_of(data: Any) -> tuple[Feature, ...]:
    """Features of a task, of documents or of a frontend, besides tokens; () for those of tokens alone."""
    return tuple(x for x in getattr(data, "features", ()) if x.name != TOKENS.name)


def values_of(data: Any) -> int:
    """Number of values that a task or documents want predicted at each position; 0: none."""
    return int(getattr(data, "value_width", 0))


def with_features(
    batch: dict[str, np.ndarray], examples: Sequence[Mapping[str, Any]], features: Sequence[Feature],
    values: int = 0,
) -> dict[str, np.ndarray]:
    """A batch with the features, and the values to predict, of its examples of one length.

    Args:
      batch: the batch so far.
      examples: each with `features`, a dict of arrays by name, and with `values` (`[L, values]` or, if it
        is 1, `[L]`) and `value_weights` `[L]` if there are values to predict.
      features: what the examples have.
      values: number of values.

    Raises:
      ValueError: a feature is missing or has another shape.
    """
    for feature in features:
        rows = []
        for example in examples:
            if feature.name not in example.get("features", {}):
                raise ValueError(f"An example has no feature {feature.name!r}, which its task declares.")
            rows.append(feature.check(example["features"][feature.name], len(example["tokens"])))
        batch[feature.key] = np.stack(rows)
    if values:
        shape = (len(examples), len(examples[0]["tokens"]))
        wanted = [np.asarray(example["values"], np.float32) for example in examples]
        try:
            batch[VALUES] = np.stack(wanted).reshape(*shape, values)
            weights = np.stack([np.asarray(x["value_weights"], np.float32) for x in examples])
            batch[VALUE_WEIGHTS] = weights.reshape(shape)
        except ValueError as error:
            raise ValueError(
                f"The values of an example must be [length, {values}], and their weights [length]:"
                f" {error}"
            ) from error
    return batch
