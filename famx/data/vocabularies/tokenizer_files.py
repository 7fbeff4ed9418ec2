"""Vocabularies that a tokenizer file defines: SentencePiece, and byte-level BPE.

Their libraries, `sentencepiece` and `tokenizers`, are imported when a vocabulary is made.

The special ids come from the file. An id given by the caller must be one that no text encodes to: a
control or unused token of the file, or the first id after the file's last one, which is then
appended. Padding always has an id that nothing else has. If no `pad_id` is given, and the file has
none or uses it for begin, end, unknown or a token of text, then an id is appended and `vocab_size` is
larger by one than the file says. A pretrained model has no row for this id in its embedding: for such
a model give one of its control tokens as `pad_id`. Begin, end and unknown may share an id, as in GPT-2,
if the file says so.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from famx.base.errors import ConfigError
from famx.data.vocabularies.base import Vocabulary, optional_package
from famx.data.vocabularies.gguf_tokenizers import read_gguf

_IDS = ("pad_id", "bos_id", "eos_id", "unk_id")


class TokenizerFile(NamedTuple):
    """Content of a tokenizer file and of the `tokenizer_config.json` next to it."""

    path: str | os.PathLike
    kind: str
    content: bytes
    config: Mapping[str, Any]


def read_tokenizer_file(path: str | os.PathLike) -> TokenizerFile:
    """Read a SentencePiece model, a `tokenizer.json` or the tokenizer of a GGUF file.

    Raises:
      ConfigError: a package is missing.
      ValueError: the file does not exist or is none of these.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"There is no tokenizer file '{path}'; check the path.")
    with file.open("rb") as stream:
        if stream.read(4) == b"GGUF":
            return TokenizerFile(path, *read_gguf(file))
        stream.seek(0)
        content = stream.read()
    if content.lstrip()[:1] == b"{":
        kind = "byte_pair"
    elif content[:1] == b"\n":  # the tag of the first piece in a SentencePiece model
        kind = "sentencepiece"
    else:
        raise ValueError(
            f"'{path}' is not a tokenizer file; give a SentencePiece model, a tokenizer.json or a GGUF "
            "file."
        )
    return TokenizerFile(path, kind, content, _read_config(file.parent))


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Read `tokenizer_config.json` of the folder; the chat template may be in a separate file."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = {}
    if file.is_file():
        try:
            config = dict(json.loads(file.read_bytes()))
            if isinstance(config.get("chat_template"), list):  # several, by name
                named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
                config["chat_template"] = named.get("default")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"'{file}' is damaged ({error}); fetch it again.") from error
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


