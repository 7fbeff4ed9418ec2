"""Haystacks: sentences as tokens, cut to any number of tokens, and insertion into them."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from famx.data.probes.passkey_text import REPEATED_FILLER
from famx.data.probes.python_docs import python_docs_sentences
from famx.data.vocabularies import Vocabulary, token_ids


@dataclasses.dataclass(frozen=True)
class Units:
    """Concatenated sentences: tokens int32 `[n]`, and starts bool `[n]`, True where a sentence begins."""

    tokens: np.ndarray
    starts: np.ndarray


def join_units(encoded: Sequence[np.ndarray]) -> Units:
    """Concatenate at least one int32 array of ids."""
    starts = np.zeros(sum(map(len, encoded)), bool)
    starts[np.cumsum([0, *map(len, encoded[:-1])])] = True
    return Units(np.concatenate(encoded), starts)


def encode_units(vocabulary: Vocabulary, texts: Sequence[str], separator: str) -> Units:
    """Encode texts as units, each with `separator` before it."""
    return join_units([token_ids(separator + text, vocabulary) for text in texts])


@functools.lru_cache(maxsize=8)
def noise_units(vocabulary: Vocabulary, separator: str) -> Units:
    """The single text of RULER's noise, which is also PassKey's repeated filler."""
    return encode_units(vocabulary, [REPEATED_FILLER], separator)


@functools.lru_cache(maxsize=8)
def real_text_units(vocabulary: Vocabulary, separator: str, evaluation: bool) -> Units:
    """The sentences of Python's documentation; see `famx.data.probes.python_docs`."""
    return encode_units(vocabulary, python_docs_sentences(evaluation), separator)


def cyclic_end(
    units: Units, end: int, count: int, separator: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The last `count` tokens of the units, read cyclically up to the end of one of them.

    Args:
      units: the sentences.
      end: number of the unit before which the text ends.
      count: number of tokens.
      separator: int32 `[k]` ids that replace the first tokens if the first unit is cut, so that no word
        is joined to the preceding text.

    Returns:
      tokens int32 `[count]`, and the sorted int64 `[p]` places between units, 0 and `count` included.
    """
    stop = np.flatnonzero(units.starts)[end]
    source = (stop - count + np.arange(count)) % len(units.tokens)
    tokens, starts = units.tokens[source], units.starts[source]
    if count and not starts[0]:
        tokens[: len(separator)] = separator[:count]
    return tokens, np.unique([0, *np.flatnonzero(starts), count])


def nearest_places(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each number of `wanted` `[n]`, the nearest of the sorted int `[p]` `places`."""
    after = np.clip(np.searchsorted(places, wanted), 1, max(len(places) - 1, 1))
    after = np.minimum(after, len(places) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - places[before] <= places[after] - wanted, places[before], places[after])


def insert(
    filler: np.ndarray, before: Sequence[int], hidden: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """Insert the arrays of `hidden` into `filler`; return the result and where each of them begins.

    Args:
      filler: int32 `[n]`.
      before: number of tokens of the filler before each of them; sorted.
      hidden: int32 arrays.
    """
    pieces, starts, used, size = [], [], 0, 0
    for place, text in zip(before, hidden):
        pieces += [filler[used:place], text]
        starts.append(int(size + place - used))
        size, used = starts[-1] + len(text), place
    return np.concatenate([*pieces, filler[used:]]), starts
