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
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.untrusted import Fields, parsed, read_limited, shown
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.byte_pair_file import read_byte_pairs
from famx.data.vocabularies.gguf_tokenizers import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_gguf
from famx.data.vocabularies.sentencepiece_file import open_model, read_model
from famx.data.vocabularies.special_tokens import (
    BREAK,
    MOST_SPECIAL,
    MOST_TOKENS,
    AddedToken,
    Splitter,
    is_control,
)
from famx.data.vocabularies.tokenizer_config import (
    MOST_TEMPLATE,
    MOST_TOKENIZER_BYTES,
    TokenizerConfig,
    read_tokenizer_config,
)

Before = Literal["start", "special", "text"]  # what a text follows
_Id = Annotated[int, Field(ge=0, le=2 * MOST_TOKENS)]
_IDS = ("pad_id", "bos_id", "eos_id", "unk_id")


class TokenizerFile(NamedTuple):
    """Content of a tokenizer file, and what the files next to it say."""

    path: str | os.PathLike
    kind: str
    content: bytes
    config: TokenizerConfig


def read_tokenizer_file(path: str | os.PathLike) -> TokenizerFile:
    """Read a SentencePiece model, a `tokenizer.json` or the tokenizer of a GGUF file.

    Raises:
      ConfigError: a package is missing, or a file does not exist, is none of these, is damaged or too
        large.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"There is no tokenizer file '{path}'; check the path.")
    with file.open("rb") as stream:
        if stream.read(4) == b"GGUF":
            return TokenizerFile(path, *read_gguf(file))
    content = read_limited(file, MOST_TOKENIZER_BYTES)
    if content.lstrip()[:1] == b"{":
        return TokenizerFile(path, "byte_pair", content, read_tokenizer_config(file.parent))
    if content[:1] != b"\n":  # the tag of the first piece in a SentencePiece model
        raise ConfigError(
            f"'{path}' is not a tokenizer file; give a SentencePiece model, a tokenizer.json or a GGUF "
            "file."
        )
    if file.name != "tokenizer.model":  # the files next to it may be about another
        config = TokenizerConfig(chat_template=read_tokenizer_config(file.parent).chat_template)
        return TokenizerFile(path, "sentencepiece", content, config)
    config = read_tokenizer_config(file.parent, file.parent / "tokenizer.json")
    return TokenizerFile(path, "sentencepiece", content, config)


class FileVocabulary(Vocabulary):
    """Base class of both kinds. `content` is the file to save, also after reading a GGUF file.

    A vocabulary is pickled with its content, so unpickling does not need the file.

    Attributes:
      added_tokens: tokens that the files next to the tokenizer add to it.
      prefix_space: see `TokenizerConfig`.
    """

    added_tokens: tuple[AddedToken, ...] = ()
    prefix_space: str | None = None

    _listed: Mapping[int, AddedToken]  # tokens that any of the files lists as added, by id
    _beyond: Mapping[int, AddedToken] = MappingProxyType({})  # those that the library does not know
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
          ConfigError: a package is missing, the file cannot be read or is of another kind, or a given id
            is taken.
        """
        if not isinstance(file, TokenizerFile):
            file = read_tokenizer_file(file)
        if file.kind != self.kind:
            other = next(c for c in FileVocabulary.__subclasses__() if c.kind == file.kind)
            raise ConfigError(
                f"The tokenizer of '{file.path}' is of kind '{file.kind}', not '{self.kind}'; read "
                f"it with {other.__name__}."
            )
        self.chat_template = file.config.chat_template
        self.added_tokens, self.prefix_space = file.config.added, file.config.prefix_space
        try:
            self._open(file.content)
            named = self._named_ids(file.config.names)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"'{file.path}': {error}") from error
        self._set_ids(named, {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id})

    def _open(self, content: bytes) -> None:
        """Set `content`, `_size`, `_unspelled`, `special_tokens` and the library's tokenizer."""
        raise NotImplementedError

    def _id_of(self, token: str) -> int | None:
        """Id of a token of the file or of an added one."""
        raise NotImplementedError

    def _plain(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text without added tokens; `prefix`: whether a SentencePiece model may add a space."""
        raise NotImplementedError

    def _named_ids(self, names: Mapping[str, str]) -> dict[str, int | None]:
        """The special ids, by name; `names` has the tokens that the config names, by role."""
        ids = {}
        for name in _IDS:
            token = names.get(name.removesuffix("_id"))
            ids[name] = None if token is None else self._id_of(token)
            if token is not None and ids[name] is None:
                raise ConfigError(
                    f"tokenizer_config.json names {shown(token)} as {name[:3]}_token, which the tokenizer"
                    " does not have; correct one of the two files."
                )
        return ids

    def _set_ids(self, named: Mapping[str, int | None], given: Mapping[str, int | None]) -> None:
        given = {name: i for name, i in given.items() if i is not None}
        ids = {**named, **given}
        owner = {ids[name]: name for name in ("bos_id", "eos_id", "unk_id") if ids[name] is not None}
        if "pad_id" in given and ids["pad_id"] in owner:
            raise ConfigError(
                f"pad_id {ids['pad_id']} is also {owner[ids['pad_id']]}; padding would be read as that "
                "token. Leave out pad_id, and one is appended."
            )
        for name, i in given.items():
            if i < self._size and i not in self._unspelled:
                free = sorted(self._unspelled - {ids[other] for other in _IDS if other != name})
                raise ConfigError(
                    f"{name} {i} is not free: no text may encode to it. Free ids are {self._size}, which "
                    f"is then appended, and in the file {free[:8] or 'none'}."
                )
        if "pad_id" not in given and (ids["pad_id"] in owner or ids["pad_id"] not in self._unspelled):
            ids["pad_id"] = max(self._size, *(i + 1 for i in owner), 0)
        appended = sorted({i for i in ids.values() if i is not None and i >= self._size})
        self.vocab_size = self._size + len(appended)
        if appended and appended[-1] >= self.vocab_size:
            raise ConfigError(
                f"Id {appended[-1]} leaves a gap: the file has ids up to {self._size - 1}, and "
                f"appended ones must follow from {self._size} on."
            )
        for name in _IDS:
            setattr(self, name, ids[name])

    def encode(self, text: str, special: bool = False, before: Before = "start") -> list[int]:
        """Ids of `text`, without bos and eos.

        Args:
          text: any text. With `special`, a `BREAK` in it is left out, and keeps what it is in from being
            a special token.
          special: encode special tokens, such as those of a chat template, as single ids; otherwise they
            are plain text. Never set it for text from outside, such as a user's message.
          before: what the text follows: nothing, a special token, or other text.
        """
        splitter = self._all if special else self._added
        if splitter is None:
            return self._plain(text, self._prefixed(text, before))
        ids: list[int] = []
        for part, token in splitter.split(text):
            part = part.replace(BREAK, "") if special else part
            if part:
                ids += self._plain(part, self._prefixed(part, before))
                before = "text"
            if token is not None:
                ids.append(token.id)
                before = "special"
        return ids

    def _prefixed(self, text: str, before: Before) -> bool:
        if self.prefix_space == "first":  # as transformers: a space that is there already is enough
            return before == "start" and not text.startswith((" ", "\u2581"))
        return self.prefix_space != "never" and before != "text"

    @functools.cached_property
    def _added(self) -> Splitter | None:
        """Finds the tokens that any text may spell and the library does not recognise by itself."""
        special = set(self.special_tokens.values())
        tokens = [token for token in self._beyond.values() if token.id not in special]
        return Splitter(tokens) if tokens else None

    @functools.cached_property
    def _all(self) -> Splitter | None:
        """Finds these and the special tokens; None if there are none."""
        special = {i: text for text, i in self.special_tokens.items() if text}
        tokens = [self._listed.get(i) or AddedToken(id=i, content=text) for i, text in special.items()]
        tokens += [token for i, token in self._beyond.items() if i not in special]
        return Splitter(tokens) if tokens else None

    def free_tokens(self) -> dict[int, str]:
        """Ids of the file that no text encodes to, with their texts."""
        raise NotImplementedError

    def _visible(self, ids: Iterable[int]) -> list[int]:
        hidden = (self.pad_id, self.bos_id, self.eos_id)
        return [i for i in self._check_ids(ids) if i not in hidden]

    def description(self) -> dict[str, Any]:
        more = {"file_sha256": hashlib.sha256(self.content).hexdigest()}
        if self.added_tokens:
            more["added_tokens"] = [token.model_dump() for token in self.added_tokens]
        if self.prefix_space is not None:
            more["prefix_space"] = self.prefix_space
        return {**super().description(), **more}

    @classmethod
    def restore(cls, description: Mapping[str, Any], content: bytes | None) -> Self:
        saved = parsed(_Saved, description, "vocabulary.json")
        self = cls.__new__(cls)
        self.chat_template = saved.chat_template
        self.added_tokens, self.prefix_space = tuple(saved.added_tokens), saved.prefix_space
        self._open(content)
        for name in ("vocab_size", *_IDS):
            setattr(self, name, getattr(saved, name))
        if saved.vocab_size < self._size:
            raise ConfigError(f"{self._size} ids of the tokenizer are more than {saved.vocab_size}.")
        return self

    def __reduce__(self):
        return _unpickled, (type(self), self.saved_description(), self.content)


def _unpickled(cls: type[FileVocabulary], description: Mapping[str, Any], content: bytes):
    vocabulary = cls.restore(description, content)
    vocabulary.set_more_end_ids(description.get("end_ids", ()))
    return vocabulary


class _Saved(Fields):
    """The description of a vocabulary of a tokenizer file."""

    vocab_size: Annotated[int, Field(ge=1, le=2 * MOST_TOKENS)]
    pad_id: _Id
    bos_id: _Id | None
    eos_id: _Id | None
    unk_id: _Id | None
    chat_template: Annotated[str, Field(max_length=MOST_TEMPLATE)] | None = None
    added_tokens: Annotated[list[AddedToken], Field(max_length=MOST_SPECIAL)] = []
    prefix_space: Literal["always", "first", "never"] | None = None


class SentencePieceVocabulary(FileVocabulary):
    """A SentencePiece model, or a GGUF file whose `tokenizer.ggml.model` is "llama".

    Ids are those of the file and of tokens that the files next to it add. No text encodes to control
    pieces, nor to others that control a model (`special_tokens.is_control`).
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def _open(self, content: bytes) -> None:
        model = read_model(content)
        self.content, pieces = content, model.pieces
        kinds = [piece.type for piece in pieces]
        self._ids = {piece.piece: i for i, piece in enumerate(pieces)}
        self._beyond, self._listed = {}, {token.id: token for token in self.added_tokens}
        special = {piece.piece: i for i, piece in enumerate(pieces) if kinds[i] == CONTROL}
        for token in self.added_tokens:
            i = self._ids.get(token.content, self._ids.get(token.content.replace(" ", "\u2581")))
            if i is None and token.id >= len(pieces):
                self._beyond[token.id] = token
            elif i != token.id:
                raise ValueError(
                    f"the added token {shown(token.content)} has the id {token.id}, which is another in"
                    " the SentencePiece model; correct one of the two files."
                )
            if token.special or is_control(token.content, self.chat_template):
                special[token.content] = token.id
        for i, piece in enumerate(pieces):
            if kinds[i] in (NORMAL, USER_DEFINED):
                if is_control(piece.piece, self.chat_template, ordinary=kinds[i] == NORMAL):
                    special[piece.piece] = i
        self.special_tokens = special
        self._size = max(len(pieces), *(i + 1 for i in self._beyond)) if self._beyond else len(pieces)
        unused = {i for i, kind in enumerate(kinds) if kind == UNUSED}
        gaps = set(range(len(pieces), self._size)) - self._beyond.keys()
        self._unspelled = set(special.values()) | unused | gaps
        self._decoder = self._processor = self._bare = open_model(model)
        changed = [i for i in special.values() if i < len(pieces) and kinds[i] in (NORMAL, USER_DEFINED)]
        for i in changed:  # no text encodes to control pieces
            pieces[i].type = CONTROL
        if changed:
            self._processor = self._bare = open_model(model)
        if model.normalizer_spec.add_dummy_prefix:
            model.normalizer_spec.add_dummy_prefix = False
            self._bare = open_model(model)

    def _id_of(self, token: str) -> int | None:
        beyond = (i for i, added in self._beyond.items() if added.content == token)
        return next(beyond, self._ids.get(token))

    def _named_ids(self, names: Mapping[str, str]) -> dict[str, int | None]:
        own = {name: getattr(self._decoder, name)() for name in _IDS}
        own = {name: None if i < 0 else i for name, i in own.items()}
        if self._id_of(names.get("pad", "")) is None:  # many files name one that no model has
            names = {role: token for role, token in names.items() if role != "pad"}
        named = super()._named_ids(names)
        return {name: own[name] if named[name] is None else named[name] for name in _IDS}

    def _plain(self, text: str, prefix: bool) -> list[int]:
        return (self._processor if prefix else self._bare).encode(text)

    def free_tokens(self) -> dict[int, str]:
        text = {i: token.content for i, token in self._beyond.items()}
        text |= {i: piece for piece, i in self._ids.items()}
        return {i: text.get(i, "") for i in sorted(self._unspelled)}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; pad, bos, eos and other control pieces are left out.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        ids = self._visible(ids)
        text, run, first = "", [], True
        for i in [*ids, None]:
            if i is not None and i < len(self._ids):
                run.append(i)
                continue
            if run:
                # The library leaves out the space that it put before a text; only the first run has it.
                text += (self._decoder if first else self._bare_decoder).decode(run) or ""
                run, first = [], False
            token = self._beyond.get(i)
            text += token.content if token is not None and not token.special else ""
        return text

    @functools.cached_property
    def _bare_decoder(self):
        model = read_model(self.content)
        model.normalizer_spec.add_dummy_prefix = False
        return open_model(model)


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
        spec = read_byte_pairs(content)
        self._unknown = spec.unk_token
        added = {token.id: token for token in spec.add(self.added_tokens, self.chat_template)}
        self._listed = added
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self._text = spec.open()
        vocab = self._text.get_vocab()
        self._size = max(vocab.values(), default=-1) + 1
        for token in self.added_tokens:
            if vocab.get(token.content) != token.id:
                raise ValueError(
                    f"the added token {shown(token.content)} has the id {token.id}, which the tokenizer"
                    " cannot give it; correct the files."
                )
        special = set(self.special_tokens.values())
        self._unspelled = special | (set(range(self._size)) - set(vocab.values())) | spec.fillers
        self._guarded = frozenset()
        texts = [token.content for token in added.values() if token.special]
        encoded = self._text.encode_batch(texts, add_special_tokens=False)
        spelled = special.intersection(*[[i for text in encoded for i in text.ids]])
        for i in spelled:
            if not added[i].ordinary:
                raise ValueError(
                    f"plain text can spell the special token {added[i].content!r}; rename it in the "
                    "tokenizer file."
                )
        self._guarded = frozenset(spelled)

    def _id_of(self, token: str) -> int | None:
        return self._text.token_to_id(token)

    def _named_ids(self, names: Mapping[str, str]) -> dict[str, int | None]:
        unknown = {} if self._unknown is None else {"unk": self._unknown}
        return super()._named_ids({**unknown, **names})

    @functools.cached_property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes that no token spells; the library drops them from texts."""
        vocab = self._text.get_vocab()
        return frozenset(i for i, token in enumerate(_byte_tokens()) if token not in vocab)

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the file has a step that puts bos before a text; files made of GGUF never have."""
        return self._text.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def _plain(self, text: str, prefix: bool) -> list[int]:
        ids = self._text.encode(text, add_special_tokens=False).ids
        if self._guarded.isdisjoint(ids):
            return ids
        parts = self._all.broken(text).split(BREAK)
        ids = [i for part in parts for i in self._text.encode(part, add_special_tokens=False).ids]
        return [i for i in ids if i not in self._guarded]

    def free_tokens(self) -> dict[int, str]:
        return {i: self._text.id_to_token(i) or "" for i in sorted(self._unspelled)}

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
