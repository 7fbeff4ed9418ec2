"""Standard error of native libraries, passed on a moment later, so that its end can be left out.

A library that aborts the process explains it in its own words, with a stack of addresses. Where famx
knows the cause, its sentence takes their place.
"""

import fcntl
import os
import sys
import tempfile

from absl import logging

_STDERR = 2  # the file descriptor that libraries write to
_LARGEST = 2**24  # bytes of the file after which it begins again


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
