"""Checks of a parsed gin configuration: nothing unused, nothing unset."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config as gin_config

from famx.base.errors import ConfigError
from famx.base.text import nearest as nearest  # part of this module's interface

_MACRO = "gin.macro"
# Base classes of which a run builds one subclass: bindings of the other subclasses do no harm.
_ALTERNATIVES = ("famx.modules.memory.Memory",)


def check_macros() -> None:
    """Raises ConfigError for a macro that is set and not used, or used and not set."""
    values, used = _macros()
    for name, value in values.items():
        if name not in used and not _is_required(value):
            near = nearest(name, list(used))
            raise ConfigError(f"Nothing uses {name}: it is set, but no binding reads it.{near}")
    for name in used:
        if name not in values or _is_required(values[name]):
            near = nearest(name, [other for other in values if other not in used])
            raise ConfigError(not_set(name) + near)


def unset_macros(names: Sequence[str]) -> list[str]:
    """Returns the names, of those given, of macros that a binding uses and that have no value."""
    values, used = _macros()
    return [name for name in names if name in used and _is_required(values.get(name, gin.REQUIRED))]


def check_required() -> None:
    """Raises ConfigError for a parameter still bound to %gin.REQUIRED."""
    for (scope, selector), params in gin_config._CONFIG.items():
        for param, value in params.items():
            if selector != _MACRO and _is_required(value):
                raise ConfigError(not_set(f"{scope}/{short(selector)}.{param}".removeprefix("/")))


def check_all_used(ignore: Sequence[str] = ()) -> None:
    """Checks that every bound parameter was used by a call made so far.

    To be called once everything configurable has been built. It catches what parsing cannot: a
    parameter of a function that this run never calls, or that its caller overrides. A parameter that is
    bound to nothing but a macro is exempt if a parameter in use is bound to the same macro: run files
    bind LEARNING_RATE for every optimiser. Parameters of a memory that was never built are exempt if
    another memory was: model files bind those of their default memory, which a run may replace.

    Args:
      ignore: names of configurables that are called only later.

    Raises:
      ConfigError: a binding has no effect.
    """
    called = gin_config._OPERATIVE_CONFIG

    def used(scope, selector, param):
        return any(
            selector == other and param in params and scope in _outer(inside)
            for (inside, other), params in called.items()
        )

    bindings = [
        (scope, selector, param, value)
        for (scope, selector), params in gin_config._CONFIG.items()
        for param, value in params.items()
        if selector != _MACRO
    ]
    macros = {macro_name(value) for *where, value in bindings if used(*where)} - {None}
    for scope, selector, param, value in bindings:
        if short(selector) not in ignore and macro_name(value) not in macros:
            if not used(scope, selector, param) and not _replaced(selector, called):
                name = f"{scope}/{short(selector)}" if scope else short(selector)
                raise ConfigError(
                    f"The binding {name}.{param} has no effect in this run: {short(selector)} is"
                    " not called with it. Remove the binding, or select the component that it configures."
                )


def _replaced(selector: str, called: Mapping[tuple[str, str], Any]) -> bool:
    """Whether the class `selector` was never built, but an alternative to it was."""
    selectors = {name for _, name in called}
    built = [_class_of(name) for name in selectors]
    bases = [
        base
        for base in getattr(_class_of(selector), "__mro__", ())[1:]
        if f"{base.__module__}.{base.__qualname__}" in _ALTERNATIVES
    ]
    return selector not in selectors and any(
        cls is not None and issubclass(cls, base) for cls in built for base in bases
    )


def _class_of(selector: str) -> type | None:
    """Class that a selector names; None: it names a function, or nothing."""
    wrapped = getattr(gin_config._REGISTRY.get(selector), "wrapped", None)
    return wrapped if isinstance(wrapped, type) else None


def short(selector: str) -> str:
    """Last part of a selector: 'famx.training.optimizers.adamw' -> 'adamw'."""
    return selector.rsplit(".", 1)[-1]


def not_set(name: str) -> str:
    """Sentence for a macro or parameter without a value."""
    example = "VALUE"
    if name.lower().endswith(("_dir", "_path")):
        example = "\"'/some/dir'\""
    elif name.lower().endswith("_files"):
        example = "\"'/some/dir/*.txt'\""
    return f"{name} is not set: add --gin.{name}={example}."


def _references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _references(key)
            yield from _references(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _references(item)


def macro_name(value: Any) -> str | None:
    """Name of the macro if a value is a reference to one and nothing else."""
    if isinstance(value, gin_config.ConfigurableReference) and value.configurable.selector == _MACRO:
        return "/".join(value.scopes)
    return None


def _macros() -> tuple[dict[str, Any], dict[str, None]]:
    """Returns the value of every macro that is set, by name, and the names that bindings use."""
    values = {s: p["value"] for (s, sel), p in gin_config._CONFIG.items() if sel == _MACRO}
    used: dict[str, None] = {}
    for params in gin_config._CONFIG.values():
        for reference in _references(list(params.values())):
            if reference.configurable.selector == _MACRO:
                used["/".join(reference.scopes)] = None
    return values, used


def _is_required(value: Any) -> bool:
    if not isinstance(value, gin_config.ConfigurableReference):
        return value is gin.REQUIRED
    name = "/".join(value.scopes)
    return value.configurable.selector == "gin.constant" and name == "gin.REQUIRED"


def _outer(scope: str) -> list[str]:
    """Scopes whose bindings apply inside `scope`: 'a/b' -> ['', 'a', 'a/b']."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]
