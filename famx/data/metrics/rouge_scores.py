"""ROUGE-N and ROUGE-L of token sequences.

ROUGE (Lin, 2004) counts what a prediction and a reference have in common: runs of `n` tokens (ROUGE-N),
or their longest common subsequence (ROUGE-L). All scores are F-measures, 0..1.
"""

import collections
from collections.abc import Hashable, Sequence


def rouge_n(reference: Sequence[Hashable], prediction: Sequence[Hashable], n: int) -> float:
    """ROUGE-N, 0..1: F-measure of the runs of `n` tokens, counted with multiplicity.

    It is 0 if either sequence has no such run. With `n=1` it is the token F1 of SQuAD.
    """
    if n < 1:
        raise ValueError(f"ROUGE-N needs runs of at least 1 token, but n is {n}.")
    reference_runs, prediction_runs = (
        collections.Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (reference, prediction)
    )
    common = (reference_runs & prediction_runs).total()
    return _f_measure(common, reference_runs.total(), prediction_runs.total())


def rouge_l(reference: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """ROUGE-L, 0..1: F-measure of the longest common subsequence; 0 if either sequence is empty."""
    return _f_measure(lcs_length(reference, prediction), len(reference), len(prediction))


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, in about `len(first) * len(second) / 64` steps."""
    positions: dict[Hashable, int] = collections.defaultdict(int)
    for i, token in enumerate(first):
        positions[token] |= 1 << i
    # One row of the table of lengths as bits: bit i is 0 if the row grows by one at token i of
    # `first`. The carry of an addition finds the position that grows next in each run of ones.
    all_ones = (1 << len(first)) - 1
    row = all_ones
    for token in second:
        if token in positions:
            common = row & positions[token]
            row = (row + common | row - common) & all_ones
    return len(first) - row.bit_count()


def _f_measure(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0
