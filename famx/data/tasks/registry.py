"""Tasks by name.

Examples:
  >>> import famx.data
  >>> task = famx.data.get("passkey_words", digits=2, header=False)
  >>> task.example(0, length=30)["references"]
  ['86']
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from famx.base.errors import ConfigError
from famx.base.text import nearest
from famx.base.values import check_arguments

Factory = Callable[..., Any]

_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Let `get(name, **options)` return `factory(**options)`.

    Raises:
      ValueError: another factory has this name.
    """
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"A task named '{name}' is registered already; choose another name.")
    _FACTORIES[name] = factory


def register_all(factories: Mapping[str, Factory]) -> None:
    """Register every factory of a table under its name; see `register`."""
    for name, factory in factories.items():
        register(name, factory)


def names() -> list[str]:
    """Sorted names of all registered tasks, SeqIO's not included."""
    return sorted(_FACTORIES)


def factory(name: str) -> Callable[..., Any] | None:
    """The factory of a registered task; None for any other name."""
    return _FACTORIES.get(name)


def takes(name: str, option: str) -> bool:
    """True if `name` is a registered task whose factory takes `option` and has not bound it."""
    maker = _FACTORIES.get(name)
    if maker is None or option in getattr(maker, "keywords", ()):
        return False
    return option in inspect.signature(maker).parameters


def needs_options(name: str) -> bool:
    """True if a registered task cannot be made without options."""
    parameters = inspect.signature(_FACTORIES[name]).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.default is p.empty and p.kind in kinds for p in parameters)


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a registered task, with `~` expanded in paths.

    Raises:
      ConfigError: the task has no such option, or a value is not what the annotations allow.
    """
    maker = _FACTORIES[name]
    try:
        parameters = inspect.signature(maker).parameters
    except ValueError:  # of some builtin types, which take what they take
        return dict(options)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                hint = nearest(option, list(parameters)) or f" Its options: {', '.join(parameters)}."
                raise ConfigError(f"The task {name} has no option {option!r}.{hint}")
    return check_arguments(maker, options)


def get(name: str, **options: Any) -> Any:
    """Make the task of this name; if it is not registered here, return SeqIO's of this name.

    SeqIO is searched only if it has been imported; before that it has no tasks.

    Args:
      name: a registered name.
      **options: passed to the factory; SeqIO's tasks take none.

    Raises:
      ConfigError: see `check_options`.
      ValueError: no task has this name, or options were given for a SeqIO task.
    """
    if name in _FACTORIES:
        return _FACTORIES[name](**check_options(name, options))
    seqio: Any = sys.modules.get("seqio")
    seqio_names = []
    if seqio is not None:
        seqio_names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name in seqio_names:
        if options:
            raise ValueError(
                f"'{name}' is a SeqIO task and takes no options, but was given {sorted(options)}."
            )
        return seqio.get_mixture_or_task(name)
    known = sorted({*names(), *seqio_names})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f" The nearest name is '{near[0]}'." if near else ""
    raise ValueError(
        f"No task is named '{name}'.{hint} `famx tasks` lists all. A task of your own, or of SeqIO, is"
        " known once the module that registers it is imported: --import=my_module."
    )
