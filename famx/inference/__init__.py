"""Use of a trained model: lines of a file in and out, and conversations."""

from famx.inference.lines import infer

__all__ = ["infer"]
