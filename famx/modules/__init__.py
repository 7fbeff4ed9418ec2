"""The model: Flax modules and pure functions that need jax and flax alone."""

from famx.modules.config import DecoderConfig, RopeScaling
from famx.modules.decoder import Decoder
from famx.modules.state import DecoderState
from famx.modules.updates import register_update

__all__ = ["Decoder", "DecoderConfig", "DecoderState", "RopeScaling", "register_update"]
