"""Two vocabularies that need nothing but Python: bytes, and a small closed set of words.

In both, pad is 0, bos is 1 and eos is 2, and no other token shares these ids.
"""

import re
from collections.abc import Iterable, Sequence

PAD_ID = 0
BOS_ID = 1
EOS_ID = 2


class _Vocabulary:
    """Ids and properties that both vocabularies share."""

    pad_id: int = PAD_ID
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    unk_id: int | None = None
    vocab_size: int

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"Id {i} is not in this vocabulary; ids run from 0 to {self.vocab_size - 1}."
                )
        return ids


class ByteVocabulary(_Vocabulary):
    """UTF-8 bytes: byte b has id b + 3; 259 ids; nothing is ever unknown."""

    num_special_ids = 3
    vocab_size = 256 + num_special_ids

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the bytes of `text`, without bos or eos."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return [b + self.num_special_ids for b in data]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; pad, bos and eos are left out.

        Raises:
          ValueError: an id lies outside the vocabulary.
        """
        first = self.num_special_ids
        return bytes(i - first for i in self._check_ids(ids) if i >= first)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteVocabulary)

    def __hash__(self) -> int:
        return hash(ByteVocabulary)


class WordVocabulary(_Vocabulary):
    """A small closed vocabulary of words.

    Text is split on whitespace; each digit and each of `.`, `,`, `?` is a token of its own.
    Ids: pad 0, bos 1, eos 2, unknown 3, then `words` in the order given.
    """

    unk_id = 3
    num_special_ids = 4
    _TOKEN = re.compile(r"[0-9]|[.,?]|[^\s0-9.,?]+")

    def __init__(self, words: Sequence[str]):
        """
        Args:
          words: the known tokens, each a single token of the splitting rule.

        Raises:
          ValueError: a word occurs twice, or would be split into several tokens.
        """
        self.words = tuple(words)
        for word in self.words:
            if self._TOKEN.findall(word) != [word]:
                raise ValueError(
                    f"'{word}' is not a single token of a word vocabulary: it must hold no space, "
                    "and a digit or one of . , ? must stand alone."
                )
        self._id_of = {word: self.num_special_ids + i for i, word in enumerate(self.words)}
        if len(self._id_of) != len(self.words):
            twice = next(w for i, w in enumerate(self.words) if w in self.words[:i])
            raise ValueError(f"'{twice}' stands twice in the list of words; give each word once.")
        self.vocab_size = self.num_special_ids + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; words not in the list get `unk_id`."""
        return [self._id_of.get(token, self.unk_id) for token in self._TOKEN.findall(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without pad, bos and eos; digits that follow each other are joined.

        Raises:
          ValueError: an id lies outside the vocabulary.
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)
