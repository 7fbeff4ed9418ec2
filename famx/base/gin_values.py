"""Checks of the values that a gin configuration binds, against the annotations of what they go to."""

import copy
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gin import config as gin_config

from famx.base.gin_checks import macro_name, short
from famx.base.values import SettingError, Unbuilt, annotations, check

_MACRO, _CONSTANT = "gin.macro", "gin.constant"


def check_bindings(unneeded: Sequence[str] = ()) -> None:
    """Checks every bound value, those of macros where they are used.

    A reference such as @name() is checked by the class that it names, or by what the function says that
    it returns.

    Args:
      unneeded: macros that were not set and became None.

    Raises:
      SettingError: a value is not what the annotation of its parameter allows.
    """
    for (scope, selector), params in gin_config._CONFIG.items():
        configurable = gin_config._REGISTRY.get(selector)
        if selector in (_MACRO, _CONSTANT) or configurable is None:
            continue
        known = annotations(configurable.wrapped)
        for param, bound in params.items():
            if param in known and macro_name(bound) not in unneeded:
                where = f"{scope}/{short(selector)}.{param}".removeprefix("/")
                _check(where, bound, known[param])


def _check(where: str, bound: Any, annotation: Any) -> None:
    try:
        check(where, _value(bound), annotation)
    except SettingError as error:
        raise error.renamed(*_origin(where, bound, error.path)) from None


def _value(bound: Any) -> Any:
    """A bound value with macros replaced by what they stand for, and references by `Unbuilt`."""
    if isinstance(bound, gin_config.ConfigurableReference):
        if (name := macro_name(bound)) is not None:
            return _value(_macro(name))
        if bound.configurable.selector == _CONSTANT:
            return copy.deepcopy(bound)  # gin puts the constant in its place
        return Unbuilt(repr(bound), _kind(bound), bound.evaluate)
    if isinstance(bound, Mapping):
        return {_value(key): _value(item) for key, item in bound.items()}
    if isinstance(bound, list | tuple):
        return type(bound)(map(_value, bound))
    return bound


def _macro(name: str) -> Any:
    return gin_config._CONFIG[name, _MACRO]["value"]


def _kind(reference: gin_config.ConfigurableReference) -> type | None:
    """Type of what a reference makes; None if the function does not say it."""
    target = inspect.unwrap(reference.configurable.wrapped)
    if isinstance(target, type):
        return target
    try:
        kind = typing.get_type_hints(target).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    return kind if isinstance(kind, type) and not getattr(kind, "_is_protocol", False) else None


def _origin(where: str, bound: Any, path: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """The name under which the user set a part of a bound value, and the path from there.

    That is the last macro on the way, or else the parameter.
    """
    name, start = where, 0
    for i in range(len(path) + 1):
        while (macro := macro_name(bound)) is not None:
            name, start, bound = macro, i, _macro(macro)
        if i < len(path):
            bound = bound.get(path[i]) if isinstance(bound, Mapping) else bound[path[i]]
    return name, path[start:]

