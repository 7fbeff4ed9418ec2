"""A checkpoint of ours becomes a directory that transformers loads.

The weights are merged, in safetensors files; the FAM prompt and the memory's settings, which
transformers does not know, lie beside them (`famx.conversion.sidecar`).
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

from famx.base.errors import ConfigError
from famx.conversion.families import Tensor, tensors
from famx.conversion.huggingface import huggingface_config
from famx.conversion.sidecar import write_sidecar
from famx.data.vocabularies.base import Vocabulary
from famx.model_dir.loading import TrainedModel
from famx.modules.config import DecoderConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHARD = 5_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROOM = 10_000_000  # bytes for headers, tokenizer and the like
_IDS = ("bos", "eos", "pad")


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
      directory: where.
      architecture: the class of transformers.
      files: names of the weight files.
      num_bytes: of all weights.
      notes: what the user should know, a sentence each.
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
    """Writes a model for transformers; the directory appears at the end, whole.

    Args:
      trained: the model, its weights merged.
      directory: missing or empty.
      dtype: of the weights in the files; None: that of the parameters. The prompt keeps its own.
      max_shard_size: bytes of one weight file; a tensor that is larger has a file of its own.
      source: directory with the config.json and the tokenizer of the model that this one was made
        from; None: MODEL_DIR/source if it is there, else both are made anew.
      on_bytes: told how many bytes of weights were written since the last call.

    Raises:
      ConfigError: the directory is taken or has no room, no architecture can express the model, the
        dtype is unknown, or a weight is too large for it.
    """
    config = trained.model.config
    dtype = dtype or config.param_dtype
    if dtype not in DTYPES:
        raise ConfigError(f"Weights can be written as {', '.join(DTYPES)}, not as {dtype!r}.")
    if max_shard_size < 1:
        raise ConfigError(f"A weight file must have at least 1 byte, not {max_shard_size}.")
    source = pathlib.Path(source or trained.directory.parent / "source").expanduser()
    hf = huggingface_config(config, _read_json(source / "config.json"))
    wanted = tensors(hf, config)
    shards = _shards(wanted, np.dtype(dtype).itemsize, max_shard_size)
    total = sum(math.prod(tensor.shape) for tensor in wanted) * np.dtype(dtype).itemsize
    directory, new = _make_room(directory, total + _ROOM)
    try:
        index = {}
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
            _write_json(new / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        notes = _write_side_files(new, hf, dtype, source, trained.model.vocabulary)
        prompt = np.asarray(trained.params["fam"]) if config.fam_length else None
        write_sidecar(new, config, prompt, trained.step)
        mode = (new / "config.json").stat().st_mode  # the library's own would be for us alone
        for path in new.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _sync(path)
        os.replace(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    files = sorted(set(index.values()))
    return Export(directory, hf["architectures"][0], files, total, notes + _differences(config, hf))


def check_destination(directory: str | os.PathLike) -> pathlib.Path:
    """The directory, absolute; ConfigError unless it is missing or empty."""
    path = pathlib.Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{directory} is a file: choose another --to.")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{directory} is not empty: choose another --to, or remove what it holds.")
    return path


def _differences(config: DecoderConfig, hf: Mapping[str, Any]) -> list[str]:
    """Where the model reads otherwise in transformers."""
    if config.fam_length:
        return [
            "transformers reads without the memory, and tokens see all before them in its place;"
            " famx.convert takes the memory back."
        ]
    past = config.memory_segments * config.block_size
    if config.window_mask and hf.get("model_type") == "mistral" and hf.get("sliding_window") == past + 1:
        return []
    return ["In transformers tokens see all before them, not the last blocks alone."]


def _make_room(directory: str | os.PathLike, need_bytes: int) -> tuple[pathlib.Path, pathlib.Path]:
    """The destination and an empty directory beside it, where the export grows."""
    directory = check_destination(directory)
    new = directory.with_name(f".{directory.name}.exporting")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
        free = shutil.disk_usage(directory.parent).free
        if free < need_bytes:
            raise ConfigError(
                f"{directory.parent} has {free:,} bytes free and the export needs {need_bytes:,}: free"
                " some space, choose another disk or a smaller --dtype."
            )
        new.mkdir()
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}.") from error
    return directory, new


def _shards(wanted: list[Tensor], itemsize: int, max_size: int) -> list[list[Tensor]]:
    """The tensors in order, in as few runs of at most `max_size` bytes as that gives."""
    shards, size = [[]], 0
    for tensor in wanted:
        own = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + own > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += own
    return shards


def _array(params: Mapping[str, Any], tensor: Tensor, dtype: str) -> np.ndarray:
    leaf = params
    for name in tensor.path:
        leaf = leaf[name]
    ours = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(tensor.to_theirs(ours), dtype=dtype)
    if dtype == "float16" and not np.isfinite(array).all():
        raise ConfigError(f"{tensor.name} has values that float16 cannot hold: choose bfloat16.")
    return array


# --------------------------------------------------------------------------- the other files


def _write_side_files(
    new: pathlib.Path,
    hf: dict[str, Any],
    dtype: str,
    source: pathlib.Path,
    vocabulary: Vocabulary | None,
) -> list[str]:
    """config.json, generation_config.json and the tokenizer; returns notes for the user."""
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
    _write_json(new / "config.json", hf)
    generation = new / "generation_config.json"
    if not generation.exists():
        given = {f"{name}_token_id": hf.get(f"{name}_token_id") for name in _IDS}
        _write_json(generation, {"_from_model_config": True, **given})
    return notes


def _write_tokenizer(new: pathlib.Path, vocabulary: Vocabulary) -> list[str]:
    if vocabulary.file_name is None:
        return [
            f"transformers has no tokenizer for a vocabulary of {vocabulary.kind}: texts must be turned"
            " into ids by famx."
        ]
    (new / vocabulary.file_name).write_bytes(vocabulary.content)
    text_of = {token: text for text, token in vocabulary.special_tokens.items()}
    ids = {f"{name}_token": getattr(vocabulary, f"{name}_id") for name in (*_IDS, "unk")}
    config = {key: text_of[token] for key, token in ids.items() if token in text_of}
    fast = vocabulary.file_name == "tokenizer.json"
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    _write_json(new / "tokenizer_config.json", config)
    return []


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: remove it to do without.") from error


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sync(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
