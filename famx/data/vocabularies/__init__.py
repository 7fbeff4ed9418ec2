"""Vocabularies: bytes, a small closed set of words, and those that a tokenizer file defines.

Bytes and words need nothing but Python; in both, pad is 0, bos is 1 and eos is 2, and no other token
shares these ids. `save_vocabulary` and `load_vocabulary` keep any of them beside a checkpoint.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from famx.base.errors import ConfigError
from famx.base.files import write_bytes, write_json
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.tokenizer_files import (
    BytePairVocabulary,
    SentencePieceVocabulary,
    read_tokenizer_file,
)

__all__ = [
    "BOS_ID",
    "BytePairVocabulary",
    "ByteVocabulary",
    "EOS_ID",
    "KINDS",
    "PAD_ID",
    "SentencePieceVocabulary",
    "Vocabulary",
    "WordVocabulary",
    "fingerprint",
    "load_vocabulary",
    "open_vocabulary",
    "save_vocabulary",
]

PAD_ID = 0
BOS_ID = 1
EOS_ID = 2


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: byte b has id b + 3; 259 ids; nothing is ever unknown."""

    kind = "bytes"
    pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, None
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


class WordVocabulary(Vocabulary):
    """A small closed vocabulary of words.

    Text is split on whitespace; each digit and each of `.`, `,`, `?` is a token of its own.
    Ids: pad 0, bos 1, eos 2, unknown 3, then `words` in the order given.

    Examples:
      >>> words = WordVocabulary(["the", "key", "is", "7", "."])
      >>> words.encode("the key is 77.")
      [4, 5, 6, 7, 7, 8]
      >>> words.decode([4, 5, 6, 7, 7, 8])
      'the key is 77.'
    """

    kind = "words"
    pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, 3
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

    def description(self) -> dict[str, Any]:
        return {**super().description(), "words": list(self.words)}

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        return cls(description["words"])


KINDS: dict[str, type[Vocabulary]] = {
    cls.kind: cls
    for cls in (ByteVocabulary, WordVocabulary, SentencePieceVocabulary, BytePairVocabulary)
}
_DESCRIPTION_FILE = "vocabulary.json"


def open_vocabulary(
    file: str | os.PathLike,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> SentencePieceVocabulary | BytePairVocabulary:
    """The vocabulary of a tokenizer file: a SentencePiece model, a tokenizer.json or a GGUF file.

    Args:
      file: the tokenizer file; its content tells its kind.
      pad_id, bos_id, eos_id: used in place of the file's; see `famx.data.vocabularies.tokenizer_files`.

    Raises:
      ConfigError: a package is missing.
      ValueError: the file cannot be read, or an id is taken.
    """
    source = read_tokenizer_file(file)
    return KINDS[source.kind](source, pad_id, bos_id, eos_id)


def fingerprint(vocabulary: Vocabulary) -> str:
    """64 hexadecimal digits that two vocabularies share if and only if they are equal.

    They follow from the kind, the size, the special ids and the words or the tokenizer file, not
    from the chat template.
    """
    return vocabulary.fingerprint


def save_vocabulary(vocabulary: Vocabulary, directory: str | os.PathLike) -> None:
    """Write `vocabulary.json` and, where there is one, the tokenizer file into `directory`.

    `vocabulary.json` holds the kind, the sizes and special ids, the words or the name and SHA-256 of
    the tokenizer file, the chat template and the fingerprint. Each file appears whole or not at all.

    Args:
      vocabulary: any of the kinds in `KINDS`.
      directory: made if missing; what it held of another vocabulary is replaced.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        **vocabulary.description(),
        "file": vocabulary.file_name,
        "chat_template": vocabulary.chat_template,
        "fingerprint": vocabulary.fingerprint,
    }
    if vocabulary.file_name is not None:
        write_bytes(directory / vocabulary.file_name, vocabulary.content)
    write_json(directory / _DESCRIPTION_FILE, description)


def load_vocabulary(directory: str | os.PathLike) -> Vocabulary:
    """The vocabulary that `save_vocabulary` wrote into `directory`, equal to the one saved.

    Raises:
      ConfigError: a file is missing, damaged or not the one that was saved, the kind is not known
        here, or a package is missing.
    """
    path = pathlib.Path(directory) / _DESCRIPTION_FILE
    if not path.is_file():
        raise ConfigError(
            f"There is no {_DESCRIPTION_FILE} in '{directory}'; name a directory into which a "
            "vocabulary was saved."
        )
    try:
        description = json.loads(path.read_bytes())
        kind, name = description["kind"], description["file"]
        known = KINDS.get(kind)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged; copy it again from where it was saved.") from error
    if known is None:
        raise ConfigError(
            f"'{path}' describes a vocabulary of kind '{kind}'; known here are {', '.join(KINDS)}."
        )
    content = None
    if known.file_name is not None:
        if name != known.file_name or not path.with_name(name).is_file():
            raise ConfigError(
                f"The tokenizer file '{known.file_name}' that '{path}' needs is missing; copy it into "
                "the same directory."
            )
        content = path.with_name(name).read_bytes()
        if hashlib.sha256(content).hexdigest() != description.get("file_sha256"):
            raise ConfigError(
                f"'{path.with_name(name)}' is not the file that was saved with '{path}': its SHA-256 "
                "differs; copy both again from where they were saved."
            )
    altered = f"'{path}' is not as it was saved; copy it again from where it was saved."
    try:
        vocabulary = known.restore(description, content)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(altered) from error
    if {**description, **vocabulary.description()} != description or (
        vocabulary.fingerprint != description.get("fingerprint")
    ):
        raise ConfigError(altered)
    return vocabulary
