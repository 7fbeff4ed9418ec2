"""The oracle: Algorithms 1 and 2 in numpy float64, one token after another, with nothing clever.

It keeps every key of every token ever read, builds for each query a dense mask over all of them,
and goes block by block through all layers. Angles are plain float64 products of position and
frequency. One sequence `[L]` at a time. Letters are the paper's; shapes are named as everywhere
(`S` block size, `M` memory segments, `N` FAM length, `D` width, `H` and `K` heads).
"""

import math

import numpy as np


class Oracle:
    """A decoder with the parameters of `famx.modules.Decoder`, unboxed, as numpy arrays."""

    def __init__(self, config, params):
        self.c = config
        self.w = _float64(params)
        self.layers = [_select(self.w["layers"], i) for i in range(config.num_layers)]
        self.enter(0)

    def read(self, tokens, offset=0):
        """`tokens [L]`: logits `[L, V]`, memories `[layers, N, D]` and the number of updates."""
        c = self.c
        size = c.block_size
        past = [([], []) for _ in self.layers]  # keys and values of all tokens so far, per layer
        memories = self.first_memories(offset)
        logits, updates = [], 0
        for t in range(math.ceil(len(tokens) / size)):
            block = tokens[t * size : (t + 1) * size]
            x = [self.embed(token) for token in block]
            for i, w in enumerate(self.layers):
                self.enter(i)
                x, new = self.block(w, x, t, *past[i], memories[i], offset)
                if len(block) == size:
                    memories[i] = new
            updates += len(block) == size
            logits.extend(self.logits(o) for o in x)
        return np.array(logits), self.stack(memories), updates

    def stack(self, memories):
        return np.array(memories).reshape(self.c.num_layers, self.c.memory_columns, self.c.embed_dim)

    def enter(self, layer):
        """From here on queries and keys rotate as those of `layer` do."""
        c = self.c
        kind = c.rope_layers[layer] if c.rope_layers else "global"
        pairs = np.arange(c.head_dim // 2)
        self.frequency = {
            "global": frequencies(c),
            "local": c.local_rope_base ** (-2 * pairs / c.head_dim),
            "none": 0 * pairs,
        }[kind]

    # Algorithms 1 and 2.

    def block(self, w, inputs, t, keys, values, memory, offset):
        """`O_t` and `F_t` of one layer. Appends the block's keys and values to `keys`, `values`."""
        c = self.c
        size, n = c.block_size, c.memory.length if c.memory.exists else 0
        begin, past = t * size, c.memory.past if c.memory.exists else 1
        as_query = [self.memory_position(t, i, offset) for i in range(n)]
        as_key = [self.memory_position(t - p, i, offset) for p in range(past, 0, -1) for i in range(n)]
        exists = [p <= t + 1 for p in range(past, 0, -1) for _ in range(n)]
        newest = memory[-n:] if n else []
        # qF, kF, vF = QKV(Norm(F_{t-1}))
        adapted = self.with_adapters(w)
        learned = n and c.memory.query == "learned"
        queries = list(w["memory"]["queries"]) if learned else newest
        q_f = [self.query(adapted, f, p) for f, p in zip(queries, as_query, strict=True)]
        k_f = [self.key(adapted, f, p) for f, p in zip(memory, as_key, strict=True)]
        v_f = [self.value(adapted, f) for f in memory]
        # q, k, v = QKV(Norm(I_t))
        for s, i_t in enumerate(inputs):
            keys.append(self.key(w, i_t, begin + s + offset))
            values.append(self.value(w, i_t))
        outputs = []
        for s, i_t in enumerate(inputs):
            here = begin + s
            mask = exists + [self.sees(here, there) for there in range(len(keys))]
            q = self.query(w, i_t, here + offset)
            attention, _ = self.attend(q, k_f + keys, v_f + values, mask, w)
            outputs.append(self.rest_of_layer(w, i_t, attention, i_t))
        if not n or len(inputs) < size:
            return outputs, memory
        own_k, own_v = k_f + keys[begin:], v_f + values[begin:]
        mask = exists + [True] * size
        compressed = [self.attend(q, own_k, own_v, mask, w) for q in q_f]
        new = []
        for f, x, (attention, weights) in zip(newest, queries, compressed, strict=True):
            first = t == 0 and c.memory.first_residual == "zero"
            zero = first and not learned
            f_t = self.rest_of_layer(adapted, x, attention, np.zeros_like(x) if zero else x)
            new.append(self.variants_of_update(w, f, f_t, weights, first))
        return outputs, memory[n:] + new

    def sees(self, here, there):
        """Whether the token at `here` may look at the token at `there`, past, present or future."""
        size, segments = self.c.block_size, self.c.memory_segments
        if there > here:
            return False
        if self.c.window_mask and here - there > segments * size:
            return False
        return here // size - there // size <= segments

    def rest_of_layer(self, w, x, attention, residual):
        """`A = Attn + residual`, then `O = FF(Norm(A)) + A`."""
        c = self.c
        projected = np.einsum("hk,hkd->d", attention, w["output"]["kernel"])
        projected = projected + w["output"].get("bias", 0)
        if c.post_norms:
            projected = self.norm(projected, w["post_attention_norm"])
        a = projected + residual
        if c.parallel_block:
            ff = self.feed_forward(w["mlp"], self.norm(x, w["attention_norm"]))
        else:
            ff = self.feed_forward(w["mlp"], self.norm(a, w["mlp_norm"]))
        if c.post_norms:
            ff = self.norm(ff, w["post_mlp_norm"])
        return ff + a

    def with_adapters(self, w):
        """The layer's weights for the memory alone: the memory's adapters merged into them."""
        parts = w.get("memory", {}).get("adapters")
        if parts is None:
            return w

        def kernel(weights, name):
            a, b = (parts[f"{side}_{name}"]["kernel"] for side in "ab")
            return {**weights, "kernel": weights["kernel"] + np.tensordot(a, b, 1)}

        mlp = {name: kernel(w["mlp"][name], name) for name in w["mlp"]}
        own = {name: kernel(w[name], name) for name in ("query", "key", "value", "output")}
        return {**w, **own, "mlp": mlp}

    def variants_of_update(self, w, old, new, weights, first):
        """What is not in the paper: scaled updates, normalised memory, the write gate."""
        c = self.c
        rms = w["memory"]["rms"] if c.memory.normalize == "measured" else 1
        unit = lambda f: f * rms / np.sqrt(np.mean(f**2) + c.norm_epsilon) if c.memory.normalize else f
        if first:
            return unit(new)
        new = unit(old + c.memory.update_scale * (new - old))
        if c.memory.update == "residual":
            return new
        on_block = weights[:, c.memory_columns :].sum(axis=1).mean()
        if on_block <= 0.5:
            return old
        gate = 2 * on_block - 1
        return (1 - gate) * old + gate * new  # of two normalized memories, not normalized again

    def first_memories(self, offset):
        """`F_0` of every layer: the prompt run up the layers alone, or a prefix per layer."""
        c = self.c
        if not c.memory.exists:
            return [[] for _ in self.layers]
        missing = [np.zeros(c.embed_dim)] * (c.memory_columns - c.memory.length)
        if c.memory.start_from == "prefix":
            return [missing + list(w["memory"]["prefix"]) for w in self.layers]
        positions = [self.memory_position(-1, i, offset) for i in range(c.memory.length)]
        memories, x = [], list(self.w["memory"]["prompt"])
        for i, w in enumerate(self.layers):
            self.enter(i)
            w = self.with_adapters(w)
            memories.append(missing + list(x))
            k = [self.key(w, f, p) for f, p in zip(x, positions, strict=True)]
            v = [self.value(w, f) for f in x]
            above = []
            for f, p in zip(x, positions, strict=True):
                attention, _ = self.attend(self.query(w, f, p), k, v, [True] * len(k))
                above.append(self.rest_of_layer(w, f, attention, f))
            x = above
        return memories

    def memory_position(self, block, i, offset):
        """Position of memory token `i` that compressed (or is compressing) `block`; -1: prompt."""
        c = self.c
        end = (block + 1) * c.block_size + offset
        return {
            "last": end - c.memory.length + i,
            "float": end - 1 + (i + 1) / (c.memory.length + 1),
            "zero": 0,
        }[c.memory.positions]

    # Attention.

    def attend(self, q, keys, values, mask, w={}):  # noqa: B006, nothing changes it
        """`q [H, Dh]`, lists of `[K, Dh]`, mask over the list: `[H, Dh]` and weights `[H, X]`.

        The memory's columns come first; `w`, if given, may have a bias of their scores.
        """
        c = self.c
        group = c.num_heads // c.num_kv_heads
        out, all_weights = [], []
        for h in range(c.num_heads):
            scores = np.array([q[h] @ k[h // group] for k in keys]) * c.query_scale
            if "bias" in w.get("memory", {}):
                scores[: c.memory_columns] += w["memory"]["bias"][h]
            if c.attention_softcap is not None:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out.append(sum(p * v[h // group] for p, v in zip(weights, values, strict=True)))
            all_weights.append(weights)
        return np.array(out), np.array(all_weights)

    def query(self, w, x, position):
        q = self.project(w["query"], self.norm(x, w["attention_norm"]))
        if self.c.qk_norm:
            q = self.rms(q) * w["query_norm"]["scale"]
        return rotate(q, position, self.frequency)

    def key(self, w, x, position):
        k = self.project(w["key"], self.norm(x, w["attention_norm"]))
        if self.c.qk_norm:
            k = self.rms(k) * w["key_norm"]["scale"]
        return rotate(k, position, self.frequency)

    def value(self, w, x):
        return self.project(w["value"], self.norm(x, w["attention_norm"]))

    # The ordinary parts.

    def project(self, w, x):
        return np.tensordot(x, w["kernel"], 1) + w.get("bias", 0)

    def rms(self, x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.c.norm_epsilon)

    def norm(self, x, w):
        if self.c.norm == "rms":
            return self.rms(x) * w["scale"]
        return (x - x.mean()) / np.sqrt(x.var() + self.c.norm_epsilon) * w["scale"] + w["bias"]

    def feed_forward(self, w, x):
        up = self.project(w["up"], x)
        activate = ACTIVATIONS[self.c.activation]
        hidden = activate(self.project(w["gate"], x)) * up if self.c.gated_mlp else activate(up)
        return self.project(w["down"], hidden)

    def embed(self, token):
        x = self.w["embedding"][token]
        return x * math.sqrt(self.c.embed_dim) if self.c.scale_embeddings else x

    def logits(self, x):
        head = self.w["embedding"].T if self.c.tied_embeddings else self.w["head"]
        logits = self.norm(x, self.w["final_norm"]) @ head
        cap = self.c.logit_softcap
        return logits if cap is None else cap * np.tanh(logits / cap)


_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
}


def rotate(x, position, frequency):
    """`x [..., Dh]` turned by `position * frequency`: pairs are `(x[d], x[d + Dh / 2])`."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * frequency)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def frequencies(config):
    """Radians per token of each pair `[Dh / 2]`, Llama 3's scaling one pair after another."""
    scaling = config.rope_scaling
    result = []
    for pair in range(config.head_dim // 2):
        f = 1 / config.rope_base ** (2 * pair / config.head_dim)
        if scaling is not None and scaling.original_length is None:
            f = f / scaling.factor
        elif scaling is not None:
            turns = scaling.original_length * f / (2 * math.pi)  # within the original length
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            if turns < low:
                f = f / scaling.factor
            elif turns <= high:
                kept = (turns - low) / (high - low)
                f = kept * f + (1 - kept) * f / scaling.factor
        result.append(f)
    return np.array(result)


def _float64(tree):
    if hasattr(tree, "items"):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def _select(tree, index):
    if isinstance(tree, dict):
        return {name: _select(part, index) for name, part in tree.items()}
    return tree[index]
