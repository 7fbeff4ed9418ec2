"""Oracle of feedback of whole blocks: numpy float64, one token after another (arXiv 2404.09173, C).

A layer keeps the outputs of all its tokens. A token sees those of the last blocks as keys and values made
by the layer's own projections, and its own block as inputs. The ordinary parts are those of `Oracle`.
"""

import numpy as np
from modules.oracle import Oracle


class FeedbackOracle(Oracle):
    """A decoder with `Feedback`; `read` returns the last outputs of the complete blocks of each layer."""

    def first_memories(self, offset):
        return [[] for _ in self.layers]

    def stack(self, memories):
        c = self.c
        found = np.zeros((c.num_layers, c.memory.length, c.embed_dim))
        for layer, outputs in enumerate(memories):
            kept = outputs[-c.memory.length :]
            if kept:
                found[layer, -len(kept) :] = kept
        return found

    def block(self, w, inputs, t, keys, values, memory, offset):
        """`O_t` and all outputs so far. Appends the block's keys and values to `keys`, `values`."""
        begin = t * self.c.block_size
        first = max(begin - self.c.memory.length, 0)
        past_k = [self.key(w, memory[j], j + offset) for j in range(first, begin)]
        past_v = [self.value(w, memory[j]) for j in range(first, begin)]
        for s, i_t in enumerate(inputs):
            keys.append(self.key(w, i_t, begin + s + offset))
            values.append(self.value(w, i_t))
        outputs = []
        for s, i_t in enumerate(inputs):
            q = self.query(w, i_t, begin + s + offset)
            mask = [True] * len(past_k) + [self.sees(begin + s, j) for j in range(len(keys))]
            attention, _ = self.attend(q, past_k + keys, past_v + values, mask)
            outputs.append(self.rest_of_layer(w, i_t, attention, i_t))
        return outputs, memory + outputs
