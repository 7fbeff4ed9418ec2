"""Tokenizers of GGUF files, converted to the file format that the tokenizer's library reads."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from famx.data.vocabularies.base import optional_package

# Token types of GGUF; SentencePiece numbers its types of pieces the same way.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> GGUF's


def open_gguf(path: str | os.PathLike) -> Any:
    """Open a `gguf.GGUFReader`, which maps the file into memory.

    Raises:
      ConfigError: the package `gguf` is missing.
      ValueError: the file does not exist or is damaged.
    """
    gguf = optional_package("gguf", "GGUF files")
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        if "GGMLQuantizationType" in str(error):
            raise ValueError(
                f"'{path}' holds tensors of an unknown type ({error}); use a file with tensors of type "
                "Q8_0, or a newer package gguf."
            ) from error
        raise ValueError(f"'{path}' is not a whole GGUF file ({error}); fetch it again.") from error


def read_gguf(path: str | os.PathLike) -> tuple[str, bytes, dict[str, Any]]:
    """Read the tokenizer of a GGUF file, without the weights.

    Args:
      path: a GGUF file whose `tokenizer.ggml.model` is "gpt2" (byte-level BPE) or "llama"
        (SentencePiece).

    Returns:
      the kind, "byte_pair" or "sentencepiece"; the bytes of a `tokenizer.json` or a SentencePiece
      model; and the entries of a `tokenizer_config.json`: `bos_token` etc. and `chat_template`.

    Raises:
      ConfigError: the package `gguf` is missing.
      ValueError: the file is damaged, has no tokenizer, or one of another kind.
    """
    reader = open_gguf(path)

    def get(name: str, default: Any = None) -> Any:
        field = reader.get_field(f"tokenizer.{name}")
        return default if field is None else field.contents()

    model = get("ggml.model")
    if model not in _WRITERS:
        raise ValueError(
            f"The tokenizer of '{path}' is of kind {model!r}; GGUF files with 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece) tokenizers can be read."
        )
    kind, write = _WRITERS[model]
    tokens = get("ggml.tokens", [])
    types = get("ggml.token_type", [NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise ValueError(
            f"'{path}' has {len(tokens)} tokens and {len(types)} token types; there must be at least "
            "one token, and a type for each."
        )
    config = {"chat_template": get("chat_template")}
    for role, name in _ROLES.items():
        i = get(f"ggml.{name}_token_id")
        if i is not None and i < len(tokens):
            config[f"{role}_token"] = tokens[i]
    return kind, write(path, tokens, types, config, get), config


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
    path: str | os.PathLike,
    tokens: Sequence[str],
    types: Sequence[int],
    config: dict[str, Any],
    get: Callable,
) -> bytes:
    """Make a `tokenizer.json`; tokens that are not text become special tokens."""
    name = get("ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"'{path}' splits text with the pre-tokenizer {name!r}; known are "
            f"{', '.join(PRE_TOKENIZERS)}. Use the model's tokenizer.json instead."
        )
    rule = PRE_TOKENIZERS[name]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        repeated = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"'{path}' has the token {repeated!r} twice; every token must have one id.")
    merges = get("ggml.merges")
    if merges is None:
        raise ValueError(f"'{path}' has no merges (tokenizer.ggml.merges); fetch another file.")
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
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": rule.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule["steps"]},
        "decoder": _byte_level(True),
        "model": model,
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode("utf-8")


def _sentencepiece_file(
    path: str | os.PathLike,
    tokens: Sequence[str],
    types: Sequence[int],
    config: dict[str, Any],
    get: Callable,
) -> bytes:
    """Make a SentencePiece BPE model with the pieces, scores and types of the GGUF file."""
    optional_package("sentencepiece", "SentencePiece vocabularies")
    from sentencepiece import sentencepiece_model_pb2 as proto

    scores = get("ggml.scores", [])
    if len(scores) != len(tokens):
        raise ValueError(
            f"'{path}' has {len(tokens)} tokens and {len(scores)} scores; each token needs one."
        )
    model = proto.ModelProto()
    for token, score, kind in zip(tokens, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    for role in _ROLES:
        if f"{role}_token" in config:
            setattr(trainer, f"{role}_piece", config[f"{role}_token"])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = get("ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = get("ggml.remove_extra_whitespaces", False)
    return model.SerializeToString(deterministic=True)


_WRITERS = {
    "gpt2": ("byte_pair", _byte_pair_file),
    "llama": ("sentencepiece", _sentencepiece_file),
}
