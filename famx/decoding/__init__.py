"""Streaming of texts of any length, and generation from what was read; needs only jax and flax."""

from famx.decoding.generation import Generation, Sampling, generate
from famx.decoding.streaming import Streamer

__all__ = ["Generation", "Sampling", "Streamer", "generate"]
