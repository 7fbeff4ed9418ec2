"""Sentences for silences: what a command is busy with, and how long the same took last time.

The mains enter `announced`; elsewhere, as in a notebook or a test, nothing is said. The times are kept in
a file of the compilation cache's directory, whose programs make the next time shorter.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from famx.base.errors import ConfigError
from famx.base.files import write_text
from famx.base.progress import compilation, say

SILENCE = 3.0  # seconds after which a user wonders
_FILE = "famx_seconds.json"
_MOST = 500  # times that the file keeps
_NOTED = 1.0  # seconds; shorter times are not worth a line in the file

_announces = False
_open: list[object] = []  # the contexts that are entered, innermost last


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """A context in which silences are explained on standard error."""
    global _announces
    before, _announces = _announces, True
    try:
        yield
    finally:
        _announces = before


def hush() -> None:
    """Explains no more silences, as in all processes but the first."""
    global _announces
    _announces = False


@contextlib.contextmanager
def waiting(what: str, key: Any = None) -> Iterator[None]:
    """A context whose block may take long.

    What took long last time is announced at once, anything else after `SILENCE`. Within another such
    context only the innermost one speaks.

    Args:
      what: beginning of the sentence, such as "Loading the model".
      key: what the time depends on, with a repr that is the same in every process; None: no time is kept.
    """
    token, name = object(), None if key is None else _digest(what, key)
    seconds = None if name is None or not _announces else _times().get(name)
    _open.append(token)
    timer = None
    if _announces and seconds is not None and seconds >= SILENCE:
        say(f"{what} (about {_about(seconds)} last time) ...")
    elif _announces:
        explain = lambda: say(f"{what} ...") if _open[-1:] == [token] and _announces else None
        timer = threading.Timer(SILENCE, explain)
        timer.daemon = True
        timer.start()
    began = time.monotonic()
    try:
        yield
        took = time.monotonic() - began
        if name is not None and _announces and (took >= _NOTED or seconds is not None):
            _keep(name, took)
    finally:
        _open.remove(token)
        if timer is not None:
            timer.cancel()


class Announced:
    """A jitted function whose compilation is announced, and left out of speeds and remaining times.

    Args:
      jitted: the function; only calls with new shapes, dtypes or static values compile.
      what: names the program, as in "the training step".
    """

    def __init__(self, jitted: Callable[..., Any], what: str):
        self._jitted, self._what = jitted, what
        self._known: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import jax  # base must be importable where jax is not

        leaves, structure = jax.tree.flatten((args, kwargs))
        shapes = tuple(
            (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf for leaf in leaves
        )
        signature = structure, shapes
        if signature in self._known:
            return self._jitted(*args, **kwargs)
        device = jax.devices()[0].device_kind, jax.device_count()
        with compilation(), waiting(f"Compiling {self._what}", (str(structure), repr(shapes), device)):
            result = self._jitted(*args, **kwargs)
        self._known.add(signature)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _digest(what: str, key: Any) -> str:
    return hashlib.sha256(repr((what, key)).encode()).hexdigest()[:16]


def _path() -> pathlib.Path | None:
    """The file of times; None without a compilation cache on this machine's disks."""
    variable = "JAX_COMPILATION_CACHE_DIR"
    jax = sys.modules.get("jax")
    folder = os.environ.get(variable) if jax is None else getattr(jax.config, variable.lower())
    return None if not folder or "://" in folder else pathlib.Path(folder) / _FILE


def _times() -> dict[str, float]:
    path = _path()
    try:
        times = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(times, dict):
        return {}
    return {name: seconds for name, seconds in times.items() if isinstance(seconds, int | float)}


def _keep(name: str, seconds: float) -> None:
    """Notes a time, as the newest; a disk that takes no file is no reason to stop."""
    path = _path()
    if path is None:
        return
    times = _times()
    times.pop(name, None)
    newest = list(times.items())[-(_MOST - 1) :]
    with contextlib.suppress(OSError, ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dict([*newest, (name, round(seconds, 2))])))
