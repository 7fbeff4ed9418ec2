"""The texts of the PassKey task: its sentences, its word vocabulary and its fillers, as tokens."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from famx.data.probes.python_docs import python_docs, python_docs_sentences
from famx.data.vocabularies import (
    ByteVocabulary,
    Vocabulary,
    WordVocabulary,
    encode_after,
    token_ids,
)

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
STATEMENT = ("The pass key is", ". Remember it.", "is the pass key.")  # the key follows parts 1 and 2
QUESTION = "What is the pass key? The pass key is"
REPEATED_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
FILLER_WORDS = (
    "river stone window garden music bread paper winter summer bridge candle forest island mirror "
    "silver copper velvet anchor basket blanket bottle branch butter castle circle cotton desert "
    "dragon engine feather finger hammer harbor jacket kitchen ladder lemon market meadow needle"
).split()


@functools.cache
def passkey_words() -> WordVocabulary:
    """The word vocabulary of the task: digits, punctuation, and the words of its texts and fillers."""
    text = " ".join((HEADER, *STATEMENT, QUESTION, REPEATED_FILLER, *FILLER_WORDS))
    words = [w.strip(".,?") for w in text.split()]
    return WordVocabulary([*"0123456789.,?", *dict.fromkeys(w for w in words if w)])


class Filler(NamedTuple):
    """Filler tokens, int32 `[n]`, and where its words begin, bool `[n]` (None: at every token)."""

    tokens: np.ndarray
    starts: np.ndarray | None = None


class PasskeyTexts:
    """The parts of a PassKey row as tokens of a vocabulary.

    The parts are encoded one by one, and a row is their concatenation.

    Words and bytes: a digit is a token, and a part ends with the space between it and the next part.

    Any other vocabulary: a part begins with that space, as the tokens of such vocabularies do. A part
    is encoded as it would be after a full stop, and the text after a key as it would be after a digit.
    Filler is encoded word by word and cut between words; if the last word of a gap does not fit, a
    short word fills the rest. The tokens of the row are then those of its whole text, provided that no
    token continues over a space after other letters, or from a digit to punctuation. That is so for
    byte-level BPE with the usual splitting into words, and for SentencePiece that splits at spaces and
    digits. With other vocabularies the text is right, but may get other tokens if it is encoded whole.

    Args:
      vocabulary: the vocabulary.
      digits: number of digits of a key.

    Attributes:
      header, question: int32 `[n]` ids.
      statement_width: largest number of tokens of a key statement.
      key_width: largest number of tokens of a key.

    Raises:
      ValueError: the vocabulary cannot spell the texts.
    """

    def __init__(self, vocabulary: Vocabulary, digits: int):
        self.vocab = vocabulary
        self._digit_is_token = isinstance(vocabulary, ByteVocabulary | WordVocabulary)
        opening, middle, closing = STATEMENT
        if self._digit_is_token:
            self.key_width = digits
            self.header = self._encode(f"{HEADER} ")
            self._sentence = [self._encode(x) for x in (f"{opening} ", f"{middle} ", f" {closing} ")]
            self.question = self._encode(f"{QUESTION} ")
        else:
            self.key_width = digits + 1  # a token spells at least one character
            self.header = self._encode(HEADER)
            self._sentence = [
                self._encode(f" {opening}", "."),
                self._encode(middle, "0"),
                self._encode(f" {closing}", "."),
            ]
            self.question = self._encode(f" {QUESTION}", ".")
        self.key("0123456789")
        self.statement_width = sum(map(len, self._sentence)) + 2 * self.key_width

    def key(self, digits: str) -> np.ndarray:
        """Int32 `[n]` ids of a key, in a statement or after the question."""
        return self._encode(digits) if self._digit_is_token else self._encode(f" {digits}", ".")

    def statement(self, key: np.ndarray) -> tuple[np.ndarray, slice]:
        """The statement of a key given as ids, int32 `[n]`, and the place of its second mention."""
        opening, middle, closing = self._sentence
        mention = len(opening) + len(key) + len(middle)
        ids = np.concatenate([opening, key, middle, key, closing])
        return ids, slice(mention, mention + len(key))

    # ------ Filler

    def filler(self, rng: np.random.Generator, kind: str, count: int, evaluation: bool) -> Filler:
        """Make filler for gaps of `count` tokens in total.

        Args:
          rng: draws the words, or the place where real text begins.
          kind: "repeated", "random_words" or "python_stdlib" (real text: Python's documentation).
          count: number of tokens.
          evaluation: read the last fifth of the real text, not the rest.
        """
        if self._digit_is_token:
            if kind == "repeated":
                return Filler(np.resize(self._encode(REPEATED_FILLER + " "), count))
            if kind == "python_stdlib":
                return Filler(python_docs(rng, count, evaluation))
            return Filler(random_words(rng, count, self.vocab))
        if kind == "random_words":
            words = _encoded_words(self.vocab, tuple(FILLER_WORDS))
            return words.take(rng.integers(0, len(FILLER_WORDS), count + 1, np.uint8), count + 1)
        if kind == "python_stdlib":
            words = _documentation_words(self.vocab, evaluation)
            first = int(rng.integers(words.number))
        else:
            words, first = _encoded_words(self.vocab, tuple(REPEATED_FILLER.split())), 0
        return words.read_on(first, count + 1)

    def fill(self, gap: np.ndarray, filler: Filler, used: int) -> int:
        """Write filler from token `used` on into int32 `gap`; return where the next gap's begins."""
        size = len(gap)
        gap[:] = filler.tokens[used : used + size]
        if filler.starts is None:
            if size and isinstance(self.vocab, ByteVocabulary):
                gap[-1] = self._encode(" ")[0]  # the next part begins a new word
            return used + size
        if self._short_word is None:
            return used + size
        end = size  # of the last word that fits
        while not filler.starts[used + end]:
            end -= 1
        gap[end:] = self._short_word
        return used + end

    @functools.cached_property
    def _short_word(self) -> int | None:
        """A filler word that is a single token; None if there is none, and then words are cut."""
        words = [*REPEATED_FILLER.split(), *FILLER_WORDS]
        encoded = [encode_after(self.vocab, f" {word}", ".") for word in words if word.isalpha()]
        return next((ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self.vocab.unk_id), None)

    def _encode(self, text: str, before: str = "") -> np.ndarray:
        ids = encode_after(self.vocab, text, before)
        if self.vocab.unk_id is not None and self.vocab.unk_id in ids:
            raise ValueError(
                f"The vocabulary cannot spell PassKey's text '{text.strip()[:60]}'; give one that "
                "can, or 'words' or 'bytes'."
            )
        return np.array(ids, np.int32)


class _Words:
    """Words as tokens, to be joined in any order."""

    def __init__(self, encoded: Sequence[list[int]]):
        self._tokens = np.concatenate([np.array(ids, np.int32) for ids in encoded])
        self._sizes = np.array([len(ids) for ids in encoded])
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._starts = np.zeros(len(self._tokens), bool)
        self._starts[self._offsets] = True
        self.number = len(encoded)

    def take(self, words: np.ndarray, count: int) -> Filler:
        """The first `count` tokens of these words."""
        sizes = self._sizes[words]
        ends = np.cumsum(sizes)
        words = words[: np.searchsorted(ends, count) + 1]
        sizes, ends = sizes[: len(words)], ends[: len(words)]
        places = np.arange(ends[-1]) + np.repeat(self._offsets[words] - ends + sizes, sizes)
        return self._filler(places[:count])

    def read_on(self, first: int, count: int) -> Filler:
        """`count` tokens from word `first` on, read cyclically."""
        return self._filler((self._offsets[first] + np.arange(count)) % len(self._tokens))

    def _filler(self, places: np.ndarray) -> Filler:
        return Filler(self._tokens[places], self._starts[places])


@functools.lru_cache(maxsize=8)
def _encoded_words(vocabulary: Vocabulary, words: tuple[str, ...]) -> _Words:
    ids_of = {word: encode_after(vocabulary, f" {word}", ".") for word in dict.fromkeys(words)}
    return _Words([ids_of[word] for word in words])


@functools.lru_cache(maxsize=8)
def _documentation_words(vocabulary: Vocabulary, evaluation: bool) -> _Words:
    text = " ".join(python_docs_sentences(evaluation))
    return _encoded_words.__wrapped__(vocabulary, tuple(text.split(" ")))


def random_words(
    rng: np.random.Generator, count: int, vocabulary: WordVocabulary | ByteVocabulary
) -> np.ndarray:
    """Int32 `[count]` tokens of words drawn uniformly from `FILLER_WORDS`."""
    if isinstance(vocabulary, WordVocabulary):
        ids = np.array(vocabulary.encode(" ".join(FILLER_WORDS)), np.int32)
        return ids[rng.integers(0, len(ids), count, np.uint8)]
    shortest = min(len(word) for word in FILLER_WORDS) + 1
    draws = rng.integers(0, len(FILLER_WORDS), -(-count // shortest), np.uint8)
    text = " ".join([FILLER_WORDS[i] for i in draws.tolist()]) + " "
    return token_ids(text.encode("ascii")[:count], vocabulary)
