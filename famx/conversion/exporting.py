"""Export of a checkpoint to a directory that transformers loads, and that an import reads back.

The weights, with adapters merged, and the memory's parameters are in safetensors files. A model with a
memory comes with the code that defines it for transformers (`famx.conversion.with_memory`).
"""

import dataclasses
import hashlib
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
from famx.base.files import as_path, new_directory, write_bytes, write_json, write_text
from famx.base.untrusted import read_object
from famx.conversion.families import Tensor, tensors
from famx.conversion.huggingface import huggingface_config
from famx.conversion.model_card import CARD, model_card, read_history
from famx.conversion.sources import CONFIG, INDEX, SIDE_FILES, SINGLE
from famx.conversion.with_memory import (
    CODE,
    check_implemented,
    full_config,
    is_memory_tensor,
    memory_tensors,
)
from famx.data.vocabularies.base import Vocabulary
from famx.model_dir.identity import split_memory
from famx.model_dir.loading import TrainedModel
from famx.modules.config import DecoderConfig
from famx.modules.memory import Memory

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHARD = 5_000_000_000
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
    memory: bool = True,
    run: str | os.PathLike | None = None,
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
      memory: whether the memory is written; without it the model is one of its original architecture.
      run: directory with the records of the training, for the model card; None: MODEL_DIR, up to the
        checkpoint's step.

    Raises:
      ConfigError: the directory is not empty, the disk is too small, no architecture can express the
        model, the memory is not implemented for transformers, the dtype is unknown, or a weight is too
        large for it.
    """
    config = trained.model.config
    dtype = dtype or config.param_dtype
    if dtype not in DTYPES:
        raise ConfigError(f"Weights can be written as {', '.join(DTYPES)}, not {dtype!r}.")
    if max_shard_size < 1:
        raise ConfigError(f"A weight file must have at least 1 byte, not {max_shard_size}.")
    forgets = config.memory.exists and not memory
    if forgets:
        config = dataclasses.replace(config, memory=Memory())
    check_implemented(config)
    model_dir = trained.directory.parent
    source = as_path(source or model_dir / "source").expanduser()
    base = huggingface_config(config, _read_json(source / CONFIG))
    leaves = flatten_dict(split_memory(trained.params)[1]) if config.memory.exists else {}
    of_memory = memory_tensors({path: leaf.shape for path, leaf in leaves.items()})
    wanted = tensors(base, config) + of_memory
    directory = check_destination(directory)
    with new_directory(directory) as new:
        _check_room(directory, sum(_size(trained.params, tensor, dtype) for tensor in wanted) + _ROOM)
        files, total = _write_weights(new, trained.params, wanted, dtype, max_shard_size, on_bytes)
        vocabulary = trained.model.vocabulary
        base = {**base, **dict.fromkeys({"dtype", "torch_dtype"} & base.keys() or {"torch_dtype"}, dtype)}
        base, notes = _write_side_files(new, base, source, vocabulary)
        full = full_config(base, config, trained.step, of_memory)
        write_json(new / CONFIG, full)
        if config.memory.exists:
            shutil.copyfile(CODE, new / CODE.name)
        history = read_history(as_path(run or model_dir), trained.step if run is None else None)
        has_tokenizer = (new / "tokenizer_config.json").exists()
        write_text(new / CARD, model_card(config, base, history, directory.name, dtype, has_tokenizer))
        mode = (new / CONFIG).stat().st_mode  # safetensors writes files for their owner alone
        for name in files:
            (new / name).chmod(mode)
    architecture = full["architectures"][0]
    return Export(directory, architecture, files, total, notes + _differences(config, base, forgets))


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


def _differences(config: DecoderConfig, hf: Mapping[str, Any], forgets: bool) -> list[str]:
    """How the model behaves differently in transformers, one sentence each."""
    if config.memory.exists:
        return []
    if forgets:
        return ["The memory is left out: tokens see all tokens before them, and nothing else."]
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


# --------------------------------------------------------------------------- weights


def _write_weights(
    new: pathlib.Path,
    params: Mapping[str, Any],
    wanted: list[Tensor],
    dtype: str,
    max_shard_size: int,
    on_bytes: Callable[[int], None] | None,
) -> tuple[list[str], int]:
    """Write the weight files with their checksums, and an index of several; return names and bytes."""
    sized = [(tensor, _size(params, tensor, dtype)) for tensor in wanted]
    shards, total = _shards(sized, max_shard_size), sum(size for _, size in sized)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: _array(params, tensor, dtype) for tensor in shard}
        safetensors.numpy.save_file(arrays, new / name, metadata={"format": "pt"})
        with (new / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(new / f"{name}.sha256", f"{digest}  {name}\n")
        index |= dict.fromkeys(arrays, name)
        if on_bytes:
            on_bytes(sum(array.nbytes for array in arrays.values()))
    if len(shards) > 1:
        write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return sorted(set(index.values())), total


def _shards(sized: list[tuple[Tensor, int]], max_size: int) -> list[list[Tensor]]:
    """Split tensors, given with their bytes, in order, into runs of at most `max_size` bytes."""
    shards, size = [[]], 0
    for tensor, num_bytes in sized:
        if shards[-1] and size + num_bytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    return shards


def _leaf(params: Mapping[str, Any], tensor: Tensor) -> Any:
    for name in tensor.path:
        params = params[name]
    return params


def _dtype(params: Mapping[str, Any], tensor: Tensor, dtype: str) -> np.dtype:
    """The dtype that a tensor is written in: its own if it is the memory's."""
    kept = is_memory_tensor(tensor.name)
    return np.dtype(_leaf(params, tensor).dtype if kept else dtype)


