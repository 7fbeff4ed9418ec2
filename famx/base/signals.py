"""Signals that ask a process to stop: SIGTERM, as schedulers send it, and SIGINT, which is Ctrl-C."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Result = TypeVar("_Result")
_LOOK = 0.05  # seconds between two looks whether to stop
_STDERR = 2  # the file descriptor, which threads of C++ write to as well
INTERRUPTED = 128 + signal.SIGINT  # the shell's exit code for a command that Ctrl-C ended

_IN_TIME = 1  # in place of a signal: the limit of time was reached

_stopped = 0  # the signal that asked for the last stop, or `_IN_TIME`; 0: none did


@contextlib.contextmanager
def graceful_stop(
    numbers: Sequence[signal.Signals] = STOP_SIGNALS,
    exit_on_repeat: bool = True,
    seconds: float | None = None,
) -> Iterator[Callable[[], bool]]:
    """A function that returns whether the process was asked to stop inside this context.

    With several JAX processes every process must call the function equally often: a signal to one
    process is a request to all of them, and all see it in the same call.

    Args:
      numbers: signals that ask for a stop.
      exit_on_repeat: end the process at once at the second signal.
      seconds: time in this context after which the function returns True as well; None: no limit.
    """
    global _stopped
    _stopped = 0
    asked: list[int] = []
    end = math.inf if seconds is None else time.monotonic() + seconds

    def ask(number: int, frame: Any) -> None:
        if asked and exit_on_repeat:
            os._exit(128 + number)
        asked.append(number)

    def stop() -> bool:
        global _stopped
        late = _IN_TIME if time.monotonic() >= end else 0
        _stopped = _in_any_process(asked[0] if asked else late)
        return bool(_stopped)

    with handling(ask, numbers):
        yield stop


def was_stopped() -> bool:
    """Whether the function of the last `graceful_stop` returned True when it was last called."""
    return bool(_stopped)


def stopped_code() -> int:
    """Exit code of a command that `was_stopped`, as shells have it: 130 for SIGINT, 143 for SIGTERM.

    It is 0 for one that was not, or that came to the end of its time.
    """
    return 128 + _stopped if _stopped > _IN_TIME else 0


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with handling(interrupt, (signal.SIGTERM,)):
        yield


@contextlib.contextmanager
def exit_on_interrupt(sentence: str) -> Iterator[None]:
    """A context in which Ctrl-C ends the process with a sentence in place of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of orbax complain about a closed event loop as long as they run.
        stderr = os.dup(_STDERR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
        os.write(stderr, f"{sentence}\n".encode())
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def handling(
    handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """A context in which `handler(number, frame)` is called for the signals `numbers`."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interruptible(
    function: Callable[[], _Result], stop: Callable[[], bool] = lambda: False
) -> _Result:
    """The result of `function()`, which runs on a thread, so that Ctrl-C need not wait for its end.

    A call that is interrupted continues in the background, and its result is dropped.

    Args:
      function: takes long in code that handles no signals, such as a compilation.
      stop: asked now and then; True interrupts, too.

    Raises:
      KeyboardInterrupt: it was interrupted.
      BaseException: whatever `function` raised.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # the process may end before it
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK)
        if thread.is_alive() and stop():
            raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return results[0]


def _in_any_process(number: int) -> int:
    """The largest `number` of all JAX processes."""
    import jax  # launch/ needs this module where JAX may be missing

    if jax.process_count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))
