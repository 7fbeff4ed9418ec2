"""Haystacks of the probes: sentences as tokens, cut to any number of tokens, and insertion into them."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from famx.data.probes.passkey_text import REPEATED_FILLER, python_docs_sentences
from famx.data.storage.text_files import token_ids
from famx.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Units:
    """Sentences one after another: tokens int32 [n], and starts bool [n], true where one begins."""

    tokens: np.ndarray
    starts: np.ndarray


def join_units(encoded: Sequence[np.ndarray]) -> Units:
    """Units of at least one int32 array of ids."""
    starts = np.zeros(sum(map(len, encoded)), bool)
    starts[np.cumsum([0, *map(len, encoded[:-1])])] = True
    return Units(np.concatenate(encoded), starts)


def encode_units(vocabulary: Vocabulary, texts: Sequence[str], separator: str) -> Units:
    """The texts as units, `separator` in front of each."""
    return join_units([token_ids(separator + text, vocabulary) for text in texts])


@functools.lru_cache(maxsize=8)
def noise_units(vocabulary: Vocabulary, separator: str) -> Units:
    """The one text of RULER's noise, which PassKey repeats as well."""
    return encode_units(vocabulary, [REPEATED_FILLER], separator)


@functools.lru_cache(maxsize=8)
def real_text_units(vocabulary: Vocabulary, separator: str, evaluation: bool) -> Units:
    """The sentences of Python's documentation: the last fifth for evaluation, else the rest.

    The text is that of the running Python, so it changes from one version of Python to another.
    """
    return encode_units(vocabulary, python_docs_sentences(evaluation), separator)


def cyclic_end(
    units: Units, end: int, count: int, separator: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The last `count` tokens of the units, read round and round up to the end of one of them.

    Args:
      units: the sentences.
      end: number of the unit before which the text ends.
      count: number of tokens.
      separator: int32 [k] ids that replace the first tokens if the first unit is not whole, so that
        no word is joined to what stands before.

    Returns:
      tokens int32 [count], and the sorted int64 [p] places between units, 0 and `count` included.
    """
    stop = np.flatnonzero(units.starts)[end]
    source = (stop - count + np.arange(count)) % len(units.tokens)
    tokens, starts = units.tokens[source], units.starts[source]
    if count and not starts[0]:
        tokens[: len(separator)] = separator[:count]
    return tokens, np.unique([0, *np.flatnonzero(starts), count])


def nearest_places(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each number of int [n] `wanted` the nearest one of sorted int [p] `places`."""
    after = np.clip(np.searchsorted(places, wanted), 1, max(len(places) - 1, 1))
    after = np.minimum(after, len(places) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - places[before] <= places[after] - wanted, places[before], places[after])


def insert(
    filler: np.ndarray, before: Sequence[int], hidden: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """`filler` with the arrays of `hidden` inserted, and where each of them begins.

    Args:
      filler: int32 [n].
      before: how many tokens of the filler stand before each; sorted.
      hidden: int32 arrays.
    """
    pieces, starts, used, size = [], [], 0, 0
    for place, text in zip(before, hidden):
        pieces += [filler[used:place], text]
        starts.append(int(size + place - used))
        size, used = starts[-1] + len(text), place
    return np.concatenate([*pieces, filler[used:]]), starts
