"""Studies: a grid of runs in processes of their own, and one table of what they measured."""

from famx.study.grid import Cell, Study

__all__ = ["Cell", "Study"]
