"""Analysis of a trained model: attention maps, traces, and statistics of its memory.

Needs only jax, flax and numpy; `famx.analysis.figures` also needs matplotlib.
"""

from famx.analysis.attention_maps import AttentionMaps, AttentionReader, AttentionSummary, read_maps
from famx.analysis.memory_health import MemoryHealth, MemoryMonitor

__all__ = [
    "AttentionMaps",
    "AttentionReader",
    "AttentionSummary",
    "MemoryHealth",
    "MemoryMonitor",
    "read_maps",
]
