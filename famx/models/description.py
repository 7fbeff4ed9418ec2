"""Checks of a model that a file describes: types of its fields, and sizes that some model could have.

The fields of `model.json`, and of the settings of a memory in adapters and exports, are those of
dataclasses (`DecoderConfig`, a memory, `Lora`), whose annotations say their types. The dataclasses
themselves check that values fit together.
"""

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from famx.base.errors import ConfigError
from famx.base.untrusted import Fields, parsed, shown
from famx.lora import Lora
from famx.modules import frontends
from famx.modules import memory as memories
from famx.modules.config import DecoderConfig, RopeScaling
from famx.modules.frontends import Frontend
from famx.modules.heads import Values
from famx.modules.memory import Memory

# Largest values of fields that arrays and loops are made of; far above any model.
_MOST = {
    "num_layers": 10_000, "vocab_size": 1 << 24, "embed_dim": 1 << 20, "mlp_dim": 1 << 24,
    "num_heads": 1 << 16, "num_kv_heads": 1 << 16, "head_dim": 1 << 16, "block_size": 1 << 24,
    "memory_segments": 1 << 16, "length": 1 << 20, "rank": 1 << 14, "adapter_rank": 1 << 14,
    "width": 1 << 20, "hidden": 1 << 20, "sizes": 1 << 24,
}  # fmt: skip
_MOST_OTHER = 1 << 48


def check_description(fields: Mapping[str, Any], name: str | os.PathLike) -> None:
    """Check fields of a `DecoderConfig`, and of `lora` if it is among them.

    Fields and kinds of memory that this version does not know are left to the dataclasses, which name
    them.

    Args:
      fields: some or all of the fields, as JSON holds them.
      name: name of the file, for sentences.

    Raises:
      ConfigError: a field is not of its type, or larger than in any model; names it.
    """
    _check(DecoderConfig, fields, name)
    for key, kind in (("rope_scaling", RopeScaling), ("lora", Lora), ("values", Values)):
        if fields.get(key) is not None:
            _check(kind, _object(fields[key], name, key), name, f"{key}.")
    if fields.get("memory") is not None:
        memory = _object(fields["memory"], name, "memory")
        if not isinstance(memory.get("kind"), str | None):
            raise ConfigError(f"{name} is not valid: memory.kind is {shown(memory['kind'])}.")
        try:
            kind = type(memories.from_dict(memory))
        except (TypeError, ValueError):  # a kind, or a field of it, that is not known here
            return
        _check(kind, memory, name, "memory.")
    if fields.get("frontend") is not None:
        _check_frontend(fields["frontend"], name, "frontend")


def _check_frontend(fields: Any, name: str | os.PathLike, key: str) -> None:
    """Checks the fields of a frontend, and of the parts of a mixed one."""
    fields = _object(fields, name, key)
    parts = fields.get("parts", [])
    if not isinstance(fields.get("kind"), str) or not isinstance(parts, list):
        raise ConfigError(f"{name} is not valid: {key} has no kind, or its parts are no list.")
    for i, part in enumerate(parts):
        _check_frontend(part, name, f"{key}.parts[{i}]")
    kind = frontends.kinds().get(fields["kind"])
    if kind is not None:
        _check(kind, {x: y for x, y in fields.items() if x != "parts"}, name, f"{key}.")


def _object(value: Any, name: str | os.PathLike, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is not valid: {field} is {shown(value)}: it should be an object.")
    return value


def _check(kind: type, fields: Mapping[str, Any], name: str | os.PathLike, prefix: str = "") -> None:
    try:
        parsed(_model_of(kind), dict(fields), name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("valid: ", f"valid: {prefix}", 1)) from error
    known = {field.name for field in dataclasses.fields(kind)}
    for key in known & fields.keys():
        value, most = fields[key], _MOST.get(key, _MOST_OTHER)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(x, int | float) and abs(x) > most for x in numbers):
            raise ConfigError(
                f"{name} is not valid: {prefix}{key} is {shown(value)}, beyond {most:,}."
            )


@functools.cache
def _model_of(kind: type) -> type[Fields]:
    """The model of a dataclass, in which every field may be missing."""
    hints = typing.get_type_hints(kind)
    fields = {x.name: (_in_json(hints[x.name]), None) for x in dataclasses.fields(kind)}
    return pydantic.create_model(kind.__name__, __base__=Fields, **fields)


def _in_json(hint: Any) -> Any:
    """The type of what JSON holds for a field: lists for tuples, objects for dataclasses."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return functools.reduce(lambda a, b: a | b, map(_in_json, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]] | str
    if isinstance(hint, type) and (issubclass(hint, Memory | Frontend) or dataclasses.is_dataclass(hint)):
        return dict[str, Any]
    return hint
