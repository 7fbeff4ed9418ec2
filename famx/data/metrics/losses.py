"""Figures from sums of losses over tokens."""

import math


def next_token_accuracy(correct: float, count: float) -> float:
    """Share of tokens that were predicted right, 0..100.

    Args:
      correct: number, or sum of the weights, of the right tokens.
      count: number, or sum of the weights, of all tokens.

    Raises:
      ValueError: count is not positive, or correct is not between 0 and count.
    """
    _check_above_zero("count", count)
    if not 0 <= correct <= count:
        raise ValueError(f"{correct} of {count} tokens cannot be right; give sums over the same tokens.")
    return 100 * float(correct) / float(count)


def perplexity(nats: float, count: float) -> float:
    """exp(nats / count) for a sum of losses over `count` tokens; infinite if float64 overflows.

    Raises:
      ValueError: count is not positive, or nats is negative.
    """
    _check_above_zero("count", count)
    _check_nats(nats)
    try:
        return math.exp(float(nats) / float(count))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Sum of losses in bits, per byte of the text that the tokens encode.

    Unlike loss per token, it is comparable between vocabularies.

    Raises:
      ValueError: num_bytes is not positive, or nats is negative.
    """
    _check_above_zero("num_bytes", num_bytes)
    _check_nats(nats)
    return float(nats) / math.log(2) / float(num_bytes)


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; a mean needs at least one, so it must be above 0.")


def _check_nats(nats: float) -> None:
    if nats < 0:
        raise ValueError(f"A sum of losses cannot be {nats}; give minus the log-likelihood.")
