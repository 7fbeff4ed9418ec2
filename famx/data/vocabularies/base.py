"""The base class of vocabularies."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self


class Vocabulary:
    """Converts text to token ids and back.

    Vocabularies are equal if their descriptions are equal. A new kind sets the attributes, defines
    `encode`, `decode`, `description` and `restore`, and gets an entry in
    `famx.data.vocabularies.KINDS`.

    Attributes:
      kind: name of the kind in saved vocabularies.
      vocab_size: number of ids, which are 0 to `vocab_size - 1`.
      pad_id: id of padding after the end of a text; nothing else has this id.
      bos_id, eos_id, unk_id: ids of begin, end and unknown; None if the vocabulary has none.
      adds_bos: whether a text as the tokenizer's own library encodes it begins with bos.
      special_tokens: ids of special tokens by the text that a chat template writes for them; no plain
        text encodes to these ids.
      chat_template: the Jinja template that came with the vocabulary, or None.
      more_end_ids: ids beside `eos_id` that end a text or an answer; see `end_ids`.
      file_name: name of the tokenizer file that is saved next to the description, or None.
      content: the bytes of that file, or None.
    """

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool = True
    special_tokens: Mapping[str, int] = MappingProxyType({})
    chat_template: str | None = None
    more_end_ids: tuple[int, ...] = ()
    file_name: str | None = None
    content: bytes | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without pad, bos and eos."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """Everything that distinguishes this vocabulary from others, as JSON values."""
        names = ("kind", "vocab_size", "pad_id", "bos_id", "eos_id", "unk_id")
        return {name: getattr(self, name) for name in names}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end a text or an answer, `eos_id` first."""
        first = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys([*first, *self.more_end_ids]))

    def set_more_end_ids(self, ids: Iterable[int]) -> None:
        """Let these ids, too, end a text; ids that the vocabulary does not have are left out.

        They are no part of the description: texts are encoded in the same way.
        """
        own = (i for i in ids if 0 <= i < self.vocab_size and i != self.eos_id)
        self.more_end_ids = tuple(sorted(set(own)))

    def saved_description(self) -> dict[str, Any]:
        """`description`, and what else is saved and restored: the chat template and `more_end_ids`."""
        more = {"end_ids": list(self.more_end_ids)} if self.more_end_ids else {}
        return {**self.description(), "chat_template": self.chat_template, **more}

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        """Make the vocabulary that has this `description()` and `content`."""
        return cls()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the description, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"Id {i} is not in this vocabulary; ids run from 0 to {self.vocab_size - 1}."
                )
        return ids
