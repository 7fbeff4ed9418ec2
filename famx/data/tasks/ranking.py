"""Scoring by candidates: the log-likelihoods to ask for, and how choices are compared.

| scoring | score of a choice |
|---|---|
| `sum` | its log-likelihood after the inputs |
| `mean` | the same divided by its number of tokens |
| `unconditional` | the same minus its log-likelihood after the answer context, which has no question |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCORINGS = ("sum", "mean", "unconditional")


def requests(
    example: Mapping[str, Any], scoring: str, answer_context: str
) -> list[tuple[str, str]]:
    """Pairs (inputs, targets) whose log-likelihoods `choice_scores` needs, in its order."""
    if "contexts" in example:
        return [(context, example["targets"]) for context in example["contexts"]]
    pairs = [(example["inputs"], choice) for choice in example["choices"]]
    if scoring == "unconditional":
        pairs += [(answer_context, choice) for choice in example["choices"]]
    return pairs


def choice_scores(
    example: Mapping[str, Any], scored: Sequence[tuple[float, int]], scoring: str
) -> list[float]:
    """A score for each choice; the highest is the model's answer.

    Args:
      example: the example.
      scored: (log-likelihood, number of tokens) of each of its `requests`.
      scoring: one of `SCORINGS`.
    """
    n = len(example["choices"])
    sums, counts = np.array([x[0] for x in scored], float), np.array([x[1] for x in scored], float)
    if scoring == "mean":
        sums = sums / np.maximum(counts, 1)
    return (sums[:n] - sums[n:] if len(sums) > n else sums).tolist()
