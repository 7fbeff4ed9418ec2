"""Export of a checkpoint to a directory that transformers loads.

The weights are in safetensors files, with adapters merged. The memory's parameters and settings, which
transformers does not know, are in files of their own (`famx.conversion.sidecar`).
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  makes bfloat16 a dtype of numpy
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from famx.base.errors import ConfigError
from famx.base.files import new_directory, write_bytes, write_json
from famx.conversion.families import Tensor, tensors
from famx.conversion.huggingface import huggingface_config
from famx.conversion.sidecar import write_sidecar
from famx.data.vocabularies.base import Vocabulary
from famx.model_dir.identity import split_memory
from famx.model_dir.loading import TrainedModel
from famx.modules.config import DecoderConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHARD = 5_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROOM = 10_000_000  # bytes for headers, tokenizer and the like
_IDS = ("bos", "eos", "pad")


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
      directory: the directory that was written.
      architecture: name of the model class of transformers.
      files: names of the weight files.
      num_bytes: size of all weights.
      notes: what the user should know, one sentence each.
    """

    directory: pathlib.Path
    architecture: str
    files: list[str]
    num_bytes: int
    notes: list[str]


def export(
    trained: TrainedModel,
    directory: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD,
    source: str | os.PathLike | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Export:
    """Write a model for transformers; the directory appears only when it is complete.

    Args:
      trained: the model, with adapters merged.
      directory: destination; missing or empty.
      dtype: one of `DTYPES` for the weights; None: that of the parameters. Parameters of the memory keep
        their dtype.
      max_shard_size: largest size of a weight file in bytes; a larger tensor has a file to itself.
      source: directory with the config.json and the tokenizer that the model was imported from; None:
        MODEL_DIR/source. If it does not exist, both are generated.
      on_bytes: called with the number of bytes of weights written since the last call.

    Raises:
      ConfigError: the directory is not empty, the disk is too small, no architecture can express the
        model, the dtype is unknown, or a weight is too large for it.
    """
    config = trained.model.config
    dtype = dtype or config.param_dtype
    if dtype not in DTYPES:
        raise ConfigError(f"Weights can be written as {', '.join(DTYPES)}, not {dtype!r}.")
    if max_shard_size < 1:
        raise ConfigError(f"A weight file must have at least 1 byte, not {max_shard_size}.")
    source = pathlib.Path(source or trained.directory.parent / "source").expanduser()
    hf = huggingface_config(config, _read_json(source / "config.json"))
    wanted = tensors(hf, config)
    shards = _shards(wanted, np.dtype(dtype).itemsize, max_shard_size)
    total = sum(math.prod(tensor.shape) for tensor in wanted) * np.dtype(dtype).itemsize
    directory = check_destination(directory)
    index = {}
    with new_directory(directory) as new:
        _check_room(directory, total + _ROOM)
        for number, shard in enumerate(shards, 1):
            name = _SINGLE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {tensor.name: _array(trained.params, tensor, dtype) for tensor in shard}
            safetensors.numpy.save_file(arrays, new / name, metadata={"format": "pt"})
            index |= dict.fromkeys(arrays, name)
            if on_bytes:
                on_bytes(sum(array.nbytes for array in arrays.values()))
        if len(shards) > 1:
            write_json(new / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        notes = _write_side_files(new, hf, dtype, source, trained.model.vocabulary)
        memory = flatten_dict(split_memory(trained.params)[1], sep="/")
        if any(path.endswith("/kernel") for path in memory):
            notes.append(
                "The adapters of the memory cannot be merged into the weights, since the text does not go"
                " through them: they are among the memory's parameters."
            )
        write_sidecar(new, config, {path: np.asarray(x) for path, x in memory.items()}, trained.step)
        mode = (new / "config.json").stat().st_mode  # safetensors writes files for their owner alone
        for path in new.rglob("*.safetensors"):
            path.chmod(mode)
    files = sorted(set(index.values()))
    return Export(directory, hf["architectures"][0], files, total, notes + _differences(config, hf))


def check_destination(directory: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a destination that is missing or empty.

    Raises:
      ConfigError: it is neither.
    """
    path = pathlib.Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{directory} is a file: choose another --to.")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{directory} is not empty: choose another --to, or remove its contents.")
    return path


def _differences(config: DecoderConfig, hf: Mapping[str, Any]) -> list[str]:
    """How the model behaves differently in transformers, one sentence each."""
    if config.memory.exists:
        return [
            "In transformers the model has no memory; instead, tokens see all tokens before them."
            " famx.convert restores the memory."
        ]
    past = config.memory_segments * config.block_size
    if config.window_mask and hf.get("model_type") == "mistral" and hf.get("sliding_window") == past + 1:
        return []
    return ["In transformers tokens see all tokens before them, not only the last blocks."]


def _check_room(directory: pathlib.Path, need_bytes: int) -> None:
    """Raises ConfigError unless the disk of the directory's parent has `need_bytes` free."""
    free = shutil.disk_usage(directory.parent).free
    if free < need_bytes:
        raise ConfigError(
            f"{directory.parent} has {free:,} bytes free and the export needs {need_bytes:,}: free"
            " some space, choose another disk or a smaller --dtype."
        )


def _shards(wanted: list[Tensor], itemsize: int, max_size: int) -> list[list[Tensor]]:
    """Split the tensors, in order, into runs of at most `max_size` bytes."""
    shards, size = [[]], 0
    for tensor in wanted:
        num_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + num_bytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    return shards


def _array(params: Mapping[str, Any], tensor: Tensor, dtype: str) -> np.ndarray:
    leaf = params
    for name in tensor.path:
        leaf = leaf[name]
    ours = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(tensor.to_theirs(ours), dtype=dtype)
    if dtype == "float16" and not np.isfinite(array).all():
        raise ConfigError(f"{tensor.name} has values that float16 cannot represent: choose bfloat16.")
    return array


# --------------------------------------------------------------------------- the other files


def _write_side_files(
    new: pathlib.Path,
    hf: dict[str, Any],
    dtype: str,
    source: pathlib.Path,
    vocabulary: Vocabulary | None,
) -> list[str]:
    """Write config.json, generation_config.json and the tokenizer; return notes for the user."""
    hf = {**hf, **dict.fromkeys({"dtype", "torch_dtype"} & hf.keys() or {"torch_dtype"}, dtype)}
    notes = []
    kept = sorted(source.iterdir()) if source.is_dir() else []
    for file in kept:
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, new / file.name)
    if vocabulary is not None:
        ids = {f"{name}_token_id": getattr(vocabulary, f"{name}_id") for name in _IDS}
        hf |= {key: value for key, value in ids.items() if hf.get(key) is None}
        if not any(file.name.startswith(("tokenizer.", "vocab.")) for file in kept):
            notes += _write_tokenizer(new, vocabulary)
    write_json(new / "config.json", hf)
    generation = new / "generation_config.json"
    if not generation.exists():
        given = {f"{name}_token_id": hf.get(f"{name}_token_id") for name in _IDS}
        write_json(generation, {"_from_model_config": True, **given})
    return notes


def _write_tokenizer(new: pathlib.Path, vocabulary: Vocabulary) -> list[str]:
    if vocabulary.file_name is None:
        return [
            f"transformers has no tokenizer for a vocabulary of {vocabulary.kind}: encode texts with"
            " famx."
        ]
    write_bytes(new / vocabulary.file_name, vocabulary.content)
    text_of = {token: text for text, token in vocabulary.special_tokens.items()}
    ids = {f"{name}_token": getattr(vocabulary, f"{name}_id") for name in (*_IDS, "unk")}
    config = {key: text_of[token] for key, token in ids.items() if token in text_of}
    fast = vocabulary.file_name == "tokenizer.json"
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    write_json(new / "tokenizer_config.json", config)
    return []


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: remove it to export without it.") from error
