"""Tolerances for numbers that are computed in two ways and differ only by rounding.

A sum adds its terms in another order when it is compiled for another processor or in another program.
A tolerance that was read off one machine fails on the next. These follow from what is computed.
"""

import math

import numpy as np

from famx.modules import DecoderConfig


def bound(roundings: int, scale: float = 1.0, dtype="float32") -> float:
    """Largest difference to expect between two computations of a number.

    The relative error of one rounding is at most `u = eps / 2`. The errors of `n` roundings behave as
    if independent: their sum is about `sqrt(n) u`, and practically never more than six times that
    (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). Both
    computations have such an error, hence `6 sqrt(n) eps scale`.

    Args:
      roundings: number of roundings that follow one another, such as the additions of a sum.
      scale: largest magnitude of an intermediate result.
      dtype: floating-point type of the computation.
    """
    return 6 * math.sqrt(roundings) * float(np.finfo(dtype).eps) * scale


def of_decoder(config: DecoderConfig, tokens: int) -> int:
    """Number of additions that follow one another in a decoder, along the memory from block to block.

    Each layer sums over `D` in two norms and two projections, over `Dh` in a score, over the keys in
    the softmax and the mean of values, over `H Dh` in the output projection and over the width of the
    feed-forward; the logits sum over `D` once more.
    """
    c = config
    keys = (c.memory_segments + 2) * c.block_size  # with a memory of up to a block
    layer = 4 * c.embed_dim + c.head_dim + 2 * keys + c.num_heads * c.head_dim + c.mlp_dim
    return c.num_layers * -(-tokens // c.block_size) * layer + c.embed_dim
