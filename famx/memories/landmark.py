"""Landmark attention: pieces of the text behind landmarks (arXiv 2305.16300).

Behind every `piece` tokens stands a landmark, a learned row that climbs the layers like a token. A piece
that has left the window is reached through its landmark: the landmark's weight in the softmax of the
window is shared out among the piece's tokens by a softmax of their own.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from famx.base.ranges import Positive
from famx.base.values import checked
from famx.memories.choosing import rounded
from famx.memories.learned_rows import Rows
from famx.modules.attention.common import MASKED
from famx.modules.memory import Memory, Opened
from famx.modules.window import joined


@checked
@dataclasses.dataclass(frozen=True)
class Landmark(Memory):
    """A ring of the last `pieces` pieces before the window, in every layer; oldest first.

    `{"keys": [B, R, l, K, Dh], "values": likewise, "landmarks": [B, R, K, Dh], "count": [B]}` with keys
    before their rotation. Besides `pieces` it holds those of the window's `M` blocks, which tokens do not
    see through their landmarks.

    What is different from the paper: landmarks stand in rows of their own and take up no positions;
    pieces are compared before the rotation, where the paper gives them positions near the query; and
    training goes through the ring, where the paper trains on one short context; `top` applies there, too.

    Attributes:
      piece: `l`, tokens of a piece, which must divide the block; the paper has 50.
      pieces: number of pieces that are remembered; the paper has 80 and more.
      top: number of pieces that each token reads in each head, those of the highest landmarks; None: all.
    """

    kind: ClassVar[str] = "landmark"
    piece: Positive = 32
    pieces: Positive = 64
    top: Positive | None = None

    def check(self, config):
        if config.block_size % self.piece:
            return f"Landmark.piece {self.piece} must divide block_size {config.block_size}."
        if self.top is not None and self.top > self.pieces:
            return f"Landmark.top {self.top} exceeds pieces {self.pieces}, from which it chooses."
        return None

    def parameters(self, config):
        return Rows(config, 1)

    def row_slots(self, config):
        return tuple(range(self.piece - 1, config.block_size, self.piece))

    def block_rows(self, decoder):
        landmark = decoder.memory()
        count = len(self.row_slots(decoder.config))
        return jnp.broadcast_to(landmark, (count, landmark.shape[-1]))

    # The four moments.

    def start(self, layer, climb, here):
        c, held = layer.config, self.pieces + self._in_window(layer.config)
        zeros = lambda *shape: jnp.zeros((held, *shape, c.num_kv_heads, c.head_dim), c.dtype)
        count = jnp.zeros(())
        return climb, {
            "keys": zeros(self.piece), "values": zeros(self.piece), "landmarks": zeros(), "count": count
        }  # fmt: skip

    def open(self, layer, climb, memory, here):
        # The newest pieces are those of the window.
        old = {name: memory[name][:, : self.pieces] for name in ("keys", "values", "landmarks")}
        known = jax.lax.stop_gradient(memory["count"]) - self._in_window(layer.config)
        old["visible"] = jnp.arange(self.pieces) >= self.pieces - known[:, None]
        return climb, Opened(extra=old)

    def attend(self, layer, tokens, here):
        c, extra = layer.config, tokens.extra
        wide = jnp.promote_types(c.dtype, jnp.float32)
        query = tokens.plain_query
        query = query.reshape(*query.shape[:-2], c.num_kv_heads, -1, c.head_dim)
        times = lambda spec, x: jnp.einsum(spec, query, x, preferred_element_type=wide) * c.query_scale
        on_landmarks = times("...skgd,...rkd->...skgr", extra["landmarks"])
        visible = extra["visible"][..., None, None, None, :]
        on_landmarks = jnp.where(visible, on_landmarks, MASKED)
        if self.top is not None:
            on_landmarks = jnp.where(best(on_landmarks, self.top), on_landmarks, MASKED)
        in_piece = times("...skgd,...rlkd->...skgrl", extra["keys"])
        in_piece = jax.nn.softmax(in_piece, axis=-1)
        log_sum = jax.nn.logsumexp(on_landmarks, axis=-1)
        weights = jnp.exp(on_landmarks - log_sum[..., None])[..., None] * in_piece
        recalled = jnp.einsum("...skgrl,...rlkd->...skgd", weights, extra["values"].astype(wide))
        heads = lambda x, *width: x.reshape(*x.shape[: tokens.query.ndim - 2], c.num_heads, *width)
        recalled = heads(recalled, c.head_dim), heads(log_sum)
        attention, _ = joined(tokens.part(tokens.query), recalled)
        return attention.astype(c.dtype)

    def close(self, layer, climb, memory, opened, block, here):
        by_piece = lambda x: x.reshape(x.shape[0], -1, self.piece, *x.shape[2:])
        plain = by_piece(layer.unrotate(block.keys, block.index, here))
        landmarks = self._unrotated(layer, block.rows[0], block.index, here)
        new = {"keys": plain, "values": by_piece(block.values), "landmarks": landmarks}
        push = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)[:, new.shape[1] :]
        pushed = {name: push(memory[name], new[name]) for name in new}
        return climb, {**pushed, "count": memory["count"] + plain.shape[1]}

    def _in_window(self, config) -> int:
        """Number of pieces of the past blocks of the window."""
        return config.memory_segments * config.block_size // self.piece

    def _unrotated(self, layer, keys, index, here):
        slots = jnp.array(self.row_slots(layer.config))
        start = index * layer.config.block_size + here.offset
        return layer.unrotated(keys, start[:, None] + slots, here)

    # Information for the rest of the package.

    def axes(self):
        piece = ("memory", None, "kv_heads", "kv")
        return {"keys": piece, "values": piece, "landmarks": ("memory", "kv_heads", "kv"), "count": ()}

    def figures(self, parameters, memory):
        return {"pieces": jnp.mean(memory["count"])}

    def flops(self, config, price, length, from_start):
        blocks, size = -(-length // config.block_size), config.block_size
        rows = blocks * (size // self.piece)
        # Every token and landmark is compared with all landmarks, whose values nobody reads, and with all
        # tokens behind them.
        read = (length + rows) * self.pieces * (1 + 2 * self.piece) * price.score // 2
        seen = sum(slot + 1 for slot in self.row_slots(config)) + size * config.memory_segments
        climb = rows * (price.project + price.feed_forward) + blocks * seen * price.score
        return read + climb, 0


def best(scores, count: int):
    """Which of the scores `[..., X]` are the `count` highest, bool; of equal ones those further behind.

    In the first layer all landmarks are equal, so that scores are `rounded`.
    """
    chosen = scores.shape[-1] - 1 - jax.lax.top_k(jnp.flip(rounded(scores), -1), count)[1]
    return jnp.sum(jax.nn.one_hot(chosen, scores.shape[-1]), axis=-2) > 0
