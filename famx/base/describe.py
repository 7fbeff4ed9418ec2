"""Settings as values that JSON can hold: of dataclasses, functions, optimisers and schedules.

A function that returns a function, or an optax transformation, forgets the arguments of its call.
`remembers` keeps them on the result. Of a function made elsewhere, the variables that it closes over are
described.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gin
import numpy as np

_DEEPEST = 16  # levels of nested values; what lies deeper is described by its type alone
_LONGEST = 10_000  # items of a list that are described
_SHOWN = 80  # characters of a value in a sentence


class Difference(NamedTuple):
    """A setting that differs between two descriptions.

    Attributes:
      name: name of the setting, with the names around it: "optimizer.learning_rate".
      was: value in the first description, `UNSET` if it has none.
      now: value in the second one.
    """

    name: str
    was: Any
    now: Any

    def __str__(self):
        return f"{self.name} was {shown(self.was)} and is now {shown(self.now)}"


UNSET = object()  # value of a setting that a description does not have


def remembers(function: Callable) -> Callable:
    """Decorator: the result of the function gets an attribute `settings`, its name and arguments.

    The result is a function, which gets the attribute, or a named tuple, in place of which an equal one
    is returned that has it.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        made = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if isinstance(made, tuple):
            cls = type(made)
            made = type(cls.__name__, (cls,), {"__module__": cls.__module__})(*made)
        made.settings = {"type": function.__name__, **bound.arguments}
        return made

    return wrapped


def describe(value: Any) -> Any:
    """`value` as JSON values; what has no JSON form becomes the name of its type.

    Dataclasses, functions and what `remembers` made become dicts with a "type". An array or a vocabulary
    becomes a text with a digest.
    """
    return _describe(value, ())


def _describe(value: Any, around: tuple[int, ...]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return value.__name__
    if id(value) in around or len(around) > _DEEPEST:
        return type(value).__name__
    inner = lambda x: _describe(x, (*around, id(value)))
    fields = _fields(value)
    if fields is not None:
        return {name: inner(x) for name, x in fields.items()}
    if isinstance(value, list | tuple):
        return [inner(x) for x in value] if len(value) <= _LONGEST else f"{len(value)} items"
    if isinstance(value, set | frozenset):
        return sorted((inner(x) for x in value), key=str)
    if hasattr(value, "fingerprint") and hasattr(value, "vocab_size"):
        parts = (value.fingerprint, getattr(value, "chat_template", None))
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return f"{value.kind}, {value.vocab_size} ids, {digest}"
    if hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "__array__"):
        digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:16]
        return f"{value.dtype}{list(value.shape)}, {digest}"
    return getattr(value, "__name__", type(value).__name__)


def _fields(value: Any) -> dict[str, Any] | None:
    """What a value is made of, by name; None for one that is no composite with names."""
    settings = getattr(value, "settings", None)
    if isinstance(settings, Mapping) and "type" in settings:
        return dict(settings)
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"type": type(value).__name__, **value._asdict()}
    if isinstance(value, functools.partial):
        given = {"arguments": value.args} if value.args else {}
        return {"type": "partial", "function": value.func, **given, **value.keywords}
    if hasattr(value, "__wrapped__"):  # by gin: what it binds is passed when the function is called
        with contextlib.suppress(ValueError):
            bound = gin.get_bindings(value)
            return {"type": value.__name__, **bound} if bound else None
        return _fields(value.__wrapped__)
    code = getattr(value, "__code__", None)
    if code is not None and value.__closure__:
        cells = zip(code.co_freevars, value.__closure__, strict=True)
        return {"type": value.__qualname__, **{name: _content(cell) for name, cell in cells}}
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def differences(was: Any, now: Any, name: str = "") -> Iterator[Difference]:
    """The settings in which two descriptions differ.

    Of two values of different types, only the types are named.
    """
    join = lambda key: f"{name}.{key}" if name else str(key)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        if was.get("type") != now.get("type"):
            yield Difference(name, was, now)
            return
        for key in dict.fromkeys([*was, *now]):
            yield from differences(was.get(key, UNSET), now.get(key, UNSET), join(key))
    elif _holds_dicts(was) and _holds_dicts(now) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            yield from differences(a, b, join(i))
    elif was is not now and was != now:
        yield Difference(name, was, now)


def _holds_dicts(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(x, Mapping | list) for x in value)


def names_in(described: Any, name: str = "") -> Iterator[str]:
    """The names of all settings of a description, those that contain others included."""
    if name:
        yield name
    items: Any = ()
    if isinstance(described, Mapping):
        items = described.items()
    elif _holds_dicts(described):
        items = enumerate(described)
    for key, value in items:
        yield from names_in(value, f"{name}.{key}" if name else str(key))


def shown(value: Any) -> str:
    """A described value in a sentence, shortened."""
    if value is UNSET:
        return "unset"
    if isinstance(value, Mapping):
        return str(value.get("type", dict(value)))[:_SHOWN]
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
