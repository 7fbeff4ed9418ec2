"""What a trained model's memory does; needs jax, flax and numpy alone, figures matplotlib or plotly."""

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
