"""Names of famx's classes and functions in the bindings of a command line.

A gin file makes a name known to gin by its import; a binding such as
`--gin.DecoderConfig.memory=@modules.Memory()` has no imports. A name is looked up as a gin file would
import it, `modules.Memory` from famx/modules, and a name alone among what famx has imported so far.
"""

import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import gin
from gin import config as gin_config

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_OTHER_PROGRAMS = "t5x"  # a package of famx whose names are those of another engine


def with_known_names(binding: str) -> str:
    """A binding whose names gin knows, since what they name was registered.

    Args:
      binding: `NAME = VALUE` in gin's syntax.

    Returns:
      The binding. Names of what gin knows by another name are replaced by that.
    """
    key, equals, value = binding.partition("=")
    scope, slash, name = key.strip().rpartition("/")
    target, dot, parameter = name.rpartition(".")
    if dot:
        key = f"{scope}{slash}{_known(target)}.{parameter} "
    value = re.sub(rf"(@(?:\w+/)*)({_NAME})", lambda match: match[1] + _known(match[2]), value)
    return f"{key}{equals}{value}"


def _known(name: str) -> str:
    """A name by which gin knows what `name` names; `name` itself if nothing is found."""
    if not re.fullmatch(_NAME, name) or gin_config._REGISTRY.matching_selectors(name):
        return name
    found = list({id(target): target for target in _targets(name)}.values())
    if len(found) != 1:
        return name
    (target,) = found
    existing = gin_config._inverse_lookup(target)
    if existing is not None:
        return existing.selector
    gin.external_configurable(target, module=target.__module__)
    return f"{target.__module__}.{target.__name__}"


def _targets(name: str) -> Iterator[Any]:
    """Classes and functions of famx that a name may mean."""
    module, _, last = name.rpartition(".")
    for found in _modules(module) if module else _imported():
        target = inspect.unwrap(vars(found).get(last, None) or found)
        if isinstance(target, type) or inspect.isfunction(target):
            if target.__module__.partition(".")[0] == "famx":
                yield target


def _modules(path: str) -> Iterator[Any]:
    """Modules of famx whose dotted name ends with a path."""
    package = pathlib.Path(__file__).parents[1]
    tail = path.removeprefix("famx.").replace(".", "/")
    for file in sorted([*package.rglob(f"{tail}.py"), *package.rglob(f"{tail}/__init__.py")]):
        parts = file.relative_to(package.parent).with_suffix("").parts
        if _OTHER_PROGRAMS not in parts:
            yield importlib.import_module(".".join(parts).removesuffix(".__init__"))


def _imported() -> list[Any]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("famx.") and module]
