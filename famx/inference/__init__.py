"""Use of a trained model: answers to the lines of a file, and conversations."""

from famx.inference.lines import infer

__all__ = ["infer"]