def _size(params: Mapping[str, Any], tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * _dtype(params, tensor, dtype).itemsize


def _array(params: Mapping[str, Any], tensor: Tensor, dtype: str) -> np.ndarray:
    leaf = _leaf(params, tensor)
    ours = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    with np.errstate(over="ignore"):
        array = np.asarray(tensor.to_theirs(ours), _dtype(params, tensor, dtype), order="C")
    if dtype == "float16" and not np.isfinite(array).all():
        raise ConfigError(f"{tensor.name} has values that float16 cannot represent: choose bfloat16.")
    return array


# --------------------------------------------------------------------------- the other files


def _write_side_files(
    new: pathlib.Path, hf: dict[str, Any], source: pathlib.Path, vocabulary: Vocabulary | None
) -> tuple[dict[str, Any], list[str]]:
    """Write generation_config.json and the tokenizer.

    Returns:
      `hf`, the config.json, with the ids of special tokens, and notes for the user.
    """
    notes = []
    kept = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in kept:
        (new / name).write_bytes((source / name).read_bytes())
    if vocabulary is not None:
        ids = {f"{name}_token_id": getattr(vocabulary, f"{name}_id") for name in _IDS}
        hf = hf | {key: value for key, value in ids.items() if hf.get(key) is None}
        if not any(name.startswith(("tokenizer.", "vocab.")) for name in kept):
            notes += _write_tokenizer(new, vocabulary)
    generation = new / "generation_config.json"
    if not generation.exists():
        given = {f"{name}_token_id": hf.get(f"{name}_token_id") for name in _IDS}
        if vocabulary is not None and len(vocabulary.end_ids) > 1:
            given["eos_token_id"] = list(vocabulary.end_ids)
        write_json(generation, {"_from_model_config": True, **given})
    return hf, notes


def _write_tokenizer(new: pathlib.Path, vocabulary: Vocabulary) -> list[str]:
    if vocabulary.file_name is None:
        return [
            f"transformers has no tokenizer for a vocabulary of {vocabulary.kind}: encode texts with"
            " famx."
        ]
    write_bytes(new / vocabulary.file_name, vocabulary.content)
    text_of = {token: text for text, token in vocabulary.special_tokens.items()}
    text_of |= {token.id: token.content for token in vocabulary.added_tokens}
    ids = {f"{name}_token": getattr(vocabulary, f"{name}_id") for name in (*_IDS, "unk")}
    config = {key: text_of[token] for key, token in ids.items() if token in text_of}
    fast = vocabulary.file_name == "tokenizer.json"
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
    if vocabulary.added_tokens:
        config["added_tokens_decoder"] = {
            str(token.id): token.model_dump(exclude={"id"}) for token in vocabulary.added_tokens
        }
    spaces = {"always": {"legacy": True}, "first": {"legacy": False}}
    config |= spaces.get(vocabulary.prefix_space, {})
    if vocabulary.prefix_space == "never":
        config["add_prefix_space"] = False
    write_json(new / "tokenizer_config.json", config)
    return []


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_object(path) if path.is_file() else None
    except ConfigError as error:
        raise ConfigError(f"{error} Or remove it, to export without it.") from error
