"""What the implementations that are compared have in common: sizes and data. numpy alone."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and its batch."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    feed_forward: int  # of a gated one: three matrices
    block: int  # S
    fam_length: int  # N
    batch: int
    length: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def landmark(self) -> int:
        """A token that stands at the beginning of each example and nowhere else.

        The gradient of its embedding from the last block's logits, its own left out since tables
        may be tied, came through all blocks between.
        """
        return self.vocabulary - 1

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs and targets, int64 `[batch, length]` each; the same in every process."""
        shape = (self.batch, self.length + 1)
        rows = np.random.default_rng(0).integers(0, self.landmark, shape)
        rows[:, 0] = self.landmark
        return rows[:, :-1], rows[:, 1:]
