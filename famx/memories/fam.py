"""Feedback attention memory, FAM: Algorithm 2 and section 2.2 of arXiv 2404.09173.

A layer's memory is `F [B, N, D]`. Every token of block `t` attends to keys and values of `F_{t-1}`, and
`F_{t-1}` as queries compresses the block into `F_t`, all by the layer's own weights.
"""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.base.ranges import Expected, NonNegative, OneOf, Positive, PositiveShare
from famx.base.values import checked
from famx.memories.fam_parameters import OfLayer, shapes
from famx.memories.learned_rows import Rows
from famx.modules import rope
from famx.modules.attention import attend_all, attend_parts, column_dimensions
from famx.modules.components import rms_normalize
from famx.modules.layer import MASS
from famx.modules.memory import Memory, Opened

POSITIONS = ("last", "float", "zero")
STARTS = ("prompt", "prefix")
UPDATES = ("residual", "gated")
RESIDUALS = ("zero", "ordinary")
BIASES = ("none", "zero", "minus_log_length")
QUERIES = ("memory", "learned")
_Length = Annotated[
    Positive, Expected("a whole number of at least 1 (for none set DecoderConfig.memory to @Memory())")
]


@checked
@dataclasses.dataclass(frozen=True)
class Fam(Memory):
    """Feedback attention memory of `length` vectors per layer; the defaults are the paper's.

    Attributes:
      length: `N`.
      positions: RoPE positions of the memory of a block: "last", the block's last `N` (paper); "float",
        between this block and the next (B.4.3); "zero".
      start_from: "prompt", `N` embeddings run up the layers (B.4.6); "prefix", `N` in each layer.
      update: "residual", the paper's; "gated", ours: a memory token is updated by the share `2 m - 1`,
        where `m` is its attention on the block, and kept bit for bit where `m` is at most one half.
      update_scale: factor in (0, 1] of every update after the first; ours; 1 is the paper's.
      normalize: RMS norm of each newly made `F`; ours. True: to 1. "measured": to the RMS that the
        layer's input has in plain text, a parameter that does not learn (`famx.models.memory_start`).
      first_residual: residual of the first update: "zero", the paper's; "ordinary", ours: the memory,
        so that the first update is like every other.
      bias: bias per layer and head of the scores of the memory's columns, which is learned; ours.
        "none": no such parameter; "zero" and "minus_log_length" (`-log N`, with which `N` equal rows
        weigh as much as one) say where it starts.
      adapter_rank: rank of low-rank adapters through which only the memory goes, not the text, on all
        projections of each layer; ours. They are parameters of the memory, and 0 is none.
      query: what compresses a block: "memory", a copy of the last `F` (paper); "learned", `N` learned
        rows in each layer, which are the residual as well, so that the last `F` is seen only as keys and
        values. The paper's ablation, which fails there; where its rows come from it leaves open.
      past: number of past memories that tokens and the memory itself see, the newest last (B.4.2). The
        state then has `past * N` rows.
    """

    kind: ClassVar[str] = "fam"
    length: _Length = 64
    positions: Annotated[str, OneOf(POSITIONS)] = "last"
    start_from: Annotated[str, OneOf(STARTS)] = "prompt"
    update: Annotated[str, OneOf(UPDATES)] = "residual"
    update_scale: PositiveShare = 1.0
    normalize: bool | Literal["measured"] = False
    first_residual: Annotated[str, OneOf(RESIDUALS)] = "zero"
    bias: Annotated[str, OneOf(BIASES)] = "none"
    adapter_rank: NonNegative = 0
    query: Annotated[str, OneOf(QUERIES)] = "memory"
    past: Positive = 1

    @property
    def columns(self):
        return self.length * self.past

    @property
    def attends(self):
        """Whether attention maps show the memory: they have as many rows as columns."""
        return self.past == 1

    @property
    def masks_columns(self):
        """Whether columns are masked: past memories that do not exist yet."""
        return self.past > 1

    def check(self, config):
        if self.length > config.block_size:
            return (
                f"Fam.length {self.length} exceeds block_size {config.block_size}: the memory takes the"
                " last positions of a block."
            )
        return None

    def parameters(self, config):
        return Rows(config, self.length) if self.start_from == "prompt" else None

    def layer_parameters(self, config):
        learns = self.start_from == "prefix" or self.has_column_bias or self.adapter_rank
        learns = learns or self.query == "learned"
        return OfLayer(config) if learns or self.normalize == "measured" else None

    @property
    def has_column_bias(self):
        return self.bias != "none"

    def column_bias(self, layer):
        return layer.memory.bias if self.has_column_bias else None

    def turns(self, radians):
        if self.positions != "float":
            return None
        fraction = np.arange(1, self.length + 1)[:, None] / (self.length + 1)
        return rope.fixed_point(fraction * radians[:, None])

    # The four moments; tokens attend to the columns by the layer's own softmax (`Memory.attend`).

    def prompt(self, decoder):
        return None if decoder.memory is None else decoder.memory()

    def start(self, layer, climb, here):
        if climb is None:
            prefix = layer.memory.prefix.astype(jnp.promote_types(layer.config.dtype, jnp.float32))
            return None, self._as_newest(prefix)
        # A bias of all columns would change nothing here.
        angle, adapters = self._angles(layer, here.first_block - 1, here)[0], self._adapters(layer)
        q, k, v = layer.qkv(climb, angle, adapters=adapters)
        attention = attend_all(q[None], [(k[None], v[None])], layer.config)[0]
        above = layer.finish(climb, attention, adapters=adapters).astype(climb.dtype)
        return above, self._as_newest(climb)

    def open(self, layer, climb, memory, here):
        # qF, kF, vF = QKV(Norm(F_{t-1})). As a query the memory has the position of the block that it
        # compresses, as a key still that of the block that it was made from.
        block, n = here.first_block, self.length
        angle = self._angles(layer, block, here)
        ages = range(self.past, 0, -1)
        key_angle = jnp.concatenate([self._angles(layer, block - age, here) for age in ages], axis=1)
        adapters, visible = self._adapters(layer), None
        if self.query == "learned":
            # Each projection is called once: the learned rows stand in front.
            rows = jnp.concatenate([self._learned(layer, memory), memory], axis=1)
            angles = jnp.concatenate([angle, key_angle], axis=1)
            q, k, v = layer.qkv(rows, angles, angles, adapters)
            q, k, v = q[:, :n], k[:, n:], v[:, n:]
        else:
            angle = jnp.concatenate([key_angle[:, :-n], angle], axis=1)
            q, k, v = layer.qkv(memory, angle, key_angle, adapters)
            q = q[:, -n:]
        if self.past > 1:
            known = n * jnp.minimum(here.updates + 1, self.past)
            visible = jnp.arange(self.columns) >= self.columns - known[:, None]
        widen_query, widen_keys = column_dimensions(self.column_bias(layer), layer.config)
        return climb, Opened(k, v, visible, held=(widen_query(q), widen_keys(k, True, visible), v))

    def close(self, layer, climb, memory, opened, block, here):
        q, k, v = opened.held
        block_keys = column_dimensions(self.column_bias(layer), layer.config)[1](block.keys, False)
        parts = (k, v), (block_keys, block.values)
        probabilities = None
        if self._reads_probabilities or layer.is_mutable_collection(MASS):
            heads_first = [(k.swapaxes(1, 2), v.swapaxes(1, 2), None) for k, v in parts]
            attention, probabilities = attend_parts(q, heads_first, layer.config)
            on_itself = probabilities[..., : self.columns]
            layer.keep(MASS, "memory_on_itself", lambda: jnp.mean(jnp.sum(on_itself, -1), -1))
        else:
            attention = attend_all(q, parts, layer.config, here.batch_axis)
        first = (here.updates == 0)[:, None, None]
        choose = lambda at_first, later: jnp.where(first, at_first, later)
        if self.first_residual == "ordinary":
            choose = lambda at_first, later: later
        older, memory = memory[:, self.length :], memory[:, -self.length :]
        if self.query == "learned":
            base = residual = self._learned(layer, memory)
        else:
            base, residual = memory, choose(0, memory)
        new = layer.finish(base, attention, residual, self._adapters(layer))  # A_F, then F_t
        new = new.astype(memory.dtype)
        if self.update_scale != 1.0:
            new = choose(new, memory + self.update_scale * (new - memory))
        if self.normalize:
            new = rms_normalize(new, layer.config.norm_epsilon)
        if self.normalize == "measured":
            new = new * jax.lax.stop_gradient(layer.memory.rms).astype(new.dtype)
        new = choose(new, self.updated(memory, new, probabilities))
        return climb, jnp.concatenate([older, new], axis=1) if self.past > 1 else new

    def updated(self, memory, new, probabilities):
        """`F_t` of every update after the first, or of every one; override it for another rule.

        Args:
          memory: `F_{t-1} [B, N, D]`, float32 at least.
          new: `F_t` of Algorithm 2, scaled and normalised as the fields say.
          probabilities: attention of the memory's queries `[B, K, G, N, columns + S]`; the first
            columns are the memory itself. None for the paper's rule, which needs none.
        """
        if self.update == "residual":
            return new
        gate = write_gate(probabilities, self.columns).astype(memory.dtype)
        return memory + gate * (new - memory)

    @property
    def _reads_probabilities(self) -> bool:
        return self.update != "residual" or type(self).updated is not Fam.updated

    # Information for the rest of the package.

    def axes(self):
        return ("memory", "embed")

    def queries(self, opened):
        return opened.held[0]

    def attention_share(self, on_block, first):
        # One half of `new` is attention, the other its residual; but a residual without text, zero or
        # learned rows, counts for nothing. The update then mixes `new` with the memory as it was.
        gate = nn.relu(2 * on_block - 1) if self.update == "gated" else jnp.ones_like(on_block)
        mixed = self.update_scale * gate
        later = mixed if self.query == "learned" else mixed / 2
        return later if self.first_residual == "ordinary" else jnp.where(first, 1, later)

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory[..., -self.length :, :])))}

    def flops(self, config, price, length, from_start):
        n, columns, blocks = self.length, self.columns, -(-length // config.block_size)
        # Before every block the memories give keys and values; every token sees them all.
        adapters = {name: price.product * self.adapter_rank * sum(map(math.prod, shapes))
                    for name, shapes in shapes(config).items()}  # fmt: skip
        keys_values = adapters["key"] + adapters["value"] + price.keys_values
        read = blocks * columns * keys_values + length * columns * price.score
        # Every block but the last updates it; the memory's own keys and values exist already.
        seen = columns + config.block_size
        all_rows = price.project + price.feed_forward + sum(adapters.values())
        update = n * (all_rows - keys_values + seen * price.score)
        once = 0
        if from_start and self.start_from == "prompt":
            # The prompt runs up the layers; its output of the last layer is not used.
            row = all_rows + n * price.score
            once = (config.num_layers - 1) * n * row
        return read + (blocks - 1) * update, once

    def _as_newest(self, memory):
        """The whole memory `[past * N, D]`, of which only the newest, `[N, D]`, exists."""
        return jnp.pad(memory, [(self.columns - self.length, 0), (0, 0)])

    def _learned(self, layer, like):
        """The learned queries for every example, `[B, N, D]`."""
        queries = layer.memory.queries.astype(like.dtype)
        return jnp.broadcast_to(queries, (like.shape[0], *queries.shape))

    def _adapters(self, layer):
        return layer.memory.adapters if self.adapter_rank else None

    def _angles(self, layer, block, here):
        """Angles `[B, N, Dh / 2]` of the memory that compressed `block` (int32 `[B]`; -1: the prompt)."""
        n = np.arange(self.length)
        if self.positions == "zero":
            return layer.angles(jnp.zeros((block.shape[0], self.length), jnp.int32), here)
        end = ((block + 1) * layer.config.block_size + here.offset)[:, None]
        if self.positions == "last":
            return layer.angles(end + (n - self.length), here)
        return layer.angles(end + np.full_like(n, -1), here, here.rotation.memory)


def write_gate(probabilities, columns: int):
    """`max(0, 2 m - 1)` of the attention mass `m` on the block, mean over heads: `[B, N, 1]`.

    The gradient passes a closed gate as if it were open; otherwise a memory that has learned to hold
    could not learn to write.
    """
    mass = jnp.mean(jnp.sum(probabilities[..., columns:], -1), axis=(1, 2))
    gate = (2 * mass - 1)[..., None]
    return gate + jax.lax.stop_gradient(nn.relu(gate) - gate)
