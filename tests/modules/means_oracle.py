"""Oracle of Key-Value Means: numpy float64, one token and one row after another (arXiv 2605.09877).

The ordinary parts of the layer (projections, norms, rotation, window) are those of `Oracle`.
"""

import copy
import dataclasses
import math

import numpy as np
from modules.oracle import Oracle, rotate


@dataclasses.dataclass
class Store:
    """Memory of one layer.

    Attributes:
      heads: for each key/value head its rows, dicts with `key [Dh]`, `value [Dh]` and `norm`.
      plain_keys: keys before rotation, `[K, Dh]` for every token that was ever read.
      gates: `g` of every token that was ever read, `[K]`.
    """

    heads: list
    plain_keys: list
    gates: list


def rounded(score):
    """What is chosen by: of equal scores the first, however they were rounded."""
    return round(score * 1024)


class MeansOracle(Oracle):
    """A decoder with `KeyValueMeans`; `read` returns its memory after the last complete block."""

    def first_memories(self, offset):
        return [Store([[] for _ in range(self.c.num_kv_heads)], [], []) for _ in self.layers]

    def stack(self, memories):
        c = self.c
        shape = c.num_layers, c.num_kv_heads, c.memory.rows
        found = {name: np.zeros((*shape, c.head_dim)) for name in ("keys", "values")}
        found["norms"] = np.zeros(shape)
        for layer, memory in enumerate(memories):
            for head, rows in enumerate(memory.heads):
                for i, row in enumerate(rows):
                    for name in ("key", "value", "norm"):
                        found[f"{name}s"][layer, head, i] = row[name]
        return {**found, "count": np.array([len(memory.heads[0]) for memory in memories])}

    def block(self, w, inputs, t, keys, values, memory, offset):
        """`O_t` and the memory after block `t`. Appends the block's keys and values to the lists."""
        begin = t * self.c.block_size
        for s, i_t in enumerate(inputs):
            position = begin + s + offset
            k = self.key(w, i_t, position)
            keys.append(k)
            values.append(self.value(w, i_t))
            memory.plain_keys.append(rotate(k, -position, self.frequency))
            x = self.project(w["memory"]["gate"], self.norm(i_t, w["attention_norm"]))
            memory.gates.append(np.where(x > 0, x + 1, np.exp(x)))
        outputs = []
        for s, i_t in enumerate(inputs):
            attention = self.attend_both(w, i_t, begin + s, keys, values, memory, offset)
            outputs.append(self.rest_of_layer(w, i_t, attention, i_t))
        if len(inputs) == self.c.block_size and t >= self.c.memory_segments:
            memory = self.write(w["memory"], memory, t, values)
        return outputs, memory

    def attend_both(self, w, x, here, keys, values, memory, offset):
        """One softmax over rows and window, `[H, Dh]`."""
        group = self.c.num_heads // self.c.num_kv_heads
        q = self.query(w, x, here + offset)
        plain = rotate(q, -(here + offset), self.frequency)
        out = []
        for h in range(self.c.num_heads):
            scores, read = [], []
            for row in memory.heads[h // group]:
                scores.append(
                    w["memory"]["on_rows"][h] * plain[h] @ self.layer_norm(w["memory"], row["key"])
                )
                read.append(row["norm"] * row["value"] / np.linalg.norm(row["value"]))
            for there in range(len(keys)):
                if self.sees(here, there):
                    scores.append(w["memory"]["on_window"][h] * q[h] @ keys[there][h // group])
                    read.append(values[there][h // group])
            scores = np.array(scores) * self.c.query_scale
            weights = np.exp(scores - scores.max())
            out.append(weights @ np.array(read) / weights.sum())
        return np.array(out)

    def write(self, w, memory, t, values):
        """The memory after block `t` was read, and the block `t - M` left the window."""
        c, size = self.c, self.c.block_size
        new = copy.deepcopy(memory)
        block = range((t - c.memory_segments) * size, (t - c.memory_segments + 1) * size)
        limit = min(self.budget((t + 1) * size), c.memory.rows)
        for head in range(c.num_kv_heads):
            rows = new.heads[head]
            key = {j: self.layer_norm(w, memory.plain_keys[j][head]) for j in block}
            value = {j: values[j][head] for j in block}
            # The tokens that are least like any row become rows, as long as there is room.
            old = [self.layer_norm(w, row["key"]) for row in rows]
            likeness = {j: max((rounded(key[j] @ k) for k in old), default=-math.inf) for j in block}
            order = sorted(block, key=likeness.get)
            room = max(limit - len(rows), 0)
            for j in order[:room]:
                rows.append({"key": key[j], "value": value[j], "norm": np.linalg.norm(value[j])})
            # Each of the others is added to the row that it is most like; all see the same rows.
            there = [self.layer_norm(w, row["key"]) for row in rows]
            for j in order[room:]:
                i = 1 + int(np.argmax([rounded(key[j] @ k) for k in there[1:]]))
                rows[i]["key"] = rows[i]["key"] + memory.gates[j][head] * key[j]
                rows[i]["value"] = rows[i]["value"] + memory.gates[j][head] * value[j]
        return new

    def budget(self, tokens):
        memory = self.c.memory
        if memory.budget == "fixed":
            return memory.rows
        if memory.budget == "root":
            return max(int(memory.scale * math.sqrt(tokens)), 2)
        return max(int(memory.rows * tokens / (memory.rows + tokens)), 2)

    def layer_norm(self, w, x):
        centred = x - x.mean()
        return centred / np.sqrt(np.mean(centred**2) + self.c.norm_epsilon) * w["scale"] + w["bias"]
