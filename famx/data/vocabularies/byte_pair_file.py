"""`tokenizer.json` of a byte-level BPE: typed reading, and the library's tokenizer without surprises."""

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.packages import optional_package
from famx.base.untrusted import Fields, Name, parse_object, parsed, shown
from famx.data.vocabularies.special_tokens import (
    MOST_SPECIAL,
    MOST_TOKEN,
    MOST_TOKENS,
    AddedToken,
    is_control,
)

_MOST_STEP = 1 << 14  # characters of what describes normalisation and splitting
_Token = Annotated[str, Field(max_length=MOST_TOKEN)]
_Pair = Annotated[list[_Token], Field(min_length=2, max_length=2)]
_Vocab = dict[_Token, Annotated[int, Field(ge=0, lt=MOST_TOKENS)]]
_Merge = Annotated[str, Field(max_length=2 * MOST_TOKEN + 1)] | _Pair


class _Model(Fields):
    type: Name = "BPE"
    vocab: Annotated[_Vocab, Field(max_length=MOST_TOKENS)]
    merges: Annotated[list[_Merge], Field(max_length=MOST_TOKENS)]
    unk_token: _Token | None = None


class _File(Fields):
    added_tokens: Annotated[list[AddedToken], Field(max_length=MOST_SPECIAL)] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    model: _Model


class Listed(AddedToken):
    """An added token; `ordinary`: the file lists it as an ordinary token of text."""

    ordinary: bool = False


class BytePairs:
    """A `tokenizer.json`, with added tokens that it does not have.

    Attributes:
      unk_token: the model's token for what is unknown, or None.
      fillers: ids between the file's and those of added tokens, which nothing has.
    """

    def __init__(self, spec: dict[str, Any], file: _File):
        self._spec, self._file = spec, file
        self.unk_token = file.model.unk_token
        self.fillers: set[int] = set()

    def add(self, tokens: Iterable[AddedToken], template: str | None) -> list[Listed]:
        """Add tokens, and make those special that control a model; returns all added tokens.

        Raises:
          ValueError: a token has another id than in the file, or two tokens have one.
        """
        vocab = self._file.model.vocab
        texts = {i: text for text, i in vocab.items()}
        if len(texts) < len(vocab):
            text, i = next((text, i) for text, i in vocab.items() if texts[i] != text)
            raise ValueError(f"its tokens {shown(text)} and {shown(texts[i])} have the same id, {i}.")
        listed = {token.id: Listed(**token.model_dump()) for token in self._file.added_tokens or ()}
        for token in tokens:
            own = listed.get(token.id)
            if own is not None and own.content != token.content or (
                vocab.get(token.content, token.id) != token.id
            ):
                raise ValueError(
                    f"the added token {shown(token.content)} has the id {token.id}, which is another in"
                    " tokenizer.json; correct one of the two files."
                )
            listed.setdefault(token.id, Listed(**token.model_dump()))
        for i, token in listed.items():
            if texts.get(i, token.content) != token.content:
                raise ValueError(
                    f"its added token {shown(token.content)} has the id {i}, which is that of its token"
                    f" {shown(texts[i])}."
                )
        for text, i in vocab.items():
            if i not in listed and is_control(text, template, ordinary=True):
                listed[i] = Listed(id=i, content=text, ordinary=True)
        listed = {
            i: token.model_copy(update={"special": True})
            if not token.is_space and (token.ordinary or is_control(token.content, template)) else token
            for i, token in listed.items()
        }  # fmt: skip
        size = max([*vocab.values(), -1]) + 1
        last = max([*listed, size - 1])
        taken = listed.keys() | set(vocab.values())
        self.fillers = {i for i in range(size, last + 1) if i not in taken}
        if len(self.fillers) > MOST_SPECIAL:
            raise ValueError(f"{len(self.fillers):,} ids between its tokens belong to none.")
        fill = [Listed(id=i, content=f"\ufdd5{i}\ufdd5", special=True) for i in self.fillers]
        flags = ("id", "content", "single_word", "lstrip", "rstrip", "special")
        known = {entry["id"]: entry for entry in self._spec.get("added_tokens") or []}
        self._spec["added_tokens"] = [
            {"normalized": False, **known.get(token.id, {}), **token.model_dump(include=set(flags))}
            for token in sorted([*listed.values(), *fill], key=lambda token: token.id)
        ]
        return list(listed.values())

    def open(self):
        """The library's tokenizer, to which special tokens in a text are plain text.

        Raises:
          ConfigError: the package `tokenizers` is missing.
          ValueError: the library refuses the file.
        """
        library = optional_package("tokenizers", "Byte-level BPE vocabularies")
        text = json.dumps({**self._spec, "truncation": None, "padding": None}, ensure_ascii=False)
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except BaseException as error:  # the library raises Exception itself, or a panic of Rust
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            why = shown(str(error), 200)
            raise ValueError(f"the tokenizers library refuses this file ({why}).") from error
        tokenizer.encode_special_tokens = True
        return tokenizer


def read_byte_pairs(content: bytes) -> BytePairs:
    """The `tokenizer.json` of a byte-level BPE.

    Raises:
      ValueError: it is damaged, or not byte-level BPE.
    """
    try:
        spec = parse_object(content, "tokenizer.json")
        model = spec.get("model")
        kind = model.get("type") or "BPE" if isinstance(model, dict) else None
        steps = json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
        if kind is not None and (kind != "BPE" or '"ByteLevel"' not in steps):
            raise ValueError(
                "this tokenizer.json is not byte-level BPE; if the model has a SentencePiece "
                "file, read that with SentencePieceVocabulary."
            )
        file = parsed(_File, spec, "tokenizer.json")
    except ConfigError as error:
        raise ValueError(f"this is not a whole tokenizer.json ({error}); fetch it again.") from error
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if len(json.dumps(spec.get(name))) > _MOST_STEP:
            raise ValueError(f"its {name} has more than {_MOST_STEP:,} characters, which none has.")
    return BytePairs(spec, file)
