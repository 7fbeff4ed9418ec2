"""Child processes of tests: they start with default signal handlers and end with their test.

Every process that a test starts, directly or through others, inherits the environment variable `MARK`,
whose value tells which pytest it belongs to. What still runs at the end of the test is killed, whether
the test passed, failed or reached its time limit. Killing process groups would not be enough, since
`launch/` starts processes in new sessions.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

MARK = "FAMX_TEST"  # "12/34/test/" in a process that a test started under worker 34 of pytest 12
PROC = pathlib.Path("/proc")  # on Linux; elsewhere nothing is killed


def start_process(command, **options) -> subprocess.Popen:
    """`subprocess.Popen`, where the child has the default handlers of SIGINT and SIGTERM.

    A process that was started in the background of a shell script ignores SIGINT, and so do its
    children: Python raises KeyboardInterrupt only if SIGINT was not ignored at its start. A signal
    that the parent handles has its default action in the child, so this process handles both signals
    while it starts the child.
    """
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
                stack.callback(signal.signal, number, signal.SIG_IGN)
        return subprocess.Popen(command, **options)


def free_address() -> str:
    """`localhost:PORT` with a port that no process listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def below(mark: str) -> Iterator[int]:
    """Ids of the processes whose mark begins with `mark` and is longer."""
    entry = f"{MARK}={mark}".encode()
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(x.startswith(entry) and x != entry for x in variables):
                yield int(folder.name)


def end(mark: str) -> None:
    """Kills the processes below `mark`, and those that they start in the meantime."""
    for _ in range(100):
        numbers = list(below(mark))
        if not numbers:
            return
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


# ---------------------------------------------------------------- hooks of pytest; conftest.py loads them


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
    """Kills what a crashed worker of pytest-xdist left running."""
    end(os.environ[MARK])
