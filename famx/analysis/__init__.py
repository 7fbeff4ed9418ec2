"""What a trained model's memory does; needs jax, flax and numpy alone, figures matplotlib or plotly."""

from famx.analysis.attention_maps import AttentionMaps, AttentionSummary
from famx.analysis.attention_reader import AttentionReader
from famx.analysis.memory_health import MemoryHealth, MemoryMonitor

__all__ = ["AttentionMaps", "AttentionReader", "AttentionSummary", "MemoryHealth", "MemoryMonitor"]
