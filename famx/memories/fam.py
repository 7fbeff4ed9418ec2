"""Feedback attention memory, FAM: Algorithm 2 and section 2.2 of arXiv 2404.09173.

A layer's memory is `F [B, N, D]`. Every token of block `t` attends to keys and values of `F_{t-1}`, and
`F_{t-1}` as queries compresses the block into `F_t`, all by the layer's own weights.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import rope
from famx.modules.attention import attend_all, attend_parts
from famx.modules.components import partitioned, rms_normalize
from famx.modules.layer import MASS
from famx.modules.memory import Memory, Opened

POSITIONS = ("last", "float", "zero")
STARTS = ("prompt", "prefix")
UPDATES = ("residual", "gated")


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
      normalize: RMS norm of each newly made `F`, without weights; ours.
    """

    kind: ClassVar[str] = "fam"
    attends: ClassVar[bool] = True
    length: int = 64
    positions: str = "last"
    start_from: str = "prompt"
    update: str = "residual"
    update_scale: float = 1.0
    normalize: bool = False

    @property
    def columns(self):
        return self.length

    def check(self, config):
        if self.length < 1:
            return f"Fam.length must be at least 1, got {self.length}; for none set memory to Memory()."
        if self.length > config.block_size:
            return (
                f"Fam.length {self.length} exceeds block_size {config.block_size}: the memory takes the"
                " last positions of a block."
            )
        if not 0.0 < self.update_scale <= 1.0:
            return f"Fam.update_scale must lie in (0, 1], got {self.update_scale}."
        choices = {"positions": POSITIONS, "start_from": STARTS, "update": UPDATES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                return f"Fam.{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}."
        return None

    def parameters(self, config):
        return _Embeddings(config, self.length, "prompt") if self.start_from == "prompt" else None

    def layer_parameters(self, config):
        return _Embeddings(config, self.length, "prefix") if self.start_from == "prefix" else None

    def turns(self, radians):
        if self.positions != "float":
            return None
        fraction = np.arange(1, self.length + 1)[:, None] / (self.length + 1)
        return rope.fixed_point(fraction * radians[:, None])

    # The four moments; tokens attend to the columns by the layer's own softmax (`Memory.attend`).

    def prompt(self, parameters, config):
        wide = jnp.promote_types(config.dtype, jnp.float32)
        return None if parameters is None else parameters().astype(wide)

    def start(self, layer, climb, here):
        if climb is None:
            return None, layer.memory().astype(jnp.promote_types(layer.config.dtype, jnp.float32))
        q, k, v = layer.qkv(climb, self._angles(layer, here.first_block - 1, here)[0])
        attention = attend_all(q[None], [(k[None], v[None])], layer.config)[0]
        return layer.finish(climb, attention).astype(climb.dtype), climb

    def open(self, layer, climb, memory, here):
        # qF, kF, vF = QKV(Norm(F_{t-1})). As a query the memory has the position of the block that it
        # compresses, as a key still that of the block that it was made from.
        block = here.first_block
        angle, key_angle = (self._angles(layer, b, here) for b in (block, block - 1))
        q, k, v = layer.qkv(memory, angle, key_angle)
        return climb, Opened(k, v, held=(q, k, v))

    def close(self, layer, climb, memory, opened, block, here):
        q, k, v = opened.held
        parts = (k, v), (block.keys, block.values)
        probabilities = None
        if self._reads_probabilities or layer.is_mutable_collection(MASS):
            heads_first = [(k.swapaxes(1, 2), v.swapaxes(1, 2), None) for k, v in parts]
            attention, probabilities = attend_parts(q, heads_first, layer.config)
            on_itself = probabilities[..., : self.length]
            layer.keep(MASS, "memory_on_itself", lambda: jnp.mean(jnp.sum(on_itself, -1), -1))
        else:
            attention = attend_all(q, parts, layer.config, here.batch_axis)
        first = (here.updates == 0)[:, None, None]
        new = layer.finish(memory, attention, jnp.where(first, 0, memory))  # A_F, then F_t
        new = new.astype(memory.dtype)
        if self.update_scale != 1.0:
            new = jnp.where(first, new, memory + self.update_scale * (new - memory))
        if self.normalize:
            new = rms_normalize(new, layer.config.norm_epsilon)
        return climb, jnp.where(first, new, self.updated(memory, new, probabilities))

    def updated(self, memory, new, probabilities):
        """`F_t` of every update after the first; override it for another rule.

        Args:
          memory: `F_{t-1} [B, N, D]`, float32 at least.
          new: `F_t` of Algorithm 2, scaled and normalised as the fields say.
          probabilities: attention of the memory's queries `[B, K, G, N, N + S]`; the first `N` columns
            are the memory itself. None for the paper's rule, which needs none.
        """
        if self.update == "residual":
            return new
        gate = write_gate(probabilities, self.length).astype(memory.dtype)
        return memory + gate * (new - memory)

    @property
    def _reads_probabilities(self) -> bool:
        return self.update != "residual" or type(self).updated is not Fam.updated

    # Information for the rest of the package.

    def axes(self):
        return ("memory", "embed")

    def queries(self, opened):
        return opened.held[0]

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory)))}

    def flops(self, config, price, length, from_start):
        n, blocks = self.length, -(-length // config.block_size)
        # Before every block the memory gives keys and values; every token sees them all.
        read = blocks * n * price.keys_values + length * n * price.score
        # Every block but the last updates it; the memory's own keys and values exist already.
        seen = n + config.block_size
        update = n * (price.project - price.keys_values + seen * price.score + price.feed_forward)
        once = 0
        if from_start and self.start_from == "prompt":
            # The prompt runs up the layers; its output of the last layer is not used.
            row = price.project + n * price.score + price.feed_forward
            once = (config.num_layers - 1) * n * row
        return read + (blocks - 1) * update, once

    def _angles(self, layer, block, here):
        """Angles `[B, N, Dh / 2]` of the memory that compressed `block` (int32 `[B]`; -1: the prompt)."""
        n = np.arange(self.length)
        if self.positions == "zero":
            return layer.angles(jnp.zeros((block.shape[0], self.length), jnp.int32), here)
        end = ((block + 1) * layer.config.block_size + here.offset)[:, None]
        if self.positions == "last":
            return layer.angles(end + (n - self.length), here)
        return layer.angles(end + np.full_like(n, -1), here, here.rotation.memory)


class _Embeddings(nn.Module):
    """`N` learned embeddings `[N, D]`, initialised with the expected RMS of token embeddings."""

    config: object
    length: int
    leaf: str

    @nn.compact
    def __call__(self):
        c = self.config
        init = partitioned(nn.initializers.normal(c.embed_dim**-0.5), "memory", "embed")
        return self.param(self.leaf, init, (self.length, c.embed_dim), c.param_dtype)


def write_gate(probabilities, length: int):
    """`max(0, 2 m - 1)` of the attention mass `m` on the block, mean over heads: `[B, N, 1]`.

    The gradient passes a closed gate as if it were open; otherwise a memory that has learned to hold
    could not learn to write.
    """
    mass = jnp.mean(jnp.sum(probabilities[..., length:], -1), axis=(1, 2))
    gate = (2 * mass - 1)[..., None]
    return gate + jax.lax.stop_gradient(nn.relu(gate) - gate)
