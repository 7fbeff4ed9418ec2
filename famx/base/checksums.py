"""Checksums that files carry with them, so that a change of their content is noticed."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.files import as_path, write_json
from famx.base.untrusted import read_object

_KEY = "sha256"


def checksum(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of JSON values and of named arrays with their dtypes and shapes."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_checked_json(path: str | os.PathLike, value: Mapping[str, Any], **options: Any) -> None:
    """Write an object as JSON with a key "sha256" for the rest; see `write_json`."""
    write_json(path, {**value, _KEY: _of(value)}, **options)


def read_checked_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object that `write_checked_json` wrote, or any other one without the key "sha256".

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: it is not a JSON object, or was changed since it was written.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    value = read_object(path)
    wanted = value.pop(_KEY, None)
    if wanted is not None and wanted != _of(value):
        raise ConfigError(
            f"{path} was changed since famx wrote it: copy it again, or, if the change is meant, remove"
            f' the line "{_KEY}" from it.'
        )
    return value


def _of(value: Mapping[str, Any]) -> str:
    return checksum(json.loads(json.dumps(value)), {})
