"""Typed reading of files that others wrote: limits first, then types, and one sentence for each fault.

A file is read only up to a limit of bytes, so that nothing is allocated for what it merely claims. JSON
is parsed with a limit of nesting. Fields are checked by pydantic models, subclasses of `Fields`, which
stand next to their readers: strict types (no text for a number, no bool for an int), ranges, lengths.
Every fault is a ConfigError that names the file and the field.
"""

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic

from famx.base.errors import ConfigError
from famx.base.files import as_path

MOST_JSON_BYTES = 64 << 20  # of a file of settings; tokenizer files and headers have their own limits
MOST_NESTING = 64  # of objects and lists in JSON
MOST_SHOWN = 60  # characters of a value in a sentence

Name = Annotated[str, pydantic.Field(max_length=512)]
FieldsT = TypeVar("FieldsT", bound="Fields")


class Fields(pydantic.BaseModel):
    """Base of the models of files: strict types, finite numbers; what is not declared is ignored."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


def read_limited(file: str | os.PathLike, most_bytes: int) -> bytes:
    """Content of a file that may have at most `most_bytes`.

    Raises:
      ConfigError: it cannot be read, is no regular file, or is larger.
    """
    file = as_path(file)
    try:
        if file.exists() and not file.is_file():  # a pipe or a device would never end
            raise ConfigError(f"{file} is not a regular file.")
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    if len(content) > most_bytes:
        raise ConfigError(f"{file} is larger than {most_bytes:,} bytes, which no such file is.")
    return content


def read_object(file: str | os.PathLike, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; see `parse_object`."""
    return parse_object(read_limited(file, most_bytes), file)


def parse_object(content: bytes | str, name: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in `content`.

    Args:
      content: JSON in UTF-8.
      name: name of the file, for sentences.

    Raises:
      ConfigError: it is not JSON, not an object, or is nested more than `MOST_NESTING` deep.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ConfigError(f"{name} is damaged: it is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of too many digits
        raise ConfigError(f"{name} is damaged: it is not readable as JSON; download it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is damaged: it must hold a JSON object; download it again.")
    level: list[Any] = [value]
    for _ in range(MOST_NESTING):
        level = [
            inner for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]  # fmt: skip
        if not level:
            return value
    raise ConfigError(f"{name} is damaged: it is nested more than {MOST_NESTING} deep.")


def parsed(kind: type[FieldsT], value: Any, name: str | os.PathLike) -> FieldsT:
    """`value`, as JSON holds it, as an instance of `kind`.

    Args:
      kind: the model.
      value: usually a dict.
      name: name of the file, for sentences.

    Raises:
      ConfigError: a field is missing, or has another type or a value out of range; names the first such
        field and its value.
    """
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{name} is not valid: {_fault(error, value)}.") from error


def parsed_as(kind: Any, value: Any, name: str | os.PathLike, field: str = "") -> Any:
    """`value` as the type `kind`, strictly; for what is not an object. See `parsed`.

    Args:
      kind: a type or an annotated one.
      value: any value.
      name: name of the file, for sentences.
      field: name of the field that holds the value.
    """
    adapter = pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{name} is not valid: {_fault(error, value, field)}.") from error


def shown(value: Any, most: int = MOST_SHOWN) -> str:
    """A value as Python writes it, for a sentence: one line, without control characters, cut if long."""
    if isinstance(value, str):
        text = repr(value[: most + 1])
    elif isinstance(value, list | tuple | dict) and len(value) > 8:
        kind = "an object" if isinstance(value, Mapping) else "a list"
        return f"{kind} of {len(value):,} entries"
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an int of thousands of digits
            return f"a value of type {type(value).__name__}"
    text = "".join(x if x.isprintable() else "?" for x in text[: most + 2])
    return text if len(text) <= most else f"{text[:most]}..."


def _fault(error: pydantic.ValidationError, value: Any, field: str = "") -> str:
    """What the first errors of a validation say, as a clause: 'vocab_size is -1: it should be ...'."""
    errors = error.errors(include_url=False, include_context=False, include_input=True)
    # Of the branches of a union, the one that fits best goes deepest before it fails.
    errors.sort(key=lambda e: -len(_place(e["loc"], value)[0]))
    place, given = _place(errors[0]["loc"], value)
    same = [e for e in errors if _place(e["loc"], value)[0] == place]  # of all branches of a union
    name = ".".join(filter(None, [field, *map(str, place)])) or "the content"
    name = "".join(x if x.isprintable() else "?" for x in name[:200])
    if errors[0]["type"] == "missing":
        return f"{name + '.' if place or field else ''}{errors[0]['loc'][-1]} is missing"
    texts = dict.fromkeys(
        e["msg"].replace("Input should", "it should").replace("Value error, ", "") for e in same
    )
    return f"{name} is {shown(given)}: {', or '.join(list(texts)[:3])}"


def _place(loc: tuple[int | str, ...], value: Any) -> tuple[tuple[int | str, ...], Any]:
    """The part of an error's location that exists in the value, and what is there.

    A location also holds names of the branches of a union, which no reader of the file knows.
    """
    place: list[int | str] = []
    for step in loc:
        inside = isinstance(value, Mapping) and step in value
        if not inside and isinstance(value, list | tuple) and isinstance(step, int):
            inside = step < len(value)
        if inside:
            place.append(step)
            value = value[step]
    return tuple(place), value
