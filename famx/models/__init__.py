"""The model definition that an engine drives."""

from famx.models.decoder_model import MEMORY_COLLECTION, Batch, DecoderModel, loss_weights

__all__ = ["MEMORY_COLLECTION", "Batch", "DecoderModel", "loss_weights"]
