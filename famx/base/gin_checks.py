"""Checks of a parsed gin configuration: nothing unused, nothing unset."""

from collections.abc import Sequence
from typing import Any

import gin
from gin import config as gin_config

from famx.base import gin_overrides
from famx.base.errors import ConfigError
from famx.base.gin_overrides import references
from famx.base.text import nearest as nearest  # part of this module's interface

_MACRO = "gin.macro"


def check_macros() -> None:
    """Raises ConfigError for a macro that is set and not used, or used and not set."""
    values, used = _macros()
    replaced = gin_overrides.current.all_replaced()
    for name, value in values.items():
        replaced_reader = f"%{name}" in replaced and not _commanded(name, _MACRO, "value")
        if name not in used and not replaced_reader and not _is_required(value):
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


def check_all_used(ignore: Sequence[str] = ()) -> list[str]:
    """Checks that every bound parameter was used by a call made so far.

    To be called once everything configurable has been built. It catches what parsing cannot: a
    parameter of a function that this run never calls, or that its caller overrides. A parameter that is
    bound to nothing but a macro is exempt if a parameter in use is bound to the same macro: run files
    bind LEARNING_RATE for every optimiser. Parameters that a file binds are exempt if a later binding
    took the place of what they configure, as `--gin.OPTIMIZER=@optimizers.lion()` does of AdamW.

    Args:
      ignore: names of configurables that are called only later.

    Returns:
      Sentences for the log: what the command line replaced.

    Raises:
      ConfigError: a binding has no effect.
    """
    called = gin_config._OPERATIVE_CONFIG
    selectors = {name for _, name in called}

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
    replaced = gin_overrides.current.all_replaced()
    forgiven: dict[str, str] = {}
    for scope, selector, param, value in bindings:
        if short(selector) in ignore or macro_name(value) in macros or used(scope, selector, param):
            continue
        name = f"{scope}/{short(selector)}" if scope else short(selector)
        given = _commanded(scope, selector, param) or _commanded(macro_name(value) or "", _MACRO, "value")
        if selector in replaced and selector not in selectors and not given:
            forgiven.setdefault(selector, f"{name}.{param}")
            continue
        raise ConfigError(
            f"The binding {name}.{param} has no effect in this run: {short(selector)} is"
            " not called with it. Remove the binding, or select the component that it configures."
        )
    return [
        f"{_name(replaced[selector])} is replaced: the settings of {short(selector)} in the gin files,"
        f" such as {example}, have no effect."
        for selector, example in forgiven.items() if _commanded(*replaced[selector])
    ]  # fmt: skip


def _commanded(scope: str, selector: str, param: str) -> bool:
    return (scope, selector, param) in gin_overrides.current.commanded


def _name(key: gin_overrides.Key) -> str:
    """A binding as the user writes it."""
    scope, selector, param = key
    return scope if selector == _MACRO else f"{scope}/{short(selector)}.{param}".removeprefix("/")


def flag_of(parameter: str) -> str:
    """The flag, without a value, that changes a parameter: that of a macro if it is bound to one.

    Args:
      parameter: the parameter, such as `warmup_cosine.warmup_steps`.
    """
    target, _, name = parameter.rpartition(".")
    for (scope, selector), params in gin_config._CONFIG.items():
        if not scope and short(selector) == target and (macro := macro_name(params.get(name))):
            return f"--gin.{macro}"
    return f"--gin.{parameter}"


def short(selector: str) -> str:
    """Last part of a selector: 'famx.training.optimizers.adamw' -> 'adamw'."""
    return selector.rsplit(".", 1)[-1]


def not_set(name: str) -> str:
    """Sentence for a macro or parameter without a value."""
    example = "VALUE"
    if name.lower().endswith(("_dir", "_path")):
        example = "/some/dir"
    elif name.lower().endswith("_file"):
        example = "/some/file"
    elif name.lower().endswith("_files"):
        example = "'/some/dir/*.txt'"
    return f"{name} is not set: add --gin.{name}={example}."


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
        for reference in references(list(params.values())):
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
