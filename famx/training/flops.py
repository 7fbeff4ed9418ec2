"""How many floating-point operations a training step has to do, counted from the configuration.

Only what the loss depends on is counted: pairs of a query and a key that it sees, no masked ones;
real tokens, no padding; updates of the memory that a later block reads; nothing twice, whatever is
recomputed. A multiplication and its addition are two operations. Norms, softmax, rotations and the
optimiser, which multiply no matrices, are left out, as is usual for model FLOPs utilisation.
"""

import numpy as np

from famx.modules.config import DecoderConfig


def train_flops(
    config: DecoderConfig, batch: int, length: int, from_start: bool = True
) -> dict[str, int]:
    """Matrix-product operations of one training step, forward and backward, by kind.

    The backward pass counts twice the forward pass, also where a stopped gradient would spare it.

    Args:
      config: sizes of the model.
      batch: examples.
      length: tokens of each example.
      from_start: whether the examples begin with the prompt. If not, they go on from a state at a
        block boundary that has read at least `memory_segments` blocks.

    Returns:
      Operations of the whole batch: `projections` (queries, keys, values, output), `attention` (of
      tokens to tokens), `feed_forward`, `memory` (all that feedback attention memory adds, 0
      without it) and `head`. Their sum is the step's.

    Raises:
      ValueError: if `batch` or `length` is below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}.")
    c = config
    width = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    project = 2 * c.embed_dim * width  # of one token in one layer
    feed = 2 * c.embed_dim * c.mlp_dim * (3 if c.gated_mlp else 2)
    pair = 4 * c.num_heads * c.head_dim  # a score, and its share of the values
    forward = {
        "projections": batch * c.num_layers * length * project,
        "attention": batch * c.num_layers * _visible_pairs(c, length, from_start) * pair,
        "feed_forward": batch * c.num_layers * length * feed,
        "memory": _memory(c, batch, length, from_start, project, feed, pair),
        "head": batch * length * 2 * c.embed_dim * c.vocab_size,
    }
    return {kind: 3 * count for kind, count in forward.items()}


def _visible_pairs(config: DecoderConfig, length: int, from_start: bool) -> int:
    """Pairs of a token and a token that it sees, in one example and one layer."""
    block, slot = np.divmod(np.arange(length, dtype=np.int64), config.block_size)
    past = config.memory_segments * config.block_size
    if config.window_mask:  # each token sees the last M * S before it, its own block's included
        before = np.minimum(np.arange(length), past) if from_start else past
        return int(np.sum(before + np.ones_like(slot)))
    before = np.minimum(block * config.block_size, past) if from_start else past
    return int(np.sum(before + slot + 1))


def _memory(c: DecoderConfig, batch, length, from_start, project, feed, pair) -> int:
    """Forward operations that the memory adds: reading it, updating it, and the prompt."""
    if not c.fam_length:
        return 0
    n, blocks = c.fam_length, -(-length // c.block_size)
    # Before every block the memory gives keys and values; every token sees them all.
    keys_values = 2 * c.embed_dim * 2 * c.num_kv_heads * c.head_dim
    read = blocks * n * keys_values + length * n * pair
    # Every block but the last updates it; its own keys and values are there already.
    seen = n + c.block_size
    update = (blocks - 1) * n * (project - keys_values + seen * pair + feed)
    total = batch * c.num_layers * (read + update)
    if from_start and c.fam_start == "prompt":
        # Run up the layers once for all examples; the last layer reads it, and goes no further.
        total += (c.num_layers - 1) * n * (project + n * pair + feed)
    return total
