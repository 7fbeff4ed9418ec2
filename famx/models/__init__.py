"""The model definition that an engine drives."""

from famx.models.decoder_model import Batch, DecoderModel, loss_weights

__all__ = ["Batch", "DecoderModel", "loss_weights"]
