"""What later bindings of a gin configuration took the place of.

    OPTIMIZER = @optimizers.adamw()    in a file, with optimizers.adamw.weight_decay = 0.01
    --gin.OPTIMIZER=@optimizers.lion() on the command line

The settings of adamw then have no effect, and that is no mistake: what the command line gives replaces
what the file names. `recorded` notes such replacements while a configuration is parsed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from gin import config as gin_config

_MACRO = "gin.macro"
Key = tuple[str, str, str]  # scope, selector, parameter


@dataclasses.dataclass
class Overrides:
    """Replacements in one configuration.

    Attributes:
      replaced: by the selector of what a binding named, or `%NAME` for a macro, the binding that took its
        place.
      commanded: the bindings of the command line: they must have an effect.
      commanding: whether those that are parsed now are.
    """

    replaced: dict[str, Key] = dataclasses.field(default_factory=dict)
    commanded: set[Key] = dataclasses.field(default_factory=set)
    commanding: bool = False

    def all_replaced(self) -> dict[str, Key]:
        """`replaced`, and whatever the bindings of those name in turn."""
        found = dict(self.replaced)
        todo = list(found)
        while todo:
            name = todo.pop()
            for (scope, selector), params in gin_config._CONFIG.items():
                if name in (selector, _name(scope, selector)):
                    new = [x for x in named(list(params.values())) if x not in found]
                    found.update(dict.fromkeys(new, found[name]))
                    todo += new
        return found


current = Overrides()  # of the configuration that was parsed last


@contextlib.contextmanager
def recorded() -> Iterator[Overrides]:
    """A context in which gin's bindings are recorded in `current`, which begins empty."""
    global current
    current = overrides = Overrides()
    bind = gin_config.bind_parameter

    def bind_and_record(key: Any, value: Any) -> None:
        parsed = gin_config.ParsedBindingKey.parse(key)
        old = gin_config._CONFIG.get(parsed.config_key, {}).get(parsed.arg_name)
        bind(parsed, value)
        if overrides.commanding:
            overrides.commanded.add(parsed.scope_selector_arg)
        kept = set(named(value))
        for name in named(old):
            if name not in kept:
                overrides.replaced[name] = parsed.scope_selector_arg
        for name in kept:
            overrides.replaced.pop(name, None)

    gin_config.bind_parameter = bind_and_record
    try:
        yield overrides
    finally:
        gin_config.bind_parameter = bind


def named(value: Any) -> Iterator[str]:
    """Selectors of the configurables that a value refers to, and names of macros as `%NAME`."""
    for reference in references(value):
        yield _name("/".join(reference.scopes), reference.configurable.selector)


def _name(scope: str, selector: str) -> str:
    return f"%{scope}" if selector == _MACRO else selector


def references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    """All references in a value, those within dicts and lists included."""
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(key)
            yield from references(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from references(item)
