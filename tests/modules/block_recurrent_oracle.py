"""Oracle of Block-Recurrent Transformer (arXiv 2203.07852): numpy float64, one state after another.

The ordinary parts of the layer (projections, norms, rotation, window) are those of `Oracle`.
"""

import math

import numpy as np
from modules.oracle import Oracle, rotate


class BlockRecurrentOracle(Oracle):
    """A decoder with `BlockRecurrent`; `read` returns its states `[1, layers, Ns, D]`."""

    def read(self, tokens, offset=0):
        c, size = self.c, self.c.block_size
        window = [([], []) for _ in self.layers]
        chosen = list(c.memory.layers or [max(c.num_layers * 5 // 6 - 1, 0)])
        select = lambda i: {name: part[i] for name, part in self.w["memory"].items()}
        of_layer = [select(i) for i in range(len(chosen))]
        states = [list(w["states"]) for w in of_layer]
        logits, updates = [], 0
        for t in range(math.ceil(len(tokens) / size)):
            block = tokens[t * size : (t + 1) * size]
            x = [self.embed(token) for token in block]
            for i, w in enumerate(self.layers):
                self.enter(i)
                keys, values = window[i]
                for s, i_t in enumerate(x):
                    keys.append(self.key(w, i_t, t * size + s + offset))
                    values.append(self.value(w, i_t))
                own = of_layer[chosen.index(i)] if i in chosen else None
                read = self.projected(own, states[chosen.index(i)]) if own else None
                outputs = []
                for s, i_t in enumerate(x):
                    here = t * size + s
                    q = self.query(w, i_t, here + offset)
                    mask = [self.sees(here, j) for j in range(len(keys))]
                    attention, _ = self.attend(q, keys, values, mask)
                    more = self.read_states(w, own, read, i_t) if own else 0
                    outputs.append(self.rest_of_layer(w, i_t, attention, i_t + more))
                if own and len(block) == size:
                    first = max(t - c.memory_segments, 0) * size
                    there = range(first, (t + 1) * size)
                    plain = [rotate(keys[j], -(j + offset), self.frequency) for j in there]
                    seen = plain, [values[j] for j in there]
                    place = chosen.index(i)
                    states[place] = self.update(own, states[place], read, seen)
                x = outputs
            logits.extend(self.logits(o) for o in x)
            updates += len(block) == size
        return np.array(logits), np.array(states)[None], updates

    def projected(self, w, states):
        """`h`, and keys and values of every state, lists of `[K, Dh]`."""
        h = [self.rms(c) * w["norm_scale"] + i for c, i in zip(states, w["ids"], strict=True)]
        return h, [np.tensordot(x, w["key_kernel"], 1) for x in h], [
            np.tensordot(x, w["value_kernel"], 1) for x in h
        ]  # fmt: skip

    def read_states(self, w, own, read, x):
        """What a token adds to its attention to the window, `[D]`."""
        _, keys, values = read
        query = np.tensordot(self.norm(x, w["attention_norm"]), own["token_query_kernel"], 1)
        attention = self.compare(query, keys, values, own["token_scale"])
        return np.tensordot(attention, own["token_output_kernel"], 2)

    def update(self, w, states, read, seen):
        """States after a block, one after another, all of them from those before it."""
        h, keys, values = read
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        new = []
        for c, x in zip(states, h, strict=True):
            itself = self.compare(np.tensordot(x, w["query_kernel"], 1), keys, values, w["state_scale"])
            query = np.tensordot(x, w["cross_query_kernel"], 1)
            u = np.concatenate([itself, self.compare(query, *seen, w["block_scale"])], axis=-1)
            made = lambda name: np.tensordot(u, w[f"{name}_kernel"], 2) + w[f"{name}_bias"]  # noqa: B023
            if self.c.memory.gate == "fixed":
                g = sigmoid(w["gate_bias"])
                new.append(g * c + (1 - g) * made("output"))
            else:
                new.append(sigmoid(made("forget") + 1) * c + sigmoid(made("input") - 1) * made("output"))
        return new

    def compare(self, query, keys, values, scale):
        """Softmax over the cosine of a query `[H, Dh]` and keys `[K, Dh]`, times `scale`: `[H, Dh]`."""
        unit = lambda x: x / np.sqrt((x**2).sum() + 1e-6)
        group = self.c.num_heads // self.c.num_kv_heads
        out = []
        for h, q in enumerate(query):
            scores = np.array([unit(q) @ unit(k[h // group]) for k in keys]) * scale[h]
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out.append(sum(p * v[h // group] for p, v in zip(weights, values, strict=True)))
        return np.array(out)
