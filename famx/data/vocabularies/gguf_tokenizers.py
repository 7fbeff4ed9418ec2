"""Tokenizers of GGUF files, converted to the file format that the tokenizer's library reads."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.packages import optional_package
from famx.base.untrusted import Fields, Name, parsed
from famx.data.vocabularies.gguf_file import GgufFile
from famx.data.vocabularies.special_tokens import MOST_TOKEN, MOST_TOKENS
from famx.data.vocabularies.tokenizer_config import MOST_TEMPLATE, ROLES, TokenizerConfig

# Token types of GGUF; SentencePiece numbers its types of pieces the same way.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


_Token = Annotated[str, Field(max_length=MOST_TOKEN)]
_Id = Annotated[int, Field(ge=0)] | None


class _Tokenizer(Fields):
    """Entries of a GGUF header under `tokenizer.`."""

    model: Name | None = Field(None, alias="ggml.model")
    pre: Name | None = Field(None, alias="ggml.pre")
    tokens: Annotated[list[_Token], Field(max_length=MOST_TOKENS)] = Field([], alias="ggml.tokens")
    types: list[Annotated[int, Field(ge=0, le=BYTE)]] | None = Field(None, alias="ggml.token_type")
    scores: list[float] = Field([], alias="ggml.scores")
    merges: list[Annotated[str, Field(max_length=2 * MOST_TOKEN + 1)]] | None = Field(
        None, alias="ggml.merges"
    )
    bos: _Id = Field(None, alias="ggml.bos_token_id")
    eos: _Id = Field(None, alias="ggml.eos_token_id")
    unk: _Id = Field(None, alias="ggml.unknown_token_id")
    pad: _Id = Field(None, alias="ggml.padding_token_id")
    add_space_prefix: bool = Field(True, alias="ggml.add_space_prefix")
    remove_extra_whitespaces: bool = Field(False, alias="ggml.remove_extra_whitespaces")
    chat_template: Annotated[str, Field(max_length=MOST_TEMPLATE)] | None = None


def read_gguf(path: str | os.PathLike) -> tuple[str, bytes, TokenizerConfig]:
    """Read the tokenizer of a GGUF file, without the weights.

    Args:
      path: a GGUF file whose `tokenizer.ggml.model` is "gpt2" (byte-level BPE) or "llama"
        (SentencePiece).

    Returns:
      the kind, "byte_pair" or "sentencepiece"; the bytes of a `tokenizer.json` or a SentencePiece
      model; and what a `tokenizer_config.json` would say.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is damaged, has no tokenizer, or one of
        another kind.
    """
    values = GgufFile(path).values
    prefix = "tokenizer."
    own = {key.removeprefix(prefix): x for key, x in values.items() if key.startswith(prefix)}
    tokenizer = parsed(_Tokenizer, own, f"'{path}' (tokenizer)")
    if tokenizer.model not in _WRITERS:
        raise ConfigError(
            f"The tokenizer of '{path}' is of kind {tokenizer.model!r}; GGUF files with 'gpt2' "
            "(byte-level BPE) and 'llama' (SentencePiece) tokenizers can be read."
        )
    kind, write = _WRITERS[tokenizer.model]
    tokens = tokenizer.tokens
    # 0 is "undefined", which llama.cpp reads as ordinary.
    types = [kind or NORMAL for kind in tokenizer.types or [NORMAL] * len(tokens)]
    if not tokens or len(types) != len(tokens):
        raise ConfigError(
            f"'{path}' has {len(tokens)} tokens and {len(types)} token types; there must be at least "
            "one token, and a type for each."
        )
    ids = {role: getattr(tokenizer, role) for role in ROLES}
    names = {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    return kind, write(path, tokenizer, types, names), TokenizerConfig(names, tokenizer.chat_template)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """The step that writes bytes as characters; `use_regex` also splits into the words of GPT-2."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _words(digits: str) -> list[dict[str, Any]]:
    """The steps of Llama 3: a line break ends a word; `digits` is the regex quantifier of digits."""
    return [
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _byte_level(False),
    ]  # fmt: skip


_LLAMA3 = {"steps": _words("{1,3}"), "ignore_merges": True}
# Name in `tokenizer.ggml.pre` -> normalisation and splitting of a text before merging.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": {"steps": [_byte_level(True)]},
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": {"steps": _words(""), "normalizer": {"type": "NFC"}},
    "smollm": {"steps": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]},
}


def _byte_pair_file(
    path: str | os.PathLike, tokenizer: _Tokenizer, types: Sequence[int], names: Mapping[str, str]
) -> bytes:
    """Make a `tokenizer.json`; tokens that are not text become special tokens."""
    name, tokens = tokenizer.pre, tokenizer.tokens
    if name not in PRE_TOKENIZERS:
        raise ConfigError(
            f"'{path}' splits text with the pre-tokenizer {name!r}; known are "
            f"{', '.join(PRE_TOKENIZERS)}. Use the model's tokenizer.json instead."
        )
    rule = PRE_TOKENIZERS[name]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        repeated = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ConfigError(f"'{path}' has the token {repeated!r} twice; every token must have one id.")
    merges = tokenizer.merges
    if merges is None:
        raise ConfigError(f"'{path}' has no merges (tokenizer.ggml.merges); fetch another file.")
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind not in (NORMAL, BYTE)
    ]
    model = {
        "type": "BPE",
        "ignore_merges": rule.get("ignore_merges", False),
        "vocab": vocab,
        "merges": merges,
    }
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": rule.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule["steps"]},
        "decoder": _byte_level(True),
        "model": model,
    }
    return json.dumps(spec, ensure_ascii=False).encode("utf-8")


def _sentencepiece_file(
    path: str | os.PathLike, tokenizer: _Tokenizer, types: Sequence[int], names: Mapping[str, str]
) -> bytes:
    """Make a SentencePiece BPE model with the pieces, scores and types of the GGUF file."""
    optional_package("sentencepiece", "SentencePiece vocabularies")
    from sentencepiece import sentencepiece_model_pb2 as proto

    tokens, scores = tokenizer.tokens, tokenizer.scores
    if len(scores) != len(tokens):
        raise ConfigError(
            f"'{path}' has {len(tokens)} tokens and {len(scores)} scores; each token needs one."
        )
    model = proto.ModelProto()
    for token, score, kind in zip(tokens, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    for role, token in names.items():
        setattr(trainer, f"{role}_piece", token)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = tokenizer.add_space_prefix
    model.normalizer_spec.remove_extra_whitespaces = tokenizer.remove_extra_whitespaces
    return model.SerializeToString(deterministic=True)


_WRITERS = {
    "gpt2": ("byte_pair", _byte_pair_file),
    "llama": ("sentencepiece", _sentencepiece_file),
}
