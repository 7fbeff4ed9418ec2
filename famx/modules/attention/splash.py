"""JAX's Pallas kernel for TPUs, splash attention, over all blocks of a chunk in one call.

The `C` blocks of queries are one sequence of rows. The columns are
`[M * S past | C * S own | C * N memory, padded]`, each key there once: a sparse mask lets block `t`
see the tokens of blocks `t - M .. t` and slot `t` of the memory, and tiles that nobody sees are
skipped. Past blocks before the start of a sequence, which differ by example, are masked by segment
ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from famx.modules.backends import LANES

INTERPRET = False  # True runs the kernel as plain JAX on any platform; for tests
TILE = 512  # rows and columns of the kernel's steps, where the block size allows


def attention(config, q, keys, values, memory_keys, memory_values, first_block):
    """Arguments and result of `token_attention`, the config in front.

    Queries are scaled before the kernel, which costs one rounding more in bfloat16 than the plain
    formula, and width of heads that does not fill the lanes of a TPU is padded by its memory layout.
    """
    batch, blocks, size, heads, width = q.shape
    kernel = _kernel(config, blocks, heads)
    columns = _padded(config, blocks)

    def sequence(x, memory):
        """`[B, K, X, Dh]`."""
        x, memory = (y.reshape(batch, -1, *y.shape[3:]) for y in (x, memory))
        pad = columns - x.shape[1] - memory.shape[1]
        x = jnp.concatenate([x, jnp.pad(memory, [(0, 0), (0, pad), (0, 0), (0, 0)])], axis=1)
        return x.swapaxes(1, 2)

    rows = (q * jnp.asarray(config.query_scale, jnp.float32)).astype(q.dtype)
    rows = rows.reshape(batch, -1, heads, width).swapaxes(1, 2)
    segments = None
    if config.memory_segments:
        block = np.arange(columns) // size - config.memory_segments  # the memory's are all > 0
        there = (first_block[:, None] + block >= 0).astype(jnp.int32)
        segments = splash_attention_kernel.SegmentIds(jnp.ones((batch, blocks * size), jnp.int32), there)
    out = jax.vmap(kernel)(rows, sequence(keys, memory_keys), sequence(values, memory_values), segments)
    return out.swapaxes(1, 2).reshape(q.shape)


def _tile(block_size):
    """Rows and columns of a tile: it must not straddle blocks, see `_kernel`."""
    return max(t for t in range(LANES, TILE + 1, LANES) if block_size % t == 0)


def _padded(config, blocks):
    """Number of columns, a multiple of the tile."""
    tile = _tile(config.block_size)
    columns = (config.memory_segments + blocks) * config.block_size + blocks * config.fam_length
    return -(-columns // tile) * tile


def _kernel(config, blocks, heads):
    """Splash attention of `[H, C * S, Dh]` to `[K, X, Dh]`, forward and backward.

    Queries' and keys' gradients come from a kernel each. The fused one would keep one
    copy of the queries' gradient for every tile of columns.
    """
    tile = _tile(config.block_size)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=tile, block_kv=tile,
        block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip

    def make(own_only):
        mask = ChunkMask(
            blocks, config.block_size, config.memory_segments, config.fam_length,
            _padded(config, blocks), config.window_mask, own_only,
        )  # fmt: skip
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes,
            attn_logits_soft_cap=config.attention_softcap,
            head_shards=1, q_seq_shards=1, interpret=INTERPRET,
        )  # fmt: skip

    kernel = make(own_only=False)
    if config.stop_gradient_segments and config.memory_segments:
        # The keys' gradient alone skips the tiles of past blocks.
        kernel.dkv_mask_info = make(own_only=True).dkv_mask_info
    return kernel


@dataclasses.dataclass(frozen=True)
class ChunkMask(splash_attention_mask.Mask):
    """Who sees whom, computed tile by tile and, within the kernel, anew from row and column.

    Row `r` of block `t` sees column `x` if `lowest(r) <= top(x)` and `bottom(x) <= r + M * S`. For
    tokens both ends are the column itself; slot `u` of the memory has those that only block `u` meets.
    """

    blocks: int  # C
    block_size: int  # S
    segments: int  # M
    fam_length: int  # N
    columns: int
    window: bool
    own_only: bool = False  # without past blocks

    @property
    def shape(self):
        return self.blocks * self.block_size, self.columns

    @property
    def q_sequence(self):
        return np.arange(self.shape[0], dtype=np.int32)

    def __getitem__(self, index):
        rows, columns = (np.arange(n, dtype=np.int32)[part] for n, part in zip(self.shape, index))
        return self.mask_function(rows[:, None], columns)

    def mask_function(self, rows, columns):
        """bool; integers of numpy or JAX, broadcastable."""
        where = np.where if isinstance(columns, np.ndarray) else jnp.where
        size, past = self.block_size, self.segments * self.block_size
        if self.own_only:
            lowest = _divide(rows, size) * size + past
        else:
            lowest = rows if self.window else _divide(rows, size) * size
        top, bottom = columns, columns
        first = past + self.blocks * size
        if self.columns > first:
            memory = columns >= first
            slot = _divide(columns - first, max(self.fam_length, 1)) * size
            bottom = where(memory, slot + past, columns)
            top = where(memory, slot + (past if self.own_only else 0) + size - 1, columns)
        return (lowest <= top) & (bottom <= rows + past)


def _divide(x, by):
    """`x // by` for `0 <= x < 2^21`; the vector units of a TPU shift and multiply, but do not divide."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    if isinstance(x, np.ndarray):
        return x // by
    return ((x.astype(jnp.float32) + 0.5) * (1 / by)).astype(jnp.int32)
