"""Standard error of native libraries: without what is no news to a user, and without a needless end.

`without_noise` leaves out lines that report nothing wrong. `NativeStderr` passes standard error on a
moment later, so that its end can be left out: a library that aborts the process explains it in its own
words, with a stack of addresses, and where famx knows the cause, its sentence takes their place.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from absl import logging

_STDOUT, _STDERR = 1, 2  # the file descriptors that libraries write to
# XLA's alarm about a compilation of more than two minutes, which it logs as an error, in a frame of
# stars; Gloo's greeting to each process; and tensorstore's notice that credentials for a store are not
# where it looks first: if there are none at all, a sentence of famx says so.
_NOISE = (
    r"^[A-Z][0-9]{4} .*slow_operation_alarm\.cc|^The operation took |\] Very slow compile\?"
    r"|^[A-Z][0-9]{4} .*google_auth_provider\.cc|^\*{20,}$|^$|^\[Gloo\] Rank [0-9]+ is connected to "
)
_LARGEST = 2**24  # bytes of the file after which it begins again


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """A context in which lines of `_NOISE` that libraries write to standard error are left out.

    Another process, grep, does it, so that the last words of a process that aborts are not lost. Python's
    own standard error goes out at once, as before. Nothing changes where it is captured, as in a test.
    """
    # Notices and warnings of XLA and of the libraries around it; errors are level 2 and above.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    grep = shutil.which("grep")
    if grep is None or sys.stderr is not sys.__stderr__ or sys.stderr.fileno() != _STDERR:
        yield
        return
    sys.stderr.flush()
    before, out = sys.stderr, os.dup(_STDERR)
    # In a session of its own, Ctrl-C does not end it.
    filter_ = subprocess.Popen(
        [grep, "--line-buffered", "-a", "-v", "-E", _NOISE],
        stdin=subprocess.PIPE, stdout=out, start_new_session=True,
    )  # fmt: skip
    os.dup2(filter_.stdin.fileno(), _STDERR)
    filter_.stdin.close()
    sys.stderr = os.fdopen(os.dup(out), "w", buffering=1, errors="backslashreplace")
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        os.dup2(out, _STDERR)  # the last end of the pipe in this process
        os.close(out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            filter_.wait(1)  # a child of this process may still have the pipe


def stdout_to_stderr() -> None:
    """From now on, what libraries write to standard output goes to their standard error."""
    if sys.stdout is sys.__stdout__ and sys.stdout.fileno() == _STDOUT:
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(_STDOUT), "w", buffering=1, errors=sys.stdout.errors)
        os.dup2(_STDERR, _STDOUT)


class NativeStderr:
    """Standard error goes to a file, from which `pass_on` copies it; Python's own goes out at once.

    A file is used, not a pipe, since nobody ever waits for room in it.
    """

    def __init__(self):
        sys.stderr.flush()
        self._out = os.dup(_STDERR)
        self._file = tempfile.TemporaryFile()
        number = self._file.fileno()
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_APPEND)
        os.dup2(number, _STDERR)
        sys.stderr = os.fdopen(os.dup(self._out), "w", buffering=1, errors="backslashreplace")
        logging.get_absl_handler().python_handler.stream = sys.stderr
        self._seen = self._copied = 0  # bytes of the file at the last call, and copied so far

    def pass_on(self, all_: bool = False) -> None:
        """Copies what was written before the last call; `all_`: everything."""
        number, size = self._file.fileno(), os.fstat(self._file.fileno()).st_size
        end = size if all_ else self._seen
        while self._copied < end:
            data = os.pread(number, min(end - self._copied, 2**16), self._copied)
            self._copied += os.write(self._out, data)
        self._seen = size
        if self._copied == size > _LARGEST:
            os.ftruncate(number, 0)
            self._seen = self._copied = 0
