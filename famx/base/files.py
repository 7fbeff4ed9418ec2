"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib


def replace_file(path: pathlib.Path, data: bytes) -> None:
    """Writes `data` to `path`; whatever fails or is killed leaves what was there before.

    Raises:
      OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
