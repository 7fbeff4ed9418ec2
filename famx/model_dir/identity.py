"""Identity of a model: model.json of its directory, differences between models, fingerprints."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.checksums import read_checked_json, write_checked_json
from famx.base.errors import ConfigError
from famx.base.files import as_path, check_answers, is_stored
from famx.models.description import check_description
from famx.modules import memory as memories
from famx.modules.config import COMPUTATION_FIELDS, DecoderConfig
from famx.modules.memory import of_memory

_MODEL_FILE = "model.json"
_SAMPLES = 1024  # values of each parameter that its fingerprint covers
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(DecoderConfig)
    if field.default is not dataclasses.MISSING
} | {"lora": None}


def split_checkpoint(checkpoint: str) -> tuple[pathlib.Path, int | None]:
    """`(MODEL_DIR, step)` of a path to a checkpoint; the step is None for a path to a `MODEL_DIR`.

    Raises:
      ConfigError: the MODEL_DIR does not exist.
    """
    path = as_path(checkpoint).expanduser().absolute()
    match = re.fullmatch(r"checkpoint_(\d+)", path.name)
    directory, step = (path.parent, int(match[1])) if match else (path, None)
    check_answers(directory)
    if is_stored(directory) and not directory.is_dir():
        raise ConfigError(f"There is no checkpoint {checkpoint}: nothing is in {directory}.")
    # Path.is_dir raises if a parent directory may not be read.
    if not is_stored(directory) and not os.path.isdir(directory):
        raise ConfigError(f"There is no checkpoint {checkpoint}: {directory} is not a directory.")
    return directory, step


def read_model_config(model_dir: str | os.PathLike) -> dict[str, Any]:
    """Content of MODEL_DIR/model.json; ConfigError if it is missing, damaged or was changed."""
    path = as_path(model_dir) / _MODEL_FILE
    try:
        fields = read_checked_json(path)
    except FileNotFoundError as error:
        other = ""
        if (path.parent / "config.json").exists():
            other = f" It holds a model of Hugging Face: famx convert --from={model_dir} imports it."
        raise ConfigError(
            f"{model_dir} is not the directory of a trained model: it has no {_MODEL_FILE}.{other}"
        ) from error
    check_description(fields, path)
    return fields


def differing_fields(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Differences of two models as 'num_layers (2 there, 4 here), ...'; '' for the same model.

    A field that an older version did not write has its default. Fields of the memory are named
    `memory.<field>`. Fields that change only the computation are not compared.
    """
    there, here = _flat(there), _flat(here)
    value = lambda fields, name: fields.get(name, _DEFAULTS.get(name, "unset"))
    return ", ".join(
        f"{name} ({value(there, name)!r} there, {value(here, name)!r} here)"
        for name in sorted((there.keys() | here.keys()) - set(COMPUTATION_FIELDS))
        if value(there, name) != value(here, name)
    )


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields and those of the memory, which are named as in `memory.length` and get defaults.

    All as JSON holds them, since one side of a comparison comes from a file: a tuple is a list there.
    """
    memory = fields.get("memory")
    memory = memory if isinstance(memory, dict) else {}
    with contextlib.suppress(TypeError, ValueError):  # a kind or a field that is not known here
        memory = memories.from_dict(memory).to_dict()
    rest = {name: value for name, value in fields.items() if name != "memory"}
    return json.loads(json.dumps(rest | {f"memory.{name}": value for name, value in memory.items()}))


def check_same_model(model_dir: str | os.PathLike, model_config: dict[str, Any]) -> None:
    """Write `model_config` to MODEL_DIR/model.json, or compare it with an existing one.

    Values that JSON cannot hold are written as text. Raises ConfigError with the differing fields if the
    directory belongs to another model.
    """
    path = as_path(model_dir) / _MODEL_FILE
    here = json.loads(json.dumps(model_config, default=str))
    if path.exists():
        differing = differing_fields(read_model_config(model_dir), here)
        if differing:
            raise ConfigError(
                f"MODEL_DIR {model_dir} holds another model, differing in {differing}:"
                " choose another MODEL_DIR or go back to that model."
            )
    elif jax.process_index() == 0:
        write_checked_json(path, here, sort_keys=True)


def model_fingerprint(config: DecoderConfig, params) -> str:
    """Hex digest of the fields of a config that change its results, and of the weights.

    It covers evenly spaced values of each parameter, so that its cost does not grow with the model.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in COMPUTATION_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    return _digest(digest, params)


def weights_fingerprint(params) -> str:
    """Hex digest of the weights except those of the memory; see `model_fingerprint`."""
    return _digest(hashlib.sha256(), split_memory(params)[0])


def split_memory(params) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(rest, memory)`: the parameters without those of the memory, and those of the memory."""
    flat = flatten_dict(params, sep="/")
    pick = lambda wanted: unflatten_dict(
        {path: leaf for path, leaf in flat.items() if of_memory(path) == wanted}, sep="/"
    )
    return pick(False), pick(True)


def _digest(digest, params) -> str:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = leaf.reshape(-1)
        sample = np.asarray(flat[:: -(-flat.size // _SAMPLES)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {sample.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()
