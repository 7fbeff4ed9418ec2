"""Number of floating-point operations of a training step, counted from the configuration.

Only operations that the loss depends on are counted: pairs of a query and a key that is not masked;
tokens, no padding; logits of tokens with a loss weight; memory updates that a later block reads.
Recomputation is not counted. A multiplication and its addition are two operations. Norms, softmax,
rotations and the optimiser, which multiply no matrices, are left out, as is usual for model FLOPs
utilisation.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from famx.modules.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Learning:
    """Which parameters learn; it determines how much of the backward pass is computed.

    Attributes:
      paths: paths of the parameters that learn, such as "layers/query/kernel"; None: all.
      rank: rank of the low-rank adapters among `paths`.
    """

    paths: Collection[str] | None = None
    rank: int = 0

    def has(self, path: str) -> bool:
        """Whether the parameter at `path` learns."""
        return self.paths is None or path in self.paths

    @property
    def through_layers(self) -> bool:
        """Whether gradients are computed through the layers, and then through all of them."""
        return self.paths is None or any(
            path.startswith(("layers/", "embedding", "memory")) for path in self.paths
        )

    def row(self, path: str, inputs: int, outputs: int) -> int:
        """Operations of one row in the projection at `path`, forward and backward."""
        back = 1 + self.through_layers  # the forward product, and the gradient of its input
        count = 2 * inputs * outputs * (back + self.has(f"{path}/kernel"))
        if self.rank and self.has(f"{path}/lora_a"):
            count += 2 * self.rank * (inputs + outputs) * (back + 1)
        return count


@dataclasses.dataclass(frozen=True)
class Price:
    """Operations of one row in one layer, forward and backward, for `Memory.flops`.

    Attributes:
      project: queries, keys, values and output.
      keys_values: keys and values alone.
      feed_forward: the feed-forward part.
      score: one query with one key in all heads: the score, and the weighted value.
      product: one multiplication and its addition, in all passes.
    """

    project: int
    keys_values: int
    feed_forward: int
    score: int
    product: int


def train_flops(
    config: DecoderConfig,
    batch: int,
    length: int,
    from_start: bool = True,
    learning: Learning = Learning(),
    weighted: int | None = None,
) -> dict[str, int]:
    """Matrix-product operations of one training step, forward and backward, by kind.

    If all parameters learn, the backward pass counts as twice the forward pass, even where a stopped
    gradient saves some of it. The gradient of a weight that does not learn is not counted; that of its
    input is, in every layer, since the scan over layers goes back to the first layer's input.

    Args:
      config: configuration of the model.
      batch: number of examples.
      length: number of tokens of each example.
      from_start: whether the examples begin with the prompt. If not, they continue from a state at a
        block boundary that has read at least `memory_segments` blocks.
      learning: which parameters learn.
      weighted: number of tokens with a loss weight, in all examples; None: every token. The others need
        no logits.

    Returns:
      Operations of the whole batch: `projections` (queries, keys, values, output), `attention` (of
      tokens to tokens), `feed_forward`, `memory` (all that the memory adds, 0 without one) and
      `head`. Their sum is the total of the step. Adapters count with the projection that they belong to.

    Raises:
      ValueError: if `batch` or `length` is below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}.")
    weighted = batch * length if weighted is None else weighted
    c, d, heads = config, config.embed_dim, config.num_heads * config.head_dim
    row = lambda name, inputs, outputs: learning.row(f"layers/{name}", inputs, outputs)
    # Operations of one token in one layer; `pair`: of one score and its weighted value.
    keys_values = sum(row(name, d, c.num_kv_heads * c.head_dim) for name in ("key", "value"))
    project = keys_values + row("query", d, heads) + row("output", heads, d)
    up = ("mlp/gate", "mlp/up") if c.gated_mlp else ("mlp/up",)
    feed = sum(row(name, d, c.mlp_dim) for name in up) + row("mlp/down", c.mlp_dim, d)
    product = 2 * (3 if learning.through_layers else 1)
    pair = 2 * heads * product
    table = learning.has("embedding" if c.tied_embeddings else "head")
    into_head = learning.through_layers or any(
        learning.has(f"final_norm/{name}") for name in ("scale", "bias")
    )
    price = Price(project, keys_values, feed, pair, product)
    by_layer, once = c.memory.flops(c, price, length, from_start)
    return {
        "projections": batch * c.num_layers * length * project,
        "attention": batch * c.num_layers * _visible_pairs(c, length, from_start) * pair,
        "feed_forward": batch * c.num_layers * length * feed,
        "memory": int(batch * c.num_layers * by_layer) + once,
        "head": weighted * 2 * d * c.vocab_size * (1 + into_head + table),
    }


def _visible_pairs(config: DecoderConfig, length: int, from_start: bool) -> int:
    """Pairs of a token and a token that it sees, in one example and one layer."""
    block, slot = np.divmod(np.arange(length, dtype=np.int64), config.block_size)
    past = config.memory_segments * config.block_size
    if config.window_mask:  # each token sees the M * S tokens before it, including those of its own block
        before = np.minimum(np.arange(length), past) if from_start else past
        return int(np.sum(before + np.ones_like(slot)))
    before = np.minimum(block * config.block_size, past) if from_start else past
    return int(np.sum(before + slot + 1))
