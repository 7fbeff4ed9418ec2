"""JAX's Pallas kernel for TPUs, splash attention, over all blocks of a chunk in one call.

The `C` blocks of queries are one sequence of rows. The columns are
`[M * S past | C * S own | C memories of N, each padded]`, each key once: a sparse mask lets block
`t` see the tokens of blocks `t - M .. t` and memory `t`, and tiles without a visible pair are skipped.
Past blocks before the start of a sequence, which differ by example, are masked by segment ids.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from famx.modules.attention.common import ATTENTION_RESULT
from famx.modules.backends import LANES

INTERPRET = False  # True runs the kernel as plain JAX on any platform; for tests
TILE = 512  # rows and columns per step of the kernel, if the block size allows
_NEVER = 2**30  # more than any row


def attention(config, q, keys, values, memory_keys, memory_values, first_block):
    """`token_attention` with the config first.

    Queries are scaled before the kernel, which costs one rounding more in bfloat16 than the plain
    formula. Head widths that do not fill the lanes of a TPU are padded by its memory layout.
    """
    batch, blocks, size, heads, width = q.shape
    kernel = _kernel(config, blocks, heads)
    columns = _padded(config, blocks)

    def sequence(x, memory):
        """`[B, K, X, Dh]`."""
        pad = lambda y, axis, size: jnp.pad(y, [(0, size * (i == axis)) for i in range(y.ndim)])
        memory_columns = config.memory_columns
        parts = [x, pad(memory, 2, _slot(config) - memory_columns)] if memory_columns else [x]
        x = jnp.concatenate([y.reshape(batch, -1, *y.shape[3:]) for y in parts], axis=1)
        return pad(x, 1, columns - x.shape[1]).swapaxes(1, 2)

    rows = (q * jnp.asarray(config.query_scale, jnp.float32)).astype(q.dtype)
    rows = rows.reshape(batch, -1, heads, width).swapaxes(1, 2)
    segments = None
    if config.memory_segments:
        block = np.arange(columns) // size - config.memory_segments  # columns of the memory: all > 0
        exists = (first_block[:, None] + block >= 0).astype(jnp.int32)
        segments = splash_attention_kernel.SegmentIds(jnp.ones((batch, blocks * size), jnp.int32), exists)
    out = jax.vmap(kernel)(rows, sequence(keys, memory_keys), sequence(values, memory_values), segments)
    return out.swapaxes(1, 2).reshape(q.shape)


def tile_size(block_size):
    """Rows and columns of a tile: it must not straddle blocks, see `_kernel`."""
    return max(t for t in range(LANES, TILE + 1, LANES) if block_size % t == 0)


def _slot(config):
    """Number of columns that a memory of `N` takes, a power of two.

    Not the minimum: the kernel of the keys' gradient takes as many steps for every tile of columns as for
    the tile that most rows see, and that would be a tile of many small memories.
    """
    return max(LANES, 1 << (config.memory_columns - 1).bit_length()) if config.memory_columns else 0


def _padded(config, blocks):
    """Number of columns, a multiple of the tile."""
    tile = tile_size(config.block_size)
    columns = (config.memory_segments + blocks) * config.block_size + blocks * _slot(config)
    return -(-columns // tile) * tile


def chunk_mask(config, blocks, own_only=False):
    """The mask of a chunk of `blocks` blocks; `own_only`: without past blocks."""
    return ChunkMask(
        blocks, config.block_size, config.memory_segments, config.memory_columns, _slot(config),
        _padded(config, blocks), config.window_mask, own_only,
    )  # fmt: skip


def _kernel(config, blocks, heads):
    """Splash attention of `[H, C * S, Dh]` to `[K, X, Dh]`, forward and backward.

    The gradients of queries and keys come from a kernel each. The fused kernel would keep one copy of the
    queries' gradient for every tile of columns.
    """
    tile = tile_size(config.block_size)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=tile, block_kv=tile,
        block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip

    def make(own_only):
        mask = chunk_mask(config, blocks, own_only)
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes,
            attn_logits_soft_cap=config.attention_softcap,
            head_shards=1, q_seq_shards=1, interpret=INTERPRET, residual_checkpoint_name=ATTENTION_RESULT,
        )  # fmt: skip

    kernel = make(own_only=False)
    if config.stop_gradient_segments and config.memory_segments:
        # Only the keys' gradient skips the tiles of past blocks.
        kernel.dkv_mask_info = make(own_only=True).dkv_mask_info
    return kernel


@dataclasses.dataclass(frozen=True)
class ChunkMask(splash_attention_mask.Mask):
    """Visibility, computed tile by tile and, within the kernel, again from row and column.

    Row `r` of block `t` sees column `x` if `lowest(r) <= top(x)` and `bottom(x) <= r + M * S`. For
    tokens both ends are the column itself; memory `u` has ends that only block `u` meets.
    """

    blocks: int  # C
    block_size: int  # S
    segments: int  # M
    memory_columns: int  # N
    slot: int  # columns of a memory, its padding included; a power of two
    columns: int
    window: bool
    own_only: bool = False  # without past blocks

    @property
    def shape(self):
        """Rows and columns."""
        return self.blocks * self.block_size, self.columns

    @property
    def q_sequence(self):
        """Indices of the rows, which the kernel requires."""
        return np.arange(self.shape[0], dtype=np.int32)

    def __getitem__(self, index):
        """bool; read-only where all pairs of `index`, two slices, or none of them are visible.

        Bounds decide most tiles without looking at their pairs, of which a long text has billions.
        """
        rows, columns = (range(*part.indices(n)) for n, part in zip(self.shape, index))
        if len(rows) and len(columns):
            shape = len(rows), len(columns)
            least_top, most_top, least_bottom, most_bottom = _bounds(self, columns.start, columns.stop)
            if self._lowest(rows[0]) > most_top or least_bottom > rows[-1] + self._past:
                return _uniform(False, shape)
            if self._lowest(rows[-1]) <= least_top and most_bottom <= rows[0] + self._past:
                return _uniform(True, shape)
        rows, columns = (np.array(x, np.int32) for x in (rows, columns))
        return self.mask_function(rows[:, None], columns)

    def mask_function(self, rows, columns):
        """bool; integers of numpy or JAX, broadcastable."""
        top, bottom = self._ends(columns)
        return (self._lowest(rows) <= top) & (bottom <= rows + self._past)

    @property
    def _past(self):
        """Number of columns before those of the first block."""
        return self.segments * self.block_size

    def _lowest(self, rows):
        """The first of the tokens' columns that each row sees; it never falls from row to row."""
        if self.window and not self.own_only:
            return rows
        block = _divide(rows, self.block_size) * self.block_size
        return block + self._past if self.own_only else block

    def _ends(self, columns):
        """`top, bottom` of each column."""
        where = np.where if isinstance(columns, np.ndarray) else jnp.where
        size, past = self.block_size, self._past
        if not self.memory_columns:
            return columns, columns
        inside = columns - (past + self.blocks * size)
        memory = _divide(inside, self.slot) * size
        seen = (inside & (self.slot - 1)) < self.memory_columns
        bottom = where(inside < 0, columns, where(seen, memory + past, _NEVER))
        top = where(inside < 0, columns, memory + (past if self.own_only else 0) + size - 1)
        return top, bottom


@functools.lru_cache(maxsize=4096)
def _bounds(mask, start, stop):
    """The least and the greatest `top`, and the same of `bottom`, of a range of columns."""
    ends = mask._ends(np.arange(start, stop, dtype=np.int32))
    return tuple(int(bound()) for end in ends for bound in (end.min, end.max))


@functools.lru_cache(maxsize=16)
def _uniform(value, shape):
    array = np.full(shape, value)
    array.flags.writeable = False
    return array


def _divide(x, by):
    """`x // by` for `0 <= x < 2^21`; the vector units of a TPU shift and multiply, but do not divide."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    if isinstance(x, (int, np.ndarray)):
        return x // by
    return ((x.astype(jnp.float32) + 0.5) * (1 / by)).astype(jnp.int32)
