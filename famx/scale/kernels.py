"""Operation counts of attention kernels, which are opaque to XLA."""

import math
import re
from collections.abc import Callable, Sequence

from famx.modules import DecoderConfig
from famx.modules.attention import splash
from famx.scale.hlo import Array, Instruction

# Matrix products per tile. Forward: scores and values. The backward kernels recompute the scores and the
# gradient of the weights, and add the gradient of the queries (dq), or of keys and values (dkv).
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# cuDNN's fused attention, with or without biases, has one backward call for all gradients.
_CUDNN = re.compile(r"__cudnn\$fmha\w*?(Backward)?$")
_CUDNN_FORWARD, _CUDNN_BACKWARD = 2, 5

Kernels = Callable[[Instruction, Sequence[Array]], float | None]


def of_model(config: DecoderConfig) -> Kernels:
    """Counter for the attention kernels of a model.

    Returns:
      A function of a custom call and the arrays of its operands that returns the number of operations,
      or None for an unknown kernel.
    """

    def operations(instruction: Instruction, operands: Sequence[Array]) -> float | None:
        cudnn = _CUDNN.match(instruction.attribute(r'custom_call_target="([^"]*)"') or "")
        if cudnn:
            products = _CUDNN_BACKWARD if cudnn[1] else _CUDNN_FORWARD
            return products * _cudnn_product(instruction, *operands[:2])
        kernel = re.match(r"splash_mha_([a-z]+)_", instruction.name)
        if kernel is None or kernel[1] not in _PRODUCTS:
            return None
        # Before the queries come the mask's tile numbers: s8, or s16 or s32 where there are many tiles.
        queries = next(x for x in operands if len(x.dims) >= 3 and not x.dtype.startswith("s"))
        *outer, rows, width = queries.dims
        tiles = visible_tiles(config, rows // config.block_size, kernel[1] == "dkv")
        pairs = math.prod(outer) * tiles * splash.tile_size(config.block_size) ** 2
        return 2.0 * _PRODUCTS[kernel[1]] * width * pairs

    return operations


def _cudnn_product(instruction: Instruction, queries: Array, keys: Array) -> float:
    """Operations of one matrix product of cuDNN's attention of `[X, S, H, Dh]` to `[X, Y, K, Dh]`.

    A causal mask hides half of the square of the first columns. Lengths are known only when the program
    runs: all columns count.
    """
    batch, rows, heads, width = queries.dims
    columns = keys.dims[1]
    pairs = rows * columns
    if "CAUSAL" in (instruction.attribute(r'"mask_type":\s*"(\w+)"') or ""):
        square = min(rows, columns)
        pairs = square**2 / 2 + (rows - square) * columns
    return 2.0 * batch * heads * width * pairs


def visible_tiles(config: DecoderConfig, blocks: int, of_keys: bool = False) -> int:
    """Number of tiles of scores that one head computes: those that are not masked completely.

    Args:
      config: the model.
      blocks: number of blocks per chunk.
      of_keys: count for the gradient of keys and values, which excludes past blocks if the config stops
        the gradient there.
    """
    tile = splash.tile_size(config.block_size)
    current_block_only = of_keys and config.stop_gradient_segments and config.memory_segments > 0
    mask = splash.chunk_mask(config, blocks, current_block_only)
    part = lambda i: slice(i * tile, (i + 1) * tile)
    rows, columns = (n // tile for n in mask.shape)
    return sum(bool(mask[part(r), part(c)].any()) for r in range(rows) for c in range(columns))
