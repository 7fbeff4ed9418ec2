"""Errors of orbax when it commits a checkpoint of famx: each is one sentence."""

import contextlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from famx.base.errors import ConfigError, causes
from famx.base.files import NO_SPACE
from famx.base.store_errors import store_error
from famx.model_dir import digests

# What `CheckpointManager.save` is given, so that a checkpoint without its digests is known as damaged.
CUSTOM_METADATA = {digests.KEY: digests.NAME}
LAST_THREAD = "save_finalize"  # orbax' thread of a save, which ends when the save is complete


class SaveError(ConfigError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def save_errors(directory: pathlib.Path) -> Iterator[None]:
    """A context in which an error of writing the checkpoint `directory` becomes a `SaveError`."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        found = store_error(error, directory)
        number = None if found else _error_number(error)
        if found is None and number is None:
            raise
        reason = found.strerror if found else os.strerror(number)
        raise SaveError(f"{directory} cannot be written: {reason}.") from error


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of writing came of a full disk, or a quota or limit that is used up."""
    return _error_number(error) in NO_SPACE


def _error_number(error: BaseException | None) -> int | None:
    """The number of the system's error in an exception, what caused it or its text; None: it has none."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno:
            return one.errno
        if match := re.search(r"os_error_code='(\d+)'", str(one)):
            return int(match[1])
    return None


def quiet_orbax() -> None:
    """Keep orbax from printing tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
        before = sys.unraisablehook
        sys.unraisablehook = lambda error: None if _is_late(error) else before(error)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of the log is not one of orbax' about an error."""
    ours = f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname
    return ours or record.levelno < logging.ERROR


def _is_late(error) -> bool:
    """Whether it is an answer of tensorstore to a read that has failed as a whole."""
    return isinstance(error.exc_value, RuntimeError) and "loop is closed" in str(error.exc_value)
