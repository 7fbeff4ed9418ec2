"""Means of a score over examples, with checks of what is compared."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Texts = Sequence[str | Collection[str]]


def mean_over_examples(
    names: Sequence[str],
    score: Callable[[str, str], Sequence[float]],
    targets: Texts,
    predictions: Sequence[str],
    over_references: Callable = np.max,
) -> dict[str, float]:
    """Average scores over examples and return `{name: 0..100}`.

    Args:
      names: names of the scores.
      score: `score(reference, prediction)` gives one number, 0..1, for each name.
      targets: reference or references of each example.
      predictions: one string per example.
      over_references: reduces the scores of several references, `over_references(scores, axis=0)`.

    Raises:
      ValueError: the counts differ or are 0, an example has no reference, or a value is not a string.
    """
    examples = [
        over_references([score(reference, prediction) for reference in references], axis=0)
        for references, prediction in _pairs(targets, predictions)
    ]
    return dict(zip(names, (100 * np.mean(examples, axis=0)).tolist()))


def _pairs(targets: Texts, predictions: Sequence[str]) -> list[tuple[list[str], str]]:
    """References and prediction of each example."""
    check_counts(targets=targets, predictions=predictions)
    pairs: list[tuple[list[str], str]] = []
    for i, (target, prediction) in enumerate(zip(targets, predictions)):
        several = isinstance(target, (list, tuple, set, frozenset, np.ndarray))
        references: list[Any] = list(target) if several else [target]
        if not references:
            raise ValueError(f"Example {i} has no reference; give at least one per example.")
        for text in (*references, prediction):
            if not isinstance(text, str):
                raise ValueError(
                    f"Example {i} has {text!r} in place of a string; a target is a string or a list of "
                    "strings, a prediction is a string."
                )
        pairs.append((references, prediction))
    return pairs


def check_counts(**sequences) -> None:
    """Raise ValueError unless all sequences have the same length, at least 1."""
    for name, values in sequences.items():
        if isinstance(values, (str, bytes)):
            raise ValueError(f"The {name} are one text; give a sequence with one entry per example.")
    counts = {name: len(values) for name, values in sequences.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"A metric got {listed}; give one of each per example.")
    if not any(counts.values()):
        raise ValueError(f"A metric got no {' and no '.join(counts)}; give at least one example.")
