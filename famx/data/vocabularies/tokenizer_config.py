"""Files that stand next to a tokenizer at Hugging Face: what they say about special and added tokens.

`tokenizer_config.json` names the special tokens, lists added tokens by id and has the chat template,
unless `chat_template.jinja` has it; `added_tokens.json` and `special_tokens_map.json` are older places
for the same. Added tokens may lie beyond a SentencePiece model, which knows nothing of them.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.untrusted import Fields, Name, parsed, read_limited, read_object, shown
from famx.data.vocabularies.special_tokens import MOST_SPECIAL, MOST_TOKEN, MOST_TOKENS, AddedToken

MOST_TOKENIZER_BYTES = 256 << 20
MOST_TEMPLATE = 1 << 20  # characters of a chat template
ROLES = ("pad", "bos", "eos", "unk")

_Text = Annotated[str, Field(max_length=MOST_TOKEN)]
_Template = Annotated[str, Field(max_length=MOST_TEMPLATE)]


class _Token(Fields):
    """A token as `tokenizer_config.json` describes it."""

    content: Annotated[str, Field(min_length=1, max_length=MOST_TOKEN)]
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


_Texts = Annotated[list[_Text | _Token], Field(max_length=MOST_SPECIAL)]


class _SpecialTokens(Fields):
    pad_token: _Text | _Token | None = None
    bos_token: _Text | _Token | None = None
    eos_token: _Text | _Token | None = None
    unk_token: _Text | _Token | None = None
    additional_special_tokens: _Texts | None = None


class _NamedTemplate(Fields):
    name: Name
    template: _Template


_ById = dict[Annotated[str, Field(max_length=10, pattern="^[0-9]+$")], _Token]


class _ConfigFile(_SpecialTokens):
    chat_template: _Template | Annotated[list[_NamedTemplate], Field(max_length=64)] | None = None
    added_tokens_decoder: Annotated[_ById, Field(max_length=MOST_SPECIAL)] | None = None
    legacy: bool | None = None
    add_prefix_space: bool | None = None


class _AddedTokens(Fields):
    """`added_tokens.json`: ids by text."""

    tokens: dict[_Text, Annotated[int, Field(ge=0, lt=MOST_TOKENS)]]


class _Step(Fields):
    type: Name | None = None
    prepend_scheme: Name | None = None
    normalizers: list[dict[str, Any]] | None = None
    pretokenizers: list[dict[str, Any]] | None = None


class _FastFile(Fields):
    """The parts of a `tokenizer.json` that matter next to a SentencePiece model."""

    added_tokens: Annotated[list[AddedToken], Field(max_length=MOST_SPECIAL)] = []
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """What the files around a tokenizer say.

    Attributes:
      names: texts of the special tokens by role, as `{"eos": "</s>"}`; roles without a token are missing.
      chat_template: source of the chat template, or None.
      added: added tokens, in the order of their ids.
      prefix_space: where a SentencePiece model puts a space before a text: "always", at the beginning
        and after each special token; "first", only at the beginning; "never". None: the model decides.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    added: tuple[AddedToken, ...] = ()
    prefix_space: str | None = None


