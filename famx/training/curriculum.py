"""A curriculum that unlocks longer documents once the model is accurate."""

import dataclasses
from typing import Annotated

import numpy as np
from annotated_types import MinLen

from famx.base.ranges import OneOf, Positive, Share
from famx.base.values import checked

RISING_METRICS = ("exact_match", "accuracy")  # shares that training raises


@checked
@dataclasses.dataclass
class Curriculum:
    """Distribution of document lengths, in blocks, that training draws from.

    By default half of the draws are the newest length; the others are uniform over the lengths before.

    Attributes:
      blocks: lengths in the order in which they unlock.
      unlock: smoothed metric at which the next length unlocks. In a run the metrics of a step take
        effect `famx.training.ahead.OBSERVED_DELAY` steps later.
      metric: name of the metric, computed on batches of the newest length alone.
      smoothing: weight of the past in the smoothed metric, per step of the newest length.
      newest: probability of drawing the newest length.
    """

    blocks: Annotated[tuple[Positive, ...], MinLen(1)]
    unlock: Share = 0.9
    metric: Annotated[str, OneOf(RISING_METRICS)] = "exact_match"
    smoothing: Share = 0.9
    newest: Share = 0.5

    def __post_init__(self):
        self.stage, self.level = 0, 0.0

    @property
    def newest_blocks(self) -> int:
        """The length that was unlocked last, in blocks."""
        return self.blocks[self.stage]

    def draw(self, rng: np.random.Generator) -> int:
        """A length in blocks."""
        if self.stage == 0 or rng.random() < self.newest:
            return self.blocks[self.stage]
        return self.blocks[int(rng.integers(self.stage))]

    def observe(self, blocks: int, value: float) -> bool:
        """Takes the metric of a batch of `blocks`; True if that unlocked the next length."""
        if blocks != self.blocks[self.stage]:
            return False
        self.level = self.smoothing * self.level + (1 - self.smoothing) * float(value)
        if self.level < self.unlock or self.stage + 1 == len(self.blocks):
            return False
        self.stage, self.level = self.stage + 1, 0.0
        return True

    def get_state(self) -> dict:
        """State for a checkpoint, as JSON values."""
        return {"stage": self.stage, "level": self.level}

    def set_state(self, state: dict):
        """Resumes from a state that `get_state` returned."""
        self.stage, self.level = int(state["stage"]), float(state["level"])
