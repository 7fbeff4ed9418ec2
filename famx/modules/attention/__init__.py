"""Attention of block tokens to the memory, the past blocks and their own block.

`token_attention` selects a backend; `dense` is the reference that the others are tested against.
"""

from famx.modules.attention.common import (
    ATTENTION_RESULT,
    attend,
    attend_apart,
    attend_logsum,
    attend_parts,
    column_dimensions,
    softcap,
    visible,
)
from famx.modules.attention.dense import memory_mass, window_part
from famx.modules.attention.dispatch import attend_all, token_attention
from famx.modules.attention.over_mesh import BATCH_AXIS

__all__ = [
    "BATCH_AXIS",
    "ATTENTION_RESULT",
    "attend",
    "attend_all",
    "attend_apart",
    "attend_logsum",
    "attend_parts",
    "column_dimensions",
    "memory_mass",
    "softcap",
    "token_attention",
    "visible",
    "window_part",
]
