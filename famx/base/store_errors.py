"""Errors of a store as sentences. Its own file, as tensorstore, which raises them, is slow to import."""

import errno
import os
import re

from famx.base.errors import ConfigError, causes

_STATUS = re.compile(r"http_response_code='(\d+)'")
_LOG_IN = (
    "there is no access to it from here: log in with 'gcloud auth application-default login', set"
    " GOOGLE_APPLICATION_CREDENTIALS, or give the account the role Storage Object User"
)


class StoreError(OSError, ConfigError):
    """A store does not answer, or refuses; not that an object is missing.

    Args:
      number: number of the system's error that is most like it.
      clause: what is wrong, which continues "... cannot be read: ".
      path: the path in the store.
    """

    def __init__(self, number: int, clause: str, path: str):
        OSError.__init__(self, number, clause, path)

    def __str__(self) -> str:
        return f"{self.filename} cannot be read or written: {self.strerror}."


def http_status(error: BaseException) -> int | None:
    """The status of HTTP in the text of an exception, or None."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def store_error(error: BaseException | None, path: str | os.PathLike) -> StoreError | None:
    """The error of a store in an exception of tensorstore, or in what caused it; None: there is none."""
    for one in causes(error):
        if isinstance(one, StoreError):
            return one
        status, text = http_status(one), str(one)
        if status in (401, 403):
            return StoreError(errno.EACCES, f"{_LOG_IN} (HTTP {status})", str(path))
        if status == 404:
            return StoreError(errno.ENOENT, "there is no such bucket", str(path))
        if "CURL error" in text:
            reason = text.split("CURL error ", 1)[1].splitlines()[0][:200]
            return StoreError(errno.EIO, f"there is no connection to the store: {reason}", str(path))
        if status is not None or "retry attempts failed" in text:
            answer = text.splitlines()[0].split(" [")[0][:200]
            return StoreError(errno.EIO, f"the store answered: {answer}", str(path))
    return None
