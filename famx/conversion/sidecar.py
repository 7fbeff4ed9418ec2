"""`famx.json`: the additions of famx to an exported directory of transformers.

    {"about": ..., "famx": version, "format": 1,
     "memory": {"block_size": 1024, "memory_segments": 3, "memory": {"kind": "fam", ...}, ...},
     "parameters": {"file": "famx/memory.safetensors", "names": ["memory/prompt"], "sha256": ...}}

The memory's parameters are in a folder of their own: loaders that take every safetensors file next to
config.json would not know what to do with them, and transformers would warn.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from famx import __version__
from famx.base.errors import ConfigError
from famx.base.files import write_bytes, write_json
from famx.modules.config import DecoderConfig
from famx.modules.memory import from_dict as memory_from_dict

NAME = "famx.json"
FORMAT = 1
_FILE = "famx/memory.safetensors"
_ABOUT = (
    "This model was exported by famx. transformers reads it without its memory; `python"
    " -m famx.convert --from THIS_DIRECTORY --to MODEL_DIR` restores the memory."
)


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Contents of the `famx.json` of a directory.

    Attributes:
      fields: `MEMORY_FIELDS` of DecoderConfig.
      parameters: the memory's parameters by path, such as "memory/prompt"; empty if it has none.
    """

    fields: Mapping[str, Any]
    parameters: Mapping[str, np.ndarray]


def write_sidecar(
    directory: pathlib.Path, config: DecoderConfig, parameters: Mapping[str, np.ndarray], step: int
) -> None:
    """Writes `famx.json` and the memory's parameters, in their dtypes, into an existing directory."""
    note = None
    if parameters:
        arrays = {name: np.ascontiguousarray(array) for name, array in parameters.items()}
        content = safetensors.numpy.save(arrays)
        file = directory / _FILE
        file.parent.mkdir()
        write_bytes(file, content)
        note = {
            "file": _FILE,
            "names": sorted(arrays),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    header = {"about": _ABOUT, "famx": __version__, "format": FORMAT, "step": step}
    header |= {"memory": config.memory_fields(), "parameters": note}
    write_json(directory / NAME, header)


def read_sidecar(directory: str | os.PathLike) -> Sidecar | None:
    """The sidecar in the directory of an export; None if there is no `famx.json`.

    Raises:
      ConfigError: it is damaged, or its format is unknown to this version of famx.
    """
    path = pathlib.Path(directory) / NAME
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_bytes())
        if header["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {header['format']}; this famx reads format {FORMAT}: update famx."
            )
        fields, note = dict(header["memory"]), header["parameters"]
        fields["memory"] = memory_from_dict(fields["memory"])
        if note is None:
            return Sidecar(fields, {})
        file = path.parent / note["file"]
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise ConfigError(f"{file} is not the file that was exported with {path}: copy it again.")
        arrays = safetensors.numpy.load(content)
        return Sidecar(fields, {name: arrays[name] for name in note["names"]})
    except OSError as error:
        raise ConfigError(f"{error.filename}, which belongs to {path}, cannot be read.") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: copy it again, or remove it to do without.") from error
