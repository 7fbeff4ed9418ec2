"""How far apart rounding alone may put two computations of one number.

Compiled for another processor, or within another program, a sum adds its terms in another order. A
tolerance that was read off one machine fails on the next; these follow from what is computed.
"""

import math

import numpy as np

from famx.modules import DecoderConfig


def bound(roundings: int, scale: float = 1.0, dtype="float32") -> float:
    """The most by which two orders of computing a number differ.

    One rounding errs by at most `u = eps / 2` of what is rounded. Errors of `n` roundings are as good
    as independent: they add up to `sqrt(n) u`, and to more than six times that in none of a million
    numbers (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). Each of
    the two computations errs by as much, hence `6 sqrt(n) eps scale`.

    Args:
      roundings: how many follow one another on the way to the number: the additions of a sum.
      scale: the largest magnitude on the way.
      dtype: what is computed in.
    """
    return 6 * math.sqrt(roundings) * float(np.finfo(dtype).eps) * scale


def of_decoder(config: DecoderConfig, tokens: int) -> int:
    """Additions on the longest way through a decoder: along the memory, block after block.

    In each layer: two norms and what is projected from them over `D`, a score over `Dh`, the sums of
    the softmax and of the values over the keys, and the output projections over `H Dh` and the
    feed-forward's width. The logits come last.
    """
    c = config
    keys = (c.memory_segments + 2) * c.block_size  # the memory has no more columns than a block
    layer = 4 * c.embed_dim + c.head_dim + 2 * keys + c.num_heads * c.head_dim + c.mlp_dim
    return c.num_layers * -(-tokens // c.block_size) * layer + c.embed_dim
