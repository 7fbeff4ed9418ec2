"""An image, pixel by pixel."""

import dataclasses

import numpy as np

from famx.base.features import Feature
from famx.base.ranges import Amount
from famx.base.values import checked
from famx.data.sequences.digits import PatchSide, digits, patch_count, patches
from famx.data.sequences.task import DIGITS, SequenceTask

PUBLISHED = "scikit-learn"  # what `famx tasks` says that it needs


@checked
@dataclasses.dataclass(frozen=True)
class PixelsTask(SequenceTask):
    """A handwritten digit, pixel by pixel, and then nothing; at the end the digit is named.

    The feature `pixels` holds the pixels of a position, its row and column, and 1 at the last position,
    where the digit is asked for. After the image it is zero, or noise.

    Attributes:
      patch: side of the patches in pixels; 1 is pixel by pixel.
      noise: standard deviation of what follows the image.

    Raises:
      ConfigError: scikit-learn is not installed.
    """

    patch: PatchSide = 1
    noise: Amount = 0.0

    words = DIGITS

    def __post_init__(self):
        digits(self.split)

    @property
    def features(self):
        return (Feature("pixels", self.patch**2 + 3),)

    @property
    def min_length(self) -> int:
        return patch_count(self.patch)

    def row(self, rng, length):
        image, label = digits(self.split).draw(rng)
        width, count = self.patch**2 + 3, patch_count(self.patch)
        pixels = np.zeros((length, width), np.float32)
        pixels[:count, :-1] = patches(image, self.patch)
        noise = rng.normal(0, 1, (length - count, self.patch**2))
        pixels[count:, : self.patch**2] = self.noise * noise
        pixels[-1, -1] = 1
        return dict(features={"pixels": pixels}, answer=[str(label)])
