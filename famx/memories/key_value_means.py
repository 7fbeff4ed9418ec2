"""Key-Value Means: rows of averaged keys and values that grow by whole blocks (arXiv 2605.09877).

Per key/value head the memory has rows of summed keys `sK`, summed values `sV` and the norm `rho` that
their value keeps. A block that leaves the window first fills free rows with those of its tokens that are
least like any row; each of the others is added to the row that it is most like. Tokens see the rows and
the window in one softmax, the rows as `Khat = LN(sK)` and `Vhat = rho sV / |sV|`.
"""

import dataclasses
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.base.ranges import AtLeastTwo, OneOf, Rate
from famx.base.values import checked
from famx.memories.choosing import rounded
from famx.modules.components import Projection, partitioned
from famx.modules.memory import Memory, Opened

BUDGETS = ("fixed", "root", "saturating")


@checked
@dataclasses.dataclass(frozen=True)
class KeyValueMeans(Memory):
    """Rows `{"keys": [B, K, R, Dh], "values": [B, K, R, Dh], "norms": [B, K, R], "count": [B]}`.

    Sums and norms are float32. The first block that leaves the window becomes the first rows, as far as
    there is room; row 0 is a sink that nothing is added to. Selections carry no gradient.

    What is different from the paper: its keys have channels without rotation, which alone make up `sK`;
    here all channels are rotated, so rows are made of keys before the rotation and compared with queries
    before theirs. Its queries and keys are normalised (`qk_norm`, which fits here, too). With fewer
    key/value than query heads, rows belong to the former and temperatures to the latter.

    Attributes:
      rows: `R`, the largest number of rows.
      budget: number of rows after `t` tokens, at most `R`: "fixed", all at once; "root", `scale sqrt(t)`;
        "saturating", `R t / (R + t)`.
      scale: factor of the budget "root"; the paper has 16.
    """

    kind: ClassVar[str] = "key_value_means"
    closes_oldest: ClassVar[bool] = True
    masks_columns: ClassVar[bool] = True
    plain_columns: ClassVar[bool] = True
    rows: AtLeastTwo = 256
    budget: Annotated[str, OneOf(BUDGETS)] = "fixed"
    scale: Rate = 16.0

    @property
    def columns(self):
        return self.rows

    def layer_parameters(self, config):
        return _OfLayer(config)

    def feature_shape(self, config):
        return (config.num_kv_heads,)

    @property
    def feature_axes(self):
        return ("kv_heads",)

    # The four moments.

    def start(self, layer, climb, here):
        heads, width = layer.config.num_kv_heads, layer.config.head_dim
        zeros = lambda *shape: jnp.zeros((heads, self.rows, *shape), _wide(layer.config))
        count = jnp.zeros(())
        return climb, {"keys": zeros(width), "values": zeros(width), "norms": zeros(), "count": count}

    def open(self, layer, climb, memory, here):
        dtype = layer.config.dtype
        keys = layer.memory.normalize(memory["keys"])
        values = memory["norms"][..., None] * memory["values"] / _length(memory["values"])
        rows_first = lambda x: x.swapaxes(1, 2).astype(dtype)
        visible = jnp.arange(self.rows) < _whole(memory["count"])[:, None]
        return climb, Opened(rows_first(keys), rows_first(values), visible)

    def features(self, layer, x):
        # g = 1 + ELU(x W), without rounding where it is small.
        gate = layer.memory.gate(layer.attention_norm(x))
        return jnp.where(gate > 0, gate + 1, jnp.exp(jnp.minimum(gate, 0)))

    def attend(self, layer, tokens, here):
        on_rows, on_window = layer.memory.temperatures
        scaled = lambda q, by: (q * by[:, None]).astype(q.dtype)
        return tokens.attend(scaled(tokens.query, on_window), scaled(tokens.plain_query, on_rows))

    def close(self, layer, climb, memory, opened, block, here):
        wide = _wide(layer.config)
        normalize = lambda keys: layer.memory.normalize(keys)
        heads_first = lambda x: x.swapaxes(1, 2).astype(wide)
        keys = normalize(heads_first(layer.unrotate(block.keys, block.index, here)))
        values, gate = heads_first(block.values), heads_first(block.features)
        count, size = _whole(memory["count"]), keys.shape[2]
        read = (block.index + layer.config.memory_segments + 1) * size
        room = jnp.minimum(self._budget(read), self.rows) - count
        new = jnp.clip(room, 0, size)

        # Free rows take the tokens that are least like any row; where there is no row, the first ones.
        rows = jnp.arange(self.rows)
        exists = rows < count[:, None]
        score = rounded(jnp.einsum("bksd,bkrd->bksr", keys, normalize(memory["keys"])))
        likeness = jnp.max(jnp.where(exists[:, None, None], score, -jnp.inf), axis=-1)
        rank = jnp.argsort(jnp.argsort(likeness, axis=-1), axis=-1)
        appended = rank < new[:, None, None]
        of_token = jax.nn.one_hot(count[:, None, None] + rank, self.rows, dtype=wide)
        place = jnp.where(appended[..., None], of_token, 0)
        add = lambda sums, place, x: sums + jnp.einsum("bksr,bksd->bkrd", place, x)
        summed_keys = add(memory["keys"], place, keys)
        summed_values = add(memory["values"], place, values)
        norms = memory["norms"] + jnp.einsum("bksr,bks->bkr", place, _length(values)[..., 0])
        count = count + new

        # Each of the others is added to the row that it is most like, but not to the sink.
        score = rounded(jnp.einsum("bksd,bkrd->bksr", keys, normalize(summed_keys)))
        open_to_all = (rows >= 1) & (rows < count[:, None])
        score = jnp.where(open_to_all[:, None, None], score, -jnp.inf)
        nearest = jax.nn.one_hot(jnp.argmax(score, axis=-1), self.rows, dtype=wide)
        place = jnp.where(appended[..., None], 0, nearest * gate[..., None])
        memory = {
            "keys": add(summed_keys, place, keys), "values": add(summed_values, place, values),
            "norms": norms, "count": count.astype(memory["count"].dtype),
        }  # fmt: skip
        return climb, memory

    def _budget(self, read):
        """Number of rows that there may be after `read` tokens, int32 `[B]`."""
        if self.budget == "fixed":
            return jnp.full(read.shape, self.rows, jnp.int32)
        tokens = read.astype(jnp.float32)
        if self.budget == "root":
            rows = self.scale * jnp.sqrt(tokens)
        else:
            rows = self.rows * tokens / (self.rows + tokens)
        return jnp.maximum(rows.astype(jnp.int32), 2)

    # Information for the rest of the package.

    def axes(self):
        row = ("kv_heads", "memory")
        return {"keys": (*row, "kv"), "values": (*row, "kv"), "norms": row, "count": ()}

    def figures(self, parameters, memory):
        return {
            "rows": jnp.mean(memory["count"]),
            "rms": jnp.sqrt(jnp.mean(jnp.square(memory["values"]))),
        }

    def flops(self, config, price, length, from_start):
        c, size = config, config.block_size
        missing = c.memory_segments if from_start else 0
        blocks = max(-(-length // size) - 1 - missing, 0)
        # Tokens see the rows by wider queries; two scores for each token of a block and each row, and two
        # sums of keys and of values, in each key/value head; and the gate.
        read = length * self.rows * price.score
        group = c.num_heads // c.num_kv_heads
        written = blocks * size * self.rows * 3 * price.score // group
        gate = length * price.product * c.embed_dim * c.num_kv_heads
        return read + written + gate, 0


class _OfLayer(nn.Module):
    """Norm of the keys, gate of a token and temperatures of each layer."""

    config: object

    def setup(self):
        c, init = self.config, nn.initializers
        make = lambda name, init, shape, axis: self.param(
            name, partitioned(init, axis), shape, c.param_dtype
        )
        self.scale = make("scale", init.ones, (c.head_dim,), "kv")
        self.bias = make("bias", init.zeros, (c.head_dim,), "kv")
        self.on_rows = make("on_rows", init.ones, (c.num_heads,), "heads")
        self.on_window = make("on_window", init.ones, (c.num_heads,), "heads")
        self.gate = Projection(c, (c.num_kv_heads,), ("embed",), ("kv_heads",))

    @property
    def temperatures(self):
        """`tau` of the rows and of the window, in each query head `[H]`."""
        return self.on_rows, self.on_window

    def normalize(self, keys):
        """Layer norm over the last axis, float32 at least."""
        wide = keys.astype(_wide(self.config))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.config.norm_epsilon) * self.scale + self.bias


def _whole(count):
    """The count as whole numbers; it is kept as a real one, like all that a memory holds."""
    return jax.lax.stop_gradient(count).astype(jnp.int32)


def _wide(config):
    """Dtype of sums: float32 at least."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _length(x):
    """Euclidean length of the last axis, kept with size 1; not smaller than a tiny number."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
