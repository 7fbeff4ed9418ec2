"""Operations of the kernels that XLA does not look into."""

import math
import re
from collections.abc import Callable, Sequence

from famx.modules import DecoderConfig
from famx.modules.attention import splash
from famx.scale.hlo import Array, Instruction

# Matrix products of a tile: scores and values; those again, and the gradients of either side.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}

Kernels = Callable[[Instruction, Sequence[Array]], float | None]


def of_model(config: DecoderConfig) -> Kernels:
    """What counts the kernels of a model's attention: operations of a call, None of an unknown one."""

    def operations(instruction: Instruction, operands: Sequence[Array]) -> float | None:
        found = re.match(r"splash_mha_([a-z]+)_", instruction.name)
        if found is None or found[1] not in _PRODUCTS:
            return None
        queries = next(x for x in operands if len(x.dims) >= 3 and x.dtype != "s8")
        *outer, rows, width = queries.dims
        tiles = visible_tiles(config, rows // config.block_size, found[1] == "dkv")
        pairs = math.prod(outer) * tiles * splash.tile_size(config.block_size) ** 2
        return 2.0 * _PRODUCTS[found[1]] * width * pairs

    return operations


def visible_tiles(config: DecoderConfig, blocks: int, of_keys: bool = False) -> int:
    """Tiles of the scores that one head computes: those of which something is seen."""
    tile = splash.tile_size(config.block_size)
    own_only = of_keys and config.stop_gradient_segments and config.memory_segments > 0
    mask = splash.chunk_mask(config, blocks, own_only)
    part = lambda i: slice(i * tile, (i + 1) * tile)
    rows, columns = (n // tile for n in mask.shape)
    return sum(bool(mask[part(r), part(c)].any()) for r in range(rows) for c in range(columns))
