"""Ends a command quietly if what read its output has ended, as in `famx tasks | head`."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator

_SIGPIPE = 128 + 13  # exit code of what that signal ended


@contextlib.contextmanager
def exits_quietly() -> Iterator[None]:
    """Context that flushes standard output at its end, and exits with 141 if nobody reads it any more."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be written
        sys.exit(_SIGPIPE)


def _nobody_reads() -> bool:
    ends = select.poll()
    ends.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))
