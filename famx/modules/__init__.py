"""The model: Flax modules and pure functions that need jax and flax alone."""

from famx.modules.config import DecoderConfig, RopeScaling
from famx.modules.decoder import Decoder
from famx.modules.memory import Memory
from famx.modules.state import DecoderState

__all__ = ["Decoder", "DecoderConfig", "DecoderState", "Memory", "RopeScaling"]
