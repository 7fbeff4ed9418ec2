"""The one place that knows which values a setting may have: its annotation.

`check_arguments` compares values with the annotations of a function, a dataclass or a flax module, and
`checked` makes a function or class do so at every call. `famx.base.gin_values` does it for all that gin
binds. An annotation is a type of Python's with ranges of `famx.base.ranges`; `Any` allows anything, as
does a missing one.

Types are strict: 4.0, '4' and True are no whole numbers, and None is allowed only where it is named. A
whole number is a number, lists and tuples stand for each other, and scalars of numpy and jax count as
what they hold. Values are only checked, and passed on as they are, but in paths `~` is expanded.

Examples:
  >>> from famx.base.ranges import Positive
  >>> check("BATCH_SIZE", "4", Positive)
  Traceback (most recent call last):
  famx.base.values.SettingError: BATCH_SIZE must be a whole number of at least 1, not '4'.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import os
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from famx.base.errors import ConfigError
from famx.base.expectations import expectation
from famx.base.ranges import Expected, LocalPath, OneOf, Test
from famx.base.schemas import MAPPINGS, SEQUENCES, UNIONS, fits, is_sequence
from famx.base.schemas import Unbuilt as Unbuilt  # part of this module's interface
from famx.base.text import nearest

_T = TypeVar("_T", bound=Callable[..., Any])


class SettingError(ConfigError):
    """A setting with a value that its annotation does not allow.

    Args:
      name: the setting, as the user writes it.
      complaint: the rest of the sentence.
      path: keys and indices that lead from the setting's value to what is wrong in it.
    """

    def __init__(self, name: str, complaint: str, path: tuple[Any, ...] = ()):
        super().__init__(f"{name}{''.join(f'[{key!r}]' for key in path)} {complaint}")
        self.name, self.complaint, self.path = name, complaint, path

    @property
    def parameter(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def renamed(self, name: str, path: tuple[Any, ...] | None = None) -> "SettingError":
        """The same complaint about the setting `name`, at another path if one is given."""
        return SettingError(name, self.complaint, self.path if path is None else path)


# ---------------------------------------------------------------- checks


def check(name: str, value: Any, annotation: Any) -> Any:
    """Raises SettingError unless a value is what an annotation allows.

    Args:
      name: the setting, for the sentence.
      value: the value.
      annotation: the annotation.

    Returns:
      The value; of a path with `~` at its beginning, the path that it stands for.
    """
    if not fits(annotation, value):
        where, expected, wrong = _blame(annotation, value)
        raise SettingError(name, _complaint(expected, wrong), where)
    if _is_path(annotation) and isinstance(value, str | os.PathLike):
        expanded = os.path.expanduser(value)
        return value if expanded == os.fspath(value) else expanded
    return value


def check_arguments(target: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks values against the annotations of a function or class.

    Args:
      target: the function, class or `functools.partial`.
      given: values by parameter; those of parameters that it does not have are not checked.

    Returns:
      The values, with `~` expanded in paths.

    Raises:
      SettingError: a value is not allowed; the setting is named `Class.parameter`.
    """
    known = annotations(target)
    label = getattr(_unwrapped(target), "__name__", "")
    return {
        key: check(f"{label}.{key}", value, known[key]) if key in known else value
        for key, value in given.items()
    }


@contextlib.contextmanager
def options_named(setting: str, options: Mapping[str, Any]) -> Iterator[None]:
    """A context in which a SettingError about one of `options` is about a part of `setting`.

    Options of a task, for example, reach its class as arguments, and the user wrote TASK_OPTIONS.
    """
    try:
        yield
    except SettingError as error:
        if error.parameter not in options:
            raise
        raise error.renamed(f"{setting}[{error.parameter!r}]") from None


def checked(target: _T) -> _T:
    """Decorator: a function or class that checks its arguments at every call.

    A subclass with an `__init__` of its own, as a dataclass has, needs the decorator too.
    """
    if not isinstance(target, type):
        return typing.cast(_T, _checked(target, target))
    setattr(target, "__init__", _checked(getattr(target, "__init__"), target))  # noqa: B009, B010, mypy
    return target