class FileVocabulary(Vocabulary):
    """Base class of both kinds. `content` is the file to save, also after reading a GGUF file.

    A vocabulary is pickled with its content, so unpickling does not need the file.
    """

    _size: int  # number of ids of the file, without appended ones
    _unspelled: set[int]  # ids of the file that no text encodes to

    def __init__(
        self,
        file: str | os.PathLike | TokenizerFile,
        pad_id: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ):
        """
        Args:
          file: the tokenizer file, or the result of `read_tokenizer_file`.
          pad_id, bos_id, eos_id: override the file's ids; the module's docstring has the rules.

        Raises:
          ConfigError: a package is missing.
          ValueError: the file cannot be read or is of another kind, or a given id is taken.
        """
        if not isinstance(file, TokenizerFile):
            file = read_tokenizer_file(file)
        if file.kind != self.kind:
            other = next(c for c in FileVocabulary.__subclasses__() if c.kind == file.kind)
            raise ValueError(
                f"The tokenizer of '{file.path}' is of kind '{file.kind}', not '{self.kind}'; read "
                f"it with {other.__name__}."
            )
        self.chat_template = file.config.get("chat_template")
        try:
            self._open(file.content)
        except ConfigError:
            raise
        except ValueError as error:
            raise ValueError(f"'{file.path}': {error}") from error
        self._set_ids(
            self._named_ids(file.config), {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
        )

    def _open(self, content: bytes) -> None:
        """Set `content`, `_size`, `_unspelled` and the library's tokenizer."""
        raise NotImplementedError

    def _named_ids(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        """The special ids of the file and its config, by name."""
        raise NotImplementedError

    def _set_ids(self, named: Mapping[str, int | None], given: Mapping[str, int | None]) -> None:
        given = {name: i for name, i in given.items() if i is not None}
        ids = {**named, **given}
        owner = {ids[name]: name for name in ("bos_id", "eos_id", "unk_id") if ids[name] is not None}
        if "pad_id" in given and ids["pad_id"] in owner:
            raise ValueError(
                f"pad_id {ids['pad_id']} is also {owner[ids['pad_id']]}; padding would be read as that "
                "token. Leave out pad_id, and one is appended."
            )
        for name, i in given.items():
            if i < self._size and i not in self._unspelled:
                free = sorted(self._unspelled - {ids[other] for other in _IDS if other != name})
                raise ValueError(
                    f"{name} {i} is not free: no text may encode to it. Free ids are {self._size}, which "
                    f"is then appended, and in the file {free[:8] or 'none'}."
                )
        if "pad_id" not in given and (ids["pad_id"] in owner or ids["pad_id"] not in self._unspelled):
            ids["pad_id"] = max(self._size, *(i + 1 for i in owner), 0)
        appended = sorted({i for i in ids.values() if i is not None and i >= self._size})
        self.vocab_size = self._size + len(appended)
        if appended and appended[-1] >= self.vocab_size:
            raise ValueError(
                f"Id {appended[-1]} leaves a gap: the file has ids up to {self._size - 1}, and "
                f"appended ones must follow from {self._size} on."
            )
        for name in _IDS:
            setattr(self, name, ids[name])

    def _visible(self, ids: Iterable[int]) -> list[int]:
        hidden = (self.pad_id, self.bos_id, self.eos_id)
        return [i for i in self._check_ids(ids) if i not in hidden]

    def description(self) -> dict[str, Any]:
        return {**super().description(), "file_sha256": hashlib.sha256(self.content).hexdigest()}

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        self = cls.__new__(cls)
        self._open(content)
        for name in ("vocab_size", *_IDS):
            setattr(self, name, description[name])
        self.chat_template = description.get("chat_template")
        return self

    def __reduce__(self):
        description = {**self.description(), "chat_template": self.chat_template}
        return type(self).restore, (description, self.content)


class SentencePieceVocabulary(FileVocabulary):
    """A SentencePiece model, or a GGUF file whose `tokenizer.ggml.model` is "llama".

    Ids are those of the file. No text encodes to control pieces.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def _open(self, content: bytes) -> None:
        sentencepiece = optional_package("sentencepiece", "SentencePiece vocabularies")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError("this is not a whole SentencePiece model; fetch it again.") from error
        self.content = content
        self._size = self._processor.get_piece_size()
        control, unused = self._processor.is_control, self._processor.is_unused
        self._unspelled = {i for i in range(self._size) if control(i) or unused(i)}
        piece = self._processor.id_to_piece
        self.special_tokens = {piece(i): i for i in range(self._size) if control(i)}

    def _named_ids(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        ids = {name: getattr(self._processor, name)() for name in _IDS}
        return {name: None if i < 0 else i for name, i in ids.items()}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos; characters without a piece become `unk_id` or bytes.

        Args:
          text: any text.
          special: as for `BytePairVocabulary`; the control pieces are the special tokens.
        """
        if not special or not self.special_tokens:
            return self._processor.encode(text)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        encode = lambda i, part: [self.special_tokens[part]] if i % 2 else self._processor.encode(part)
        return [token for i, part in enumerate(parts) for token in encode(i, part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; pad, bos, eos and other control pieces are left out.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        return self._processor.decode(self._visible(ids)) or ""


class BytePairVocabulary(FileVocabulary):
    """Byte-level BPE: a `tokenizer.json`, or a GGUF file whose `tokenizer.ggml.model` is "gpt2".

    A `tokenizer_config.json` next to the `tokenizer.json` names bos, eos, pad and unknown and has the
    chat template; without it these are None. Truncation and padding settings of a `tokenizer.json` are
    ignored. The pre-tokenizers of GPT-2, Llama 3, Qwen 2 and SmolLM are known in GGUF files; that of
    Qwen normalises text to NFC.
    """

    kind = "byte_pair"
    file_name = "tokenizer.json"

    def _open(self, content: bytes) -> None:
        self.content = content
        self._text = self._tokenizer(special=False)
        vocab = self._text.get_vocab()
        self._size = max(vocab.values(), default=-1) + 1
        added = self._text.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.special_tokens = {added[i].content: i for i in special}
        self._unspelled = special | (set(range(self._size)) - set(vocab.values()))
        for i in special:
            if special & set(self.encode(added[i].content)):
                raise ValueError(
                    f"plain text can spell the special token {added[i].content!r}; rename it in the "
                    "tokenizer file."
                )

    def _tokenizer(self, special: bool):
        """Make the library's tokenizer; with `special`, it recognises special tokens in a text."""
        library = optional_package("tokenizers", "Byte-level BPE vocabularies")
        try:
            spec = json.loads(self.content)
            byte_level = '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
            if spec["model"].get("type", "BPE") != "BPE" or not byte_level:
                raise ValueError(
                    "this tokenizer.json is not byte-level BPE; if the model has a SentencePiece "
                    "file, read that with SentencePieceVocabulary."
                )
        except (KeyError, AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError("this is not a whole tokenizer.json; fetch it again.") from error
        try:
            tokenizer = library.Tokenizer.from_str(self.content.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"the tokenizers library refuses this file ({error}).") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special  # True: they are encoded as plain text
        return tokenizer

    @functools.cached_property
    def _text_and_special(self):
        return self._tokenizer(special=True)

    def _named_ids(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        unknown = json.loads(self.content)["model"].get("unk_token")
        ids = {}
        for name in _IDS:
            key = name.replace("_id", "_token")
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if name == "unk_id" and token is None:
                token = unknown
            ids[name] = None if token is None else self._text.token_to_id(token)
            if token is not None and ids[name] is None:
                raise ValueError(
                    f"tokenizer_config.json names {token!r} as {key}, which the tokenizer does not "
                    "have; correct one of the two files."
                )
        return ids

    @functools.cached_property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes that no token spells; the library drops them from texts."""
        vocab = self._text.get_vocab()
        return frozenset(i for i, token in enumerate(_byte_tokens()) if token not in vocab)

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the file has a step that puts bos before a text; files made of GGUF never have."""
        return self._text.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos.

        Args:
          text: any text.
          special: encode special tokens, such as those of a chat template, as single ids; otherwise
            they are plain text. Never set it for text from outside, such as a user's message.
        """
        tokenizer = self._text_and_special if special else self._text
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without pad, bos and eos; bytes that are not UTF-8 are replaced.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        return self._text.decode(self._visible(ids), skip_special_tokens=False)


def _byte_tokens() -> list[str]:
    """The character that represents each byte: itself if it is visible, else one above 255."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in seen]
    return [chr(b) if b in seen else chr(256 + hidden.index(b)) for b in range(256)]
