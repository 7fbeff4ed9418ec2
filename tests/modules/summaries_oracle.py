"""Oracle of Recurrent Memory Transformer and AutoCompressor: numpy float64, one row after another.

A block is read as `[rows that are read ; tokens ; rows that are written]` (arXiv 2207.06881, 2305.14788),
all of them through all layers, with a dense mask over that order. Tokens also see the window of `M` past
blocks. The ordinary parts of the layer are those of `Oracle`.
"""

import math

import numpy as np
from modules.oracle import Oracle


class SummariesOracle(Oracle):
    """A decoder whose memory is made at the top of the stack.

    `read` returns the memory after the last complete block: `[1, N, D]` of `Rmt`, and of `AutoCompressor`
    `{"rows": [1, most * N, D], "count": [1]}` in which rows that do not exist yet are zero.
    """

    def read(self, tokens, offset=0):
        c, size = self.c, self.c.block_size
        piles_up = c.memory.kind == "auto_compressor"
        learned = list(self.w["memory"]["prompt"])
        pile = [] if piles_up else learned  # the rows that the next block reads
        window = [([], []) for _ in self.layers]
        logits, updates = [], 0
        for t in range(math.ceil(len(tokens) / size)):
            block = tokens[t * size : (t + 1) * size]
            read, x = pile, [self.embed(token) for token in block]
            written = learned if piles_up else pile
            for i, w in enumerate(self.layers):
                self.enter(i)
                read, x, written = self.whole(w, read, x, written, t, *window[i], offset, piles_up)
            logits.extend(self.logits(o) for o in x)
            if len(block) == size:
                updates += 1
                made = [self.norm(row, self.w["final_norm"]) for row in written]
                pile = (pile + made)[-c.memory_columns :] if piles_up else made
        if not piles_up:
            return np.array(logits), np.array(pile)[None], updates
        rows = np.zeros((1, c.memory_columns, c.embed_dim))
        if pile:
            rows[0, -len(pile) :] = pile
        return np.array(logits), {"rows": rows, "count": np.array([updates])}, updates

    def whole(self, w, read, tokens, written, t, keys, values, offset, causal):
        """One layer of block `t`: the rows that are read, the tokens and the rows that are written."""
        begin = t * self.c.block_size + offset
        rows = read + tokens + written
        positions = begin - len(read) + np.arange(len(rows))
        k = [self.key(w, x, p) for x, p in zip(rows, positions, strict=True)]
        v = [self.value(w, x) for x in rows]
        first, behind = len(read), len(read) + len(tokens)
        past = len(keys)
        keys.extend(k[first:behind])
        values.extend(v[first:behind])
        outputs = []
        for i, (x, position) in enumerate(zip(rows, positions, strict=True)):
            if i < first:  # rows see rows before them; without `causal` also those behind
                seen = list(range(i + 1 if causal else first))
            elif i < behind:
                seen = list(range(first))
            else:
                seen = list(range(i + 1 if causal else len(rows)))
            own_k, own_v = [k[j] for j in seen], [v[j] for j in seen]
            mask = [True] * len(seen)
            if first <= i < behind:
                here = past + i - first
                own_k, own_v = own_k + keys, own_v + values
                mask += [self.sees(here, there) for there in range(len(keys))]
            attention, _ = self.attend(self.query(w, x, position), own_k, own_v, mask)
            outputs.append(self.rest_of_layer(w, x, attention, x))
        return outputs[:first], outputs[first:behind], outputs[behind:]
