"""Memories of a decoder, each in a file of its own; `famx.modules.memory` is their base."""

from famx.memories.auto_compressor import AutoCompressor
from famx.memories.block_recurrent import BlockRecurrent
from famx.memories.fam import Fam
from famx.memories.feedback import Feedback
from famx.memories.infini import Infini
from famx.memories.key_value_means import KeyValueMeans
from famx.memories.landmark import Landmark
from famx.memories.rmt import Rmt

__all__ = [
    "AutoCompressor", "BlockRecurrent", "Fam", "Feedback", "Infini", "KeyValueMeans", "Landmark", "Rmt",
]  # fmt: skip