def _checked(function: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # the call raises a TypeError that names the function
        bound.arguments = check_arguments(target, bound.arguments)
        return function(*bound.args, **bound.kwargs)

    # Gin asks for the parameters without following `__wrapped__`.
    setattr(wrapper, "__signature__", signature)  # noqa: B010, mypy
    return wrapper


def _unwrapped(target: Callable[..., Any]) -> Callable[..., Any]:
    return inspect.unwrap(target.func if isinstance(target, functools.partial) else target)


@functools.cache
def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters of a function, a class or a partial function, by name.

    Parameters without one are left out. None is allowed where it is the default.
    """
    target = _unwrapped(target)
    source: Any = target
    if isinstance(target, type) and not dataclasses.is_dataclass(target):
        source = inspect.unwrap(getattr(target, "__init__"))  # noqa: B009, mypy
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some classes of C have no signature
        return {}
    try:
        hints = typing.get_type_hints(source, include_extras=True)
    except (NameError, TypeError, AttributeError):  # a name that only type checkers see; an object
        hints = {}
    found = {}
    for p in parameters:
        annotation = hints.get(p.name, p.annotation)
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and annotation not in (Any, p.empty):
            found[p.name] = annotation | None if p.default is None else annotation
    return found


# ---------------------------------------------------------------- what is wrong


def _blame(annotation: Any, value: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """The innermost part of a value that does not fit: its keys, its annotation and itself."""
    for inner in _containers(annotation):
        for key, item_annotation, item in _items(inner, value):
            if not fits(item_annotation, item):
                where, expected, wrong = _blame(item_annotation, item)
                return (key, *where), expected, wrong
        if _unknown_key(inner, value) is not None:
            return (), inner, value
    return (), annotation, value


def _containers(annotation: Any) -> Iterator[Any]:
    """The types of containers that an annotation allows; none if it names what it expects itself."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if not any(isinstance(item, Expected) and not item.inside for item in args[1:]):
            yield from _containers(args[0])
    elif origin in UNIONS:
        found = [inner for arg in args for inner in _containers(arg)]
        yield from found if len(found) == 1 else ()
    elif typing.is_typeddict(annotation) or (args and origin in (*MAPPINGS, *SEQUENCES)):
        yield annotation


def _items(annotation: Any, value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Key, annotation and value of the items of a container that may be wrong."""
    origin, args = get_origin(annotation), get_args(annotation)
    if typing.is_typeddict(annotation) or origin in MAPPINGS:
        if isinstance(value, collections.abc.Mapping):
            hints = typing.get_type_hints(annotation, include_extras=True) if origin is None else {}
            for key, item in value.items():
                if origin is not None or key in hints:
                    yield key, hints[key] if origin is None else args[1], item
    elif is_sequence(value):
        every = args[0] if origin is not tuple or args[-1] is Ellipsis else None
        for i, item in enumerate(value):
            if every is not None or i < len(args):
                yield i, args[i] if every is None else every, item


def _complaint(annotation: Any, value: Any) -> str:
    if (own := _test_complaint(annotation, value)) is not None:
        return own
    choices = _choices(annotation)
    hint = ""
    if isinstance(value, str) and choices:
        hint = nearest(value, [choice for choice in choices if isinstance(choice, str)])
    if (unknown := _unknown_key(annotation, value)) is not None:
        known = list(typing.get_type_hints(annotation))
        return f"has no {unknown!r}; choose from {', '.join(known)}.{nearest(str(unknown), known)}"
    if isinstance(value, Unbuilt) and not value.called:
        hint = f" With parentheses, {value}(), it is what that makes."
    return f"must be {expectation(annotation)}, not {_short(value)}.{hint}"


def _test_complaint(annotation: Any, value: Any) -> str | None:
    """The sentence of a test's own, if the annotation has one that the value fails."""
    args = get_args(annotation)
    if get_origin(annotation) in UNIONS:
        return next((c for arg in args if (c := _test_complaint(arg, value)) is not None), None)
    if get_origin(annotation) is Annotated:
        if not fits(args[0], value):
            return _test_complaint(args[0], value)
        tests = (item for item in args[1:] if isinstance(item, Test))
        return next((complaint for test in tests if (complaint := test.complaint(value))), None)
    return None


def _unknown_key(annotation: Any, value: Any) -> Any:
    """A key of a dict that its TypedDict does not have, or None."""
    if not typing.is_typeddict(annotation) or not isinstance(value, collections.abc.Mapping):
        return None
    return next((key for key in value if key not in typing.get_type_hints(annotation)), None)


def _choices(annotation: Any) -> tuple[Any, ...]:
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return args
    if get_origin(annotation) is Annotated:
        own = (item.choices for item in args[1:] if isinstance(item, OneOf))
        return next(own, ()) or _choices(args[0])
    return sum(map(_choices, args), ()) if get_origin(annotation) in UNIONS else ()


def _is_path(annotation: Any) -> bool:
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return any(isinstance(item, LocalPath) for item in args[1:])
    return get_origin(annotation) in UNIONS and any(map(_is_path, args))


def _short(value: Any) -> str:
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = 80
    shorten.maxlevel = 3
    return " ".join(shorten.repr(value).split())
