"""Vocabularies that need no file: UTF-8 bytes, in famx's ids and in ByT5's, and a closed list of words.

Pad is 0, and no text encodes to the special ids. In famx's own two, bos is 1 and eos is 2.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from famx.data.vocabularies.base import Vocabulary

_PAD_ID, _BOS_ID, _EOS_ID = 0, 1, 2


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: byte `b` has id `b + 3`; 259 ids, none of them unknown."""

    kind = "bytes"
    pad_id, bos_id, eos_id, unk_id = _PAD_ID, _BOS_ID, _EOS_ID, None
    num_special_ids = 3
    vocab_size = 256 + num_special_ids

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the bytes of `text`, without bos and eos."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return [b + self.num_special_ids for b in data]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; pad, bos and eos are left out.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        first = self.num_special_ids
        return bytes(i - first for i in self._check_ids(ids) if i >= first)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByT5Vocabulary(ByteVocabulary):
    """UTF-8 bytes as in ByT5 (arXiv 2105.13626) and `seqio.ByteVocabulary`.

    Byte `b` has id `b + 3`, as in `ByteVocabulary`, but pad is 0, eos 1 and unknown 2. There is no
    bos; eos takes its place. Ids above the bytes, which mask spans in ByT5's pretraining, have no text.
    """

    kind = "byt5_bytes"
    bos_id, eos_id, unk_id = 1, 1, 2

    def __init__(self, extra_ids: int = 0):
        """
        Args:
          extra_ids: number of ids above the bytes.

        Raises:
          ValueError: it is negative.
        """
        if extra_ids < 0:
            raise ValueError(f"A vocabulary cannot have {extra_ids} extra ids.")
        self.vocab_size = ByteVocabulary.vocab_size + extra_ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; special and extra ids are left out.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        return super().decode_bytes(i for i in self._check_ids(ids) if i < ByteVocabulary.vocab_size)

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        return cls(int(description["vocab_size"]) - ByteVocabulary.vocab_size)


class WordVocabulary(Vocabulary):
    """A small closed vocabulary of words.

    Text is split at white space; each digit and each of `.`, `,`, `?` is a separate token.
    Ids: pad 0, bos 1, eos 2, unknown 3, then `words` in their order.

    Examples:
      >>> words = WordVocabulary(["the", "key", "is", "7", "."])
      >>> words.encode("the key is 77.")
      [4, 5, 6, 7, 7, 8]
      >>> words.decode([4, 5, 6, 7, 7, 8])
      'the key is 77.'
    """

    kind = "words"
    pad_id, bos_id, eos_id, unk_id = _PAD_ID, _BOS_ID, _EOS_ID, 3
    num_special_ids = 4
    _TOKEN = re.compile(r"[0-9]|[.,?]|[^\s0-9.,?]+")

    def __init__(self, words: Sequence[str]):
        """
        Args:
          words: the known tokens; the splitting rule must leave each of them whole.

        Raises:
          ValueError: a word occurs twice, or is split into several tokens.
        """
        self.words = tuple(words)
        for word in self.words:
            if self._TOKEN.findall(word) != [word]:
                raise ValueError(
                    f"'{word}' is not a single token of a word vocabulary: words have no spaces, and "
                    "digits and the characters . , ? are words by themselves."
                )
        self._id_of = {word: self.num_special_ids + i for i, word in enumerate(self.words)}
        if len(self._id_of) != len(self.words):
            repeated = next(w for i, w in enumerate(self.words) if w in self.words[:i])
            raise ValueError(f"'{repeated}' occurs twice in the list of words; give each word once.")
        self.vocab_size = self.num_special_ids + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; words that are not in the list get `unk_id`."""
        return [self._id_of.get(token, self.unk_id) for token in self._TOKEN.findall(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without pad, bos and eos; consecutive digits are joined.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        text, last_was_digit = "", False
        for i in self._check_ids(ids):
            if i in (self.pad_id, self.bos_id, self.eos_id):
                continue
            token = "<unk>" if i == self.unk_id else self.words[i - self.num_special_ids]
            joined = token in ".,?" or (token.isdigit() and last_was_digit)
            text += token if joined or not text else " " + token
            last_was_digit = token.isdigit()
        return text

    def description(self) -> dict[str, Any]:
        return {**super().description(), "words": list(self.words)}

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        return cls(description["words"])
