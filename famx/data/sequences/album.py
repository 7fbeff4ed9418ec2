"""An album of images, of which the first is asked for."""

import dataclasses
from typing import Literal

import numpy as np

from famx.base.features import Feature
from famx.base.values import checked
from famx.data.sequences.digits import PatchSide, digits, patch_count, patches
from famx.data.sequences.task import DIGITS, SequenceTask

_FEWEST = 4  # images

PUBLISHED = "scikit-learn"  # what `famx tasks` says that it needs


@checked
@dataclasses.dataclass(frozen=True)
class AlbumTask(SequenceTask):
    """As many handwritten digits as fit, patch by patch; at the end the first one is asked for.

    The feature `patches` holds the pixels of a patch, its row and column in the image, and 1 at the last
    position, which asks. Positions that no image fits into are zero, before the last one.

    Attributes:
      patch: side of the patches in pixels.
      question: "first": the digit of the first image; "same": whether the last image shows the same digit
        ("yes" or "no", each half of the time; it is another image of it).

    Raises:
      ConfigError: scikit-learn is not installed.
    """

    patch: PatchSide = 4
    question: Literal["first", "same"] = "first"

    words = (*DIGITS, "no", "yes")

    def __post_init__(self):
        digits(self.split)

    @property
    def features(self):
        return (Feature("patches", self.patch**2 + 3),)

    @property
    def min_length(self) -> int:
        return _FEWEST * patch_count(self.patch) + 1

    def row(self, rng, length):
        images, size = digits(self.split), patch_count(self.patch)
        count = (length - 1) // size
        shown = [images.draw(rng) for _ in range(count)]
        first, same = shown[0][1], bool(rng.integers(2))
        if self.question == "same":
            other = int(rng.choice([i for i in range(10) if i != first]))
            shown[-1] = images.draw(rng, first if same else other)
        array = np.zeros((length, self.patch**2 + 3), np.float32)
        for i, (image, _) in enumerate(shown):
            array[i * size : (i + 1) * size, :-1] = patches(image, self.patch)
        array[-1, -1] = 1
        answer = str(first) if self.question == "first" else ("no", "yes")[same]
        return dict(features={"patches": array}, answer=[answer])
