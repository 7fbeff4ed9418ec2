"""The state of a decoder between two chunks: one explicit pytree of constant size."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


def where_examples(mask, new, old, axis: int = 0):
    """The tree `new` where `mask` (bool `[B]`) holds, `old` elsewhere; `axis` is the batch axis."""

    def choose(a, b):
        shape = [1] * a.ndim
        shape[axis] = mask.shape[0]
        return jnp.where(mask.reshape(shape), a, b)

    return jax.tree.map(choose, new, old)


@flax.struct.dataclass
class DecoderState:
    """Everything that is needed to resume reading, the same size after ten tokens as after a million.

    Legend: `B` batch, `M` memory segments, `S` block size, `K` key/value heads, `Dh` head width. Examples
    may be at different positions, and at different slots of their blocks.

    Attributes:
      memory: what `DecoderConfig.memory` keeps, a pytree with leaves `[layers, B, ...]`, or
        `[1, B, ...]` if it is `through_depth`; for FAM the `F` of Algorithm 2, at least float32
        `[layers, B, N, D]`; None for BSWA.
      keys: rotated keys `[layers, B, M + 1, S, K, Dh]`: the last `M` blocks, oldest first, then the
        incomplete block. Slots that hold no token are zero.
      values: likewise.
      features: what the memory needs of each of these tokens besides (`Memory.features`),
        `[layers, B, M + 1, S, *F]`; None for most memories.
      position: number of tokens read, int32 `[B]`; the slot in the block is `position % S`.
      updates: number of memory updates, one per full block, int32 `[B]`; 0 means that `memory` is as
        it started.
      offset: random position offset, int32 `[B]`; 0 in inference.
    """

    memory: Any
    keys: jax.Array
    values: jax.Array
    position: jax.Array
    updates: jax.Array
    offset: jax.Array
    features: Any = None

    @classmethod
    def initial(cls, config, batch_size: int, memory) -> "DecoderState":
        """A state that has read nothing; `memory` without batch axis, leaves `[layers, ...]`."""
        c = config
        window = (c.num_layers, batch_size, c.memory_segments + 1, c.block_size)
        keys = jnp.zeros(window + (c.num_kv_heads, c.head_dim), c.dtype)
        shape = c.memory.feature_shape(c)
        features = None if shape is None else jnp.zeros(window + shape, c.dtype)
        zero = jnp.zeros((batch_size,), jnp.int32)
        repeat = lambda m: jnp.broadcast_to(m[:, None], (m.shape[0], batch_size, *m.shape[1:]))
        return cls(jax.tree.map(repeat, memory), keys, keys, zero, zero, zero, features)

    @property
    def batch_size(self) -> int:
        """`B`."""
        return self.position.shape[0]

    def num_bytes(self) -> int:
        """Number of bytes of all arrays; independent of the number of tokens read."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def zero_memory(self) -> "DecoderState":
        """This state with every leaf of the memory zero, to measure what the memory contributes."""
        return dataclasses.replace(self, memory=jax.tree.map(jnp.zeros_like, self.memory))

    def map_examples(self, function, *others: "DecoderState") -> "DecoderState":
        """Applies `function(array, *arrays, axis)` to every field, `axis` being its batch axis."""
        axis_of = lambda array: 0 if array.ndim == 1 else 1
        return jax.tree.map(lambda a, *b: function(a, *b, axis=axis_of(a)), self, *others)

    def take(self, indices) -> "DecoderState":
        """The states of the examples `indices` (int `[n]`); repeat an index to broadcast it.

        Examples:
          >>> from famx.modules import DecoderConfig
          >>> config = DecoderConfig(8, 1, 4, 2, block_size=2)
          >>> state = DecoderState.initial(config, 2, jnp.zeros((1, 1, 4)))
          >>> state.take([1, 1, 0]).memory.shape
          (1, 3, 1, 4)
        """
        return self.map_examples(lambda a, axis: jnp.take(a, jnp.asarray(indices), axis=axis))

    def select(self, mask, other: "DecoderState") -> "DecoderState":
        """This state where `mask` (bool `[B]`) holds, `other` elsewhere: a reset per example."""
        return self.map_examples(lambda a, b, axis: where_examples(mask, a, b, axis), other)

    def put(self, indices, other: "DecoderState") -> "DecoderState":
        """This state with the examples `indices` replaced by those of `other`, in order."""
        put = lambda a, b, axis: a.at[indices].set(b) if axis == 0 else a.at[:, indices].set(b)
        return self.map_examples(put, other)
