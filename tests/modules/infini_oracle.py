"""Oracle of Infini-attention: numpy float64, one token after another, with nothing clever.

Infini-attention (arXiv 2404.07143) inside block sliding window attention. Per layer and key/value head, a
matrix `A [Dh, Dh]` and a normaliser `z [Dh]` hold all blocks that left the window of `M` past blocks.
The ordinary parts of the layer (projections, norms, rotation, window attention) are those of `Oracle`.
"""

import dataclasses

import numpy as np
from modules.oracle import Oracle, rotate


@dataclasses.dataclass
class Store:
    """Memory of one layer.

    Attributes:
      matrix: `A` of each key/value head `[K, Dh, Dh]`.
      normaliser: `z` of each key/value head `[K, Dh]`.
      plain_keys: keys before rotation, `[K, Dh]` for every token that was ever read.
    """

    matrix: np.ndarray
    normaliser: np.ndarray
    plain_keys: list


class InfiniOracle(Oracle):
    """A decoder whose layers have Infini-attention; `config.memory.delta` chooses the delta rule.

    `read` returns the memory after the last complete block as
    `{"matrix": [layers, K, Dh, Dh], "normaliser": [layers, K, Dh]}`.
    """

    def first_memories(self, offset):
        heads, width = self.c.num_kv_heads, self.c.head_dim
        zeros = lambda *shape: np.zeros((heads, *shape))
        return [Store(zeros(width, width), zeros(width), []) for _ in self.layers]

    def stack(self, memories):
        return {
            "matrix": np.array([memory.matrix for memory in memories]),
            "normaliser": np.array([memory.normaliser for memory in memories]),
        }

    def block(self, w, inputs, t, keys, values, memory, offset):
        """`O_t` and the memory after block `t`. Appends the block's keys and values to the lists."""
        begin = t * self.c.block_size
        for s, i_t in enumerate(inputs):
            k = self.key(w, i_t, begin + s + offset)
            keys.append(k)
            values.append(self.value(w, i_t))
            memory.plain_keys.append(self.plain(k, begin + s + offset))
        outputs = []
        for s, i_t in enumerate(inputs):
            position = begin + s + offset
            q = self.query(w, i_t, position)
            mask = [self.sees(begin + s, other) for other in range(len(keys))]
            in_window, _ = self.attend(q, keys, values, mask)
            attention = self.mix(w, memory, self.plain(q, position), in_window)
            outputs.append(self.rest_of_layer(w, i_t, attention, i_t))
        if len(inputs) < self.c.block_size:
            return outputs, memory
        return outputs, self.write(memory, t - self.c.memory_segments, values)

    def mix(self, w, memory, q, in_window):
        """`sigmoid(g) A_mem + (1 - sigmoid(g)) A_dot` of one token, all `[H, Dh]`; `q` is plain."""
        group = self.c.num_heads // self.c.num_kv_heads
        mixed = []
        for h in range(self.c.num_heads):
            matrix, normaliser = memory.matrix[h // group], memory.normaliser[h // group]
            if not normaliser.any():  # nothing was written
                mixed.append(in_window[h])
                continue
            share = 1 / (1 + np.exp(-w["memory"]["gate"][h]))
            mixed.append(share * recall(q[h], matrix, normaliser) + (1 - share) * in_window[h])
        return np.array(mixed)

    def write(self, memory, block, values):
        """The memory after it took in `block`, which the next block's tokens no longer see."""
        if block < 0:
            return memory
        size = self.c.block_size
        matrix, normaliser = memory.matrix.copy(), memory.normaliser.copy()
        for there in range(block * size, (block + 1) * size):
            for head in range(self.c.num_kv_heads):
                key, value = memory.plain_keys[there][head], values[there][head]
                old = memory.matrix[head], memory.normaliser[head]
                if self.c.memory.delta and old[1].any():
                    value = value - recall(key, *old)
                matrix[head] += np.outer(feature(key), value)
                normaliser[head] += feature(key)
        return Store(matrix, normaliser, memory.plain_keys)

    def plain(self, x, position):
        """A rotated query or key `[..., Dh]` as it was before its rotation."""
        return rotate(x, -position, self.frequency)


def feature(x):
    """`elu(x) + 1`, which is positive."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def recall(x, matrix, normaliser):
    """What the memory holds at a plain query or key `x [Dh]`: `s(x) A / (s(x) z)`, `[Dh]`."""
    return feature(x) @ matrix / (feature(x) @ normaliser)