def read_tokenizer_config(folder: pathlib.Path, fast: pathlib.Path | None = None) -> TokenizerConfig:
    """Read the files in a folder.

    Args:
      folder: the folder; any of its files may be missing.
      fast: a `tokenizer.json` that describes the same tokenizer as a SentencePiece model, or None.

    Raises:
      ConfigError: a file is damaged, a field is not of its type, or two files give a token two ids.
    """
    file = folder / "tokenizer_config.json"
    config = parsed(_ConfigFile, read_object(file), file) if file.is_file() else _ConfigFile()
    template = config.chat_template
    if isinstance(template, list):  # several, by name
        template = next((entry.template for entry in template if entry.name == "default"), None)
    if (separate := folder / "chat_template.jinja").is_file():
        template = _template(separate)
    sources: list[tuple[str, list[AddedToken]]] = []
    if config.added_tokens_decoder:
        listed = [_added(file, i, token) for i, token in config.added_tokens_decoder.items()]
        sources.append((file.name, listed))
    special = _special(config)
    older = folder / "special_tokens_map.json"
    map_ = parsed(_SpecialTokens, read_object(older), older) if older.is_file() else _SpecialTokens()
    special |= _special(map_)
    if (older := folder / "added_tokens.json").is_file():
        ids = parsed(_AddedTokens, {"tokens": read_object(older)}, older).tokens
        if len(ids) > MOST_SPECIAL:
            raise ConfigError(f"{older} lists {len(ids):,} tokens; at most {MOST_SPECIAL:,} are read.")
        listed = [AddedToken(id=i, content=x, special=x in special) for x, i in ids.items() if x]
        sources.append((older.name, listed))
    scheme = None
    if fast is not None and fast.is_file():
        parts = parsed(_FastFile, read_object(fast, MOST_TOKENIZER_BYTES), fast)
        sources.append((fast.name, list(parts.added_tokens)))
        scheme = _scheme(parts)
    if config.add_prefix_space is False:
        scheme = "never"
    elif scheme is None and config.legacy is False:
        scheme = "first"
    names = {}
    for role in ROLES:
        token = getattr(config, f"{role}_token") or getattr(map_, f"{role}_token")
        if token:
            names[role] = token if isinstance(token, str) else token.content
    return TokenizerConfig(names, template or None, merged(folder, sources), scheme)


def merged(
    folder: str | pathlib.Path, sources: Iterable[tuple[str, Iterable[AddedToken]]]
) -> tuple[AddedToken, ...]:
    """The added tokens of several files, each with a name for sentences; the first has precedence.

    Raises:
      ConfigError: a token has two ids, or an id two tokens.
    """
    by_id: dict[int, tuple[AddedToken, str]] = {}
    by_text: dict[str, tuple[AddedToken, str]] = {}
    for name, tokens in sources:
        for token in tokens:
            for other, where in filter(None, (by_id.get(token.id), by_text.get(token.content))):
                if (other.id, other.content) != (token.id, token.content):
                    raise ConfigError(
                        f"{folder}: {name} gives {shown(token.content)} the id {token.id}, and {where}"
                        f" gives {shown(other.content)} the id {other.id}; correct one of them."
                    )
            by_id.setdefault(token.id, (token, name))
            by_text.setdefault(token.content, (token, name))
    return tuple(by_id[i][0] for i in sorted(by_id))


def _template(file: pathlib.Path) -> str:
    try:
        text = read_limited(file, 4 * MOST_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is damaged: it is not UTF-8; download it again.") from error
    if len(text) > MOST_TEMPLATE:
        raise ConfigError(f"{file} has more than {MOST_TEMPLATE:,} characters, which no template has.")
    return text


def _added(file: pathlib.Path, key: str, token: _Token) -> AddedToken:
    if int(key) >= MOST_TOKENS:
        raise ConfigError(f"{file} is not valid: the id {key} in added_tokens_decoder is too large.")
    return AddedToken(id=int(key), **token.model_dump())


def _special(tokens: _SpecialTokens) -> set[str]:
    """The texts of all special tokens that a file names."""
    named = [getattr(tokens, f"{role}_token") for role in ROLES]
    named += tokens.additional_special_tokens or []
    return {token if isinstance(token, str) else token.content for token in named if token}


def _scheme(parts: _FastFile) -> str | None:
    """`TokenizerConfig.prefix_space` of a `tokenizer.json`; None if it does not say."""
    steps = [step.model_dump() for step in (parts.normalizer, parts.pre_tokenizer) if step]
    text = json.dumps(steps, default=str)
    if re.search(r'"type": "Prepend"', text):
        return "always"
    match = re.search(r'"prepend_scheme": "(always|first|never)"', text)
    return match[1] if match else None
