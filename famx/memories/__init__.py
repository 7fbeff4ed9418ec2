"""Memories of a decoder, each in a file of its own; `famx.modules.memory` is their base."""

from famx.memories.fam import Fam
from famx.memories.infini import Infini

__all__ = ["Fam", "Infini"]
