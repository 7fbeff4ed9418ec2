"""`famx.json`: what an exported directory holds beyond a model of transformers.

    {"about": ..., "famx": version, "format": 1,
     "memory": {"block_size": 1024, "memory_segments": 3, "fam_length": 64, ...},
     "prompt": {"file": "famx/prompt.safetensors", "tensor": "fam", "shape": [64, 2048], ...}}

The prompt lies in a folder of its own: loaders that take every safetensors file beside config.json
would not know what to do with it, and transformers would warn.
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
from famx.modules.config import MEMORY_FIELDS, DecoderConfig

NAME = "famx.json"
FORMAT = 1
_PROMPT_FILE, _TENSOR = "famx/prompt.safetensors", "fam"
_ABOUT = (
    "This model was exported by famx. transformers reads it without feedback attention memory; `python"
    " -m famx.convert --from THIS_DIRECTORY --to MODEL_DIR` restores the memory's prompt and settings."
)


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What `famx.json` of a directory says.

    Attributes:
      fields: of DecoderConfig, those of the memory.
      prompt: the FAM prompt `[N, D]`, or `[layers, N, D]` of prefixes; None: a model without memory.
    """

    fields: Mapping[str, Any]
    prompt: np.ndarray | None


def write_sidecar(
    directory: pathlib.Path, config: DecoderConfig, prompt: np.ndarray | None, step: int
) -> None:
    """Writes `famx.json` and the prompt, in its own dtype, into an existing directory."""
    note = None
    if prompt is not None:
        content = safetensors.numpy.save({_TENSOR: np.ascontiguousarray(prompt)})
        file = directory / _PROMPT_FILE
        file.parent.mkdir()
        file.write_bytes(content)
        note = {
            "file": _PROMPT_FILE,
            "tensor": _TENSOR,
            "shape": list(prompt.shape),
            "dtype": str(prompt.dtype),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    fields = {name: getattr(config, name) for name in MEMORY_FIELDS}
    header = {"about": _ABOUT, "famx": __version__, "format": FORMAT, "step": step}
    header |= {"memory": fields, "prompt": note}
    (directory / NAME).write_text(json.dumps(header, indent=2) + "\n")


def read_sidecar(directory: str | os.PathLike) -> Sidecar | None:
    """What an export left in a directory beside the model of transformers; None: it is no export.

    Raises:
      ConfigError: it is damaged or of a format that is not known here.
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
        fields, note = dict(header["memory"]), header["prompt"]
        if note is None:
            return Sidecar(fields, None)
        file = path.parent / note["file"]
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise ConfigError(f"{file} is not the file that was exported with {path}: copy it again.")
        return Sidecar(fields, safetensors.numpy.load(content)[note["tensor"]])
    except OSError as error:
        raise ConfigError(f"{error.filename}, which belongs to {path}, cannot be read.") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: copy it again, or remove it to do without.") from error
