"""Handwritten digits of 8 x 8 pixels, which scikit-learn has in itself."""

import functools
from typing import Literal, NamedTuple

import numpy as np

from famx.base.packages import optional_package

SIDE = 8  # pixels
PatchSide = Literal[1, 2, 4, 8]
_EVAL = 360  # images that only evaluations show, a fifth


class Images(NamedTuple):
    """Images float32 `[n, 8, 8]` from -1 to 1, their digits int `[n]`, their numbers in the data set."""

    pixels: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def draw(self, rng: np.random.Generator, label: int | None = None) -> tuple[np.ndarray, int]:
        """A random image and its digit, which is `label` unless that is None."""
        among = np.arange(len(self.labels)) if label is None else np.flatnonzero(self.labels == label)
        i = int(rng.choice(among))
        return self.pixels[i], int(self.labels[i])


@functools.cache
def digits(split: str) -> Images:
    """The images of "train" or of "eval", which have none in common.

    Raises:
      ConfigError: scikit-learn is not installed.
    """
    loaded = optional_package("sklearn.datasets", "Tasks of handwritten digits", "digits").load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    numbers = np.sort(order[:_EVAL] if split == "eval" else order[_EVAL:])
    pixels = (loaded.images[numbers] / 8 - 1).astype(np.float32)
    return Images(pixels, loaded.target[numbers], numbers)


def patch_count(side: int) -> int:
    """Number of patches of `side` x `side` pixels of an image."""
    return (SIDE // side) ** 2


def patches(image: np.ndarray, side: int) -> np.ndarray:
    """The patches of an image, row by row, float32 `[n, side * side + 2]`: pixels, row and column.

    Row and column go from -1 to 1, and are 0 for an image of one patch.
    """
    n = SIDE // side
    cut = image.reshape(n, side, n, side).swapaxes(1, 2).reshape(n * n, side * side)
    places = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
    rows, columns = np.repeat(places, n)[:, None], np.tile(places, n)[:, None]
    return np.concatenate([cut, rows, columns], axis=1).astype(np.float32)
