"""Accuracy of choices that are ranked by a score."""

import numpy as np

from famx.data.metrics.averaging import check_counts


def rank_accuracy(scores, targets, lengths=None) -> dict[str, float]:
    """`{"accuracy"}`, 0..100: share of examples whose choice with the highest score is right.

    The number of choices may differ between examples. Of equal scores the first wins, as in T5.

    Args:
      scores: log-likelihood of each choice, float `[B, choices]` or a list of lists.
      targets: index of the right choice, int `[B]`; or a collection of indices per example, if
        several choices are right.
      lengths: number of tokens or characters of each choice, in the form of `scores`, by which the
        scores are divided; None: scores are compared as they are.

    Raises:
      ValueError: the counts differ or are 0, an example has no choice, a score is NaN, a target is not
        the index of a choice, or a length is not positive.
    """
    check_counts(scores=scores, targets=targets)
    if lengths is not None:
        check_counts(scores=scores, lengths=lengths)
    hits = []
    for i, (row, target) in enumerate(zip(scores, targets)):
        row = np.asarray(row, np.float64)
        if row.ndim != 1 or not row.size or np.isnan(row).any():
            raise ValueError(
                f"The scores of example {i} are {row.tolist()}; give one number per choice, not NaN."
            )
        right = np.atleast_1d(list(target) if isinstance(target, (set, frozenset)) else target)
        if not right.size or right.dtype.kind not in "iu" or right.min() < 0 or right.max() >= row.size:
            raise ValueError(
                f"The target of example {i} is {target!r}; give the index of a right choice, 0 to "
                f"{row.size - 1}, or several."
            )
        if lengths is not None:
            length = np.asarray(lengths[i], np.float64)
            if length.shape != row.shape or not (length > 0).all():
                raise ValueError(
                    f"The lengths of example {i} are {length.tolist()}; give one above 0 for each of "
                    f"its {row.size} choices."
                )
            row = row / length
        hits.append(row.argmax() in right)
    return {"accuracy": 100 * float(np.mean(hits))}
