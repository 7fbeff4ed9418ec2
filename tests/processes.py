"""Child processes of tests: started with the default signal handlers, ended when their test is over.

Every process that a test starts, directly or through others, inherits the variable `MARK`, whose
value tells which pytest it belongs to. What still runs at the end of the test is killed, whether the
test passed, failed or reached its time limit. Process groups would not be enough: what `launch/`
starts has sessions of its own.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

MARK = "FAMX_TEST"  # "12/34/test/" in a process that a test started under worker 34 of pytest 12
PROC = pathlib.Path("/proc")  # on Linux; elsewhere nothing is killed


def start_process(command, **options) -> subprocess.Popen:
    """`subprocess.Popen`, where the child has the default handlers of SIGINT and SIGTERM.

    nohup, and a shell that starts a job in the background, make a process ignore SIGINT, and it passes
    that on to its children. Python raises no KeyboardInterrupt if SIGINT is ignored from the start. A
    signal that the parent handles is back at its default in the child, so this process handles it for
    a moment.
    """
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
                stack.callback(signal.signal, number, signal.SIG_IGN)
        return subprocess.Popen(command, **options)


def below(mark: str) -> Iterator[int]:
    """Ids of the processes whose mark begins with `mark` and is longer."""
    entry = f"{MARK}={mark}".encode()
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(x.startswith(entry) and x != entry for x in variables):
                yield int(folder.name)


def end(mark: str) -> None:
    """Kills the processes below `mark`, and those that they start meanwhile."""
    for _ in range(100):
        numbers = list(below(mark))
        if not numbers:
            return
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


# ---------------------------------------------------------------- hooks of pytest, by conftest.py


def pytest_configure(config) -> None:
    os.environ[MARK] = f"{os.environ.get(MARK, '')}{os.getpid()}/"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    mark = os.environ[MARK]
    os.environ[MARK] = f"{mark}test/"
    try:
        return (yield)
    finally:
        os.environ[MARK] = mark
        end(mark)


def pytest_sessionfinish() -> None:
    """Ends what is left of a worker that crashed."""
    end(os.environ[MARK])
