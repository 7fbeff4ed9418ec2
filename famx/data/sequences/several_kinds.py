"""Sequences of words and of images."""

import dataclasses
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from famx.base.features import KINDS, Feature
from famx.base.values import checked
from famx.data.sequences.digits import PatchSide, digits, patch_count, patches
from famx.data.sequences.task import DIGITS, SequenceTask, mixed_row

_FILLER = ("so", "and", "then", "on", "we", "went", "home", "again")

PUBLISHED = "scikit-learn"  # what `famx tasks` says that it needs


@checked
@dataclasses.dataclass(frozen=True)
class _WordsAndImages(SequenceTask):
    """What the tasks below have in common.

    Attributes:
      patch: side of the patches in pixels.

    Raises:
      ConfigError: scikit-learn is not installed.
    """

    patch: PatchSide = 4

    words = (*DIGITS, "the", "key", "is", "what", "was", "it", ".", "?", *_FILLER)

    def __post_init__(self):
        digits(self.split)

    @property
    def features(self):
        return (Feature("patches", self.patch**2 + 2), KINDS)

    def _words(self, text: str) -> dict[str, np.ndarray]:
        return {"words": np.array(self.vocab.encode(text), np.int32)}

    def _image(self, rng) -> tuple[dict[str, np.ndarray], int]:
        image, label = digits(self.split).draw(rng)
        return {"vectors": patches(image, self.patch)}, label


@checked
@dataclasses.dataclass(frozen=True)
class KeyThenImagesTask(_WordsAndImages):
    """A key in words, as many images as fit, and the question for the key in words.

    Words are of kind 0, and patches, the feature `patches`, of kind 1: pixels, row and column. Words that
    fill what is left stand before the question.

    Attributes:
      digits: number of digits of the key.
    """

    digits: Annotated[int, Ge(1), Le(9)] = 3

    @property
    def min_length(self) -> int:
        return 2 * self.digits + 4 + patch_count(self.patch) + 5

    def row(self, rng, length):
        key = "".join(rng.choice(DIGITS, self.digits))
        told, asked = self._words(f"the key is {key} ."), self._words(f"what is the key ? {key}")
        room = length - len(told["words"]) - len(asked["words"])
        images = [self._image(rng)[0] for _ in range(room // patch_count(self.patch))]
        rest = self._words(" ".join(rng.choice(_FILLER, room % patch_count(self.patch))))
        return mixed_row([told, *images, rest, asked], self.vocab, self.digits, "patches")


@checked
@dataclasses.dataclass(frozen=True)
class ImageThenTextTask(_WordsAndImages):
    """An image, then words, and then the question what the image showed; the answer is a digit."""

    @property
    def min_length(self) -> int:
        return patch_count(self.patch) + 5

    def row(self, rng, length):
        image, label = self._image(rng)
        asked = self._words(f"what was it ? {label}")
        room = length - patch_count(self.patch) - len(asked["words"])
        text = self._words(" ".join(rng.choice(_FILLER, room)))
        return mixed_row([image, text, asked], self.vocab, 1, "patches")
