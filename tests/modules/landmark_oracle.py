"""Oracle of Landmark attention: numpy float64, one token after another (arXiv 2305.16300).

The ordinary parts of the layer (projections, norms, rotation, window) are those of `Oracle`.
"""

import dataclasses
import math

import numpy as np
from modules.oracle import Oracle, rotate


@dataclasses.dataclass
class Piece:
    """A piece of the text in one layer: plain keys, values `[l, K, Dh]` and its landmark `[K, Dh]`."""

    keys: np.ndarray
    values: np.ndarray
    landmark: np.ndarray


class LandmarkOracle(Oracle):
    """A decoder with `Landmark`; `read` returns its memory after the last complete block."""

    def read(self, tokens, offset=0):
        c, size = self.c, self.c.block_size
        window = [([], []) for _ in self.layers]
        pieces = [[] for _ in self.layers]  # of each layer, the oldest first
        logits, updates = [], 0
        for t in range(math.ceil(len(tokens) / size)):
            block = tokens[t * size : (t + 1) * size]
            x = [self.embed(token) for token in block]
            rows = [self.w["memory"]["prompt"][0]] * (size // c.memory.piece)
            for i, w in enumerate(self.layers):
                self.enter(i)
                x, rows, new = self.both(w, x, rows, t, *window[i], pieces[i], offset)
                if len(block) == size:
                    pieces[i] = pieces[i] + new
            logits.extend(self.logits(o) for o in x)
            updates += len(block) == size
        return np.array(logits), self.stack(pieces), updates

    def stack(self, pieces):
        c, length = self.c, self.c.memory.piece
        held = c.memory.pieces + c.memory_segments * c.block_size // length
        head = c.num_kv_heads, c.head_dim
        found = {name: np.zeros((c.num_layers, held, length, *head)) for name in ("keys", "values")}
        found["landmarks"] = np.zeros((c.num_layers, held, *head))
        for layer, of_layer in enumerate(pieces):
            for i, piece in enumerate(reversed(of_layer[-held:])):
                found["keys"][layer, held - 1 - i] = piece.keys
                found["values"][layer, held - 1 - i] = piece.values
                found["landmarks"][layer, held - 1 - i] = piece.landmark
        return {**found, "count": np.array([len(of_layer) for of_layer in pieces])}

    def both(self, w, inputs, rows, t, keys, values, pieces, offset):
        """Outputs of the tokens and of the landmarks of block `t`, and its pieces."""
        c, begin, length = self.c, self.c.block_size * t, self.c.memory.piece
        for s, i_t in enumerate(inputs):
            keys.append(self.key(w, i_t, begin + s + offset))
            values.append(self.value(w, i_t))
        # Pieces of the window are seen as tokens.
        old = pieces[: len(pieces) - c.memory_segments * c.block_size // length]
        old = old[-c.memory.pieces :] if len(pieces) > c.memory_segments * c.block_size // length else []
        after = lambda x, here: self.rest_of_layer(
            w, x, self.grouped(w, x, here, keys, values, old, offset), x
        )
        outputs = [after(x, begin + s) for s, x in enumerate(inputs)]
        if len(inputs) < c.block_size:
            return outputs, rows, []
        places = [begin + (i + 1) * length - 1 for i in range(len(rows))]
        new = []
        for x, place in zip(rows, places, strict=True):
            there = range(place + 1 - length, place + 1)
            plain = [rotate(keys[j], -(j + offset), self.frequency) for j in there]
            landmark = rotate(self.key(w, x, place + offset), -(place + offset), self.frequency)
            new.append(Piece(np.array(plain), np.array([values[j] for j in there]), landmark))
        return outputs, [after(x, p) for x, p in zip(rows, places, strict=True)], new

    def grouped(self, w, x, here, keys, values, pieces, offset):
        """Attention of a token or landmark at `here` to its window and to pieces, `[H, Dh]`."""
        c = self.c
        group = c.num_heads // c.num_kv_heads
        q = self.query(w, x, here + offset)
        plain = rotate(q, -(here + offset), self.frequency)
        out = []
        for h in range(c.num_heads):
            kv = h // group
            seen = [j for j in range(len(keys)) if self.sees(here, j)]
            scores = [q[h] @ keys[j][kv] * c.query_scale for j in seen]
            read = [values[j][kv] for j in seen]
            of_landmarks = [plain[h] @ piece.landmark[kv] * c.query_scale for piece in pieces]
            order = sorted(range(len(pieces)), key=lambda i: (round(of_landmarks[i] * 1024), i))
            chosen = order[-c.memory.top :] if c.memory.top else order
            for i, (piece, score) in enumerate(zip(pieces, of_landmarks, strict=True)):
                if i in chosen:
                    inner = np.exp(piece.keys[:, kv] @ plain[h] * c.query_scale)
                    scores.append(score)
                    read.append(inner @ piece.values[:, kv] / inner.sum())
            weights = np.exp(np.array(scores) - max(scores))
            out.append(weights @ np.array(read) / weights.sum())
        return np.array(out)
