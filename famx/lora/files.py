"""Adapter files in the format of PEFT, with the memory's parameters and whatever else was trained.

A saved adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`. The latter has
tensors `base_model.model.model.layers.<i>.self_attn.q_proj.lora_A.weight [R, in]` and `lora_B` `[out, R]`
in float32 or bfloat16. The memory's parameters, and norms that were trained, are float32, and their names
begin with `famx.`; PEFT reports these as unexpected and ignores them.
"""

import json
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.checksums import checksum
from famx.base.errors import ConfigError
from famx.base.files import as_path, local_copy, write_bytes, write_json
from famx.base.untrusted import read_object, shown
from famx.lora.adapter_config import CONFIG, MEMORY, AdapterConfig, read_adapter_config
from famx.lora.adapters import GROUPS, Lora, inputs_end, select, value
from famx.modules.memory import of_memory

WEIGHTS = "adapter_model.safetensors"
SHIPPED = pathlib.Path(__file__).with_name("shipped")  # adapters that come with famx
OURS, FINGERPRINT = "famx.", "famx.base_fingerprint"
_CHECKSUM = "famx.sha256"  # of the tensors and these fields of the config, in the tensors' metadata
_CHECKED = ("r", "lora_alpha", "target_modules", MEMORY)
_THEIRS = {
    "layers/query": "self_attn.q_proj",
    "layers/key": "self_attn.k_proj",
    "layers/value": "self_attn.v_proj",
    "layers/output": "self_attn.o_proj",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}
_TENSOR = re.compile(r"base_model\.model\.(?:\w+\.)*?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


class _Saved(NamedTuple):
    """A saved adapter: its tensors in float32, and their dtypes in the file."""

    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, np.dtype]
    fingerprint: str | None


def adapter_directory(path) -> pathlib.Path:
    """The directory of an adapter, which one that comes with famx may be called by its name.

    Args:
      path: a directory, or the name of a directory in `SHIPPED`; the former if both exist.
    """
    given = as_path(path).expanduser()
    return SHIPPED / str(path) if str(path) in _shipped() and not given.exists() else given


def _shipped() -> list[str]:
    return sorted(config.parent.name for config in SHIPPED.glob(f"*/{CONFIG}"))


def save_adapter(
    path,
    tree,
    lora: Lora,
    fingerprint: str | None = None,
    base: str | None = None,
    memory: Mapping[str, Any] | None = None,
    others: Collection[str] = (),
    dtype: str = "float32",
) -> None:
    """Save the adapters of a tree, its memory's parameters and `others`, to a directory.

    Args:
      path: the directory; created if missing. An adapter in it is replaced.
      tree: unboxed parameters with adapters, or only those that are saved.
      lora: settings of the adapters.
      fingerprint: fingerprint of the base model's weights, by `weights_fingerprint`; with it,
        `load_adapter` can reject another base model.
      base: name of the base model, for information.
      memory: fields of the DecoderConfig that the adapters were trained with (`MEMORY_FIELDS`).
      others: paths of parameters that were trained, too, such as norms.
      dtype: what the adapters are stored in, "float32" or "bfloat16".

    Raises:
      ConfigError: there are no adapters, or the directory cannot be written.
    """
    flat = flatten_dict(tree, sep="/")
    paths = [ours for ours in _THEIRS if f"{ours}/lora_a" in flat]
    if not paths:
        raise ConfigError("The parameters contain no LoRA adapters to save.")
    tensors = {}
    for ours in paths:
        a, b = (np.asarray(flat[f"{ours}/{name}"], jnp.dtype(dtype)) for name in ("lora_a", "lora_b"))
        for layer in range(len(a)):
            name = f"base_model.model.model.layers.{layer}.{_THEIRS[ours]}"
            down, up = a[layer].reshape(-1, lora.rank), b[layer].reshape(lora.rank, -1)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up.T)
    for ours in (path for path in flat if of_memory(path) or path in others):
        tensors[OURS + ours] = np.asarray(flat[ours], np.float32, order="C")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [_THEIRS[ours].split(".")[1] for ours in paths],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        MEMORY: None if memory is None else dict(memory),
    }
    _write(path, config, tensors, fingerprint)


def average_adapters(path, adapters: Sequence, weights: Sequence[float] | None = None) -> None:
    """Save the weighted mean of all parameters of several adapters, as one adapter ("model soup").

    The mean is taken of the two factors of each adapter, so they must have begun as the same adapter, or
    be of one run. Tensors keep the dtype of the first one's. Source: arXiv 2203.05482; for an adapter and
    what it became in further training, arXiv 2109.01903.

    Args:
      path: the directory; created if missing. An adapter in it is replaced.
      adapters: at least two directories, or names of adapters that come with famx.
      weights: positive weight of each; they need not sum to 1. None: all are equal.

    Raises:
      ConfigError: an adapter is missing or damaged, they do not fit together, or it cannot be written.
    """
    if len(adapters) < 2:
        raise ConfigError("Give at least two adapters to average.")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise ConfigError(
            f"There are {len(adapters)} adapters and {len(weights)} weights: give one for each."
        )
    directories = [adapter_directory(adapter) for adapter in adapters]
    several = [_read(directory) for directory in directories]
    fingerprint = next((saved.fingerprint for saved in several if saved.fingerprint), None)
    first = several[0]._replace(fingerprint=fingerprint)
    for directory, other in zip(directories[1:], several[1:], strict=True):
        if (difference := _difference(first, other)) is not None:
            raise ConfigError(
                f"The adapters {directories[0]} and {directory} cannot be averaged: {difference}."
            )
    total, mean = sum(weights), {}
    for name, dtype in first.dtypes.items():
        parts = zip(weights, several, strict=True)
        mean[name] = sum(w / total * saved.tensors[name] for w, saved in parts).astype(dtype)
    _write(path, read_object(directories[0] / CONFIG), mean, fingerprint)


def _difference(first: _Saved, other: _Saved) -> str | None:
    """Why an adapter cannot be averaged with the first one; None if it can."""
    for name in ("r", "lora_alpha", "use_rslora", MEMORY):  # the tensors tell the targets
        one, two = (getattr(saved.config, name) for saved in (first, other))
        if one != two:
            return f"{name} of {CONFIG} is {shown(one)} in the first and {shown(two)} in the other"
    one, two = first.fingerprint, other.fingerprint
    if one and two and one != two:
        return f"they belong to base models with the fingerprints {one[:12]} and {two[:12]}"
    for name in sorted(first.tensors.keys() ^ other.tensors.keys()):
        return f"only {'the first' if name in first.tensors else 'the other'} has {name}"
    for name, tensor in first.tensors.items():
        one, two = list(tensor.shape), list(other.tensors[name].shape)
        if one != two:
            return f"{name} has the shape {one} in the first and {two} in the other"
    return None


def _write(path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], fingerprint: str | None):
    """Writes the files of an adapter, and replaces those of an earlier one.

    Raises:
      ConfigError: they cannot be written.
    """
    import safetensors.numpy

    metadata = {"format": "pt"} | ({FINGERPRINT: fingerprint} if fingerprint else {})
    metadata[_CHECKSUM] = _checksum({name: config.get(name) for name in _CHECKED}, tensors)
    path = as_path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The adapter cannot be written to {path}: {error.strerror}.") from error
    write_bytes(path / WEIGHTS, safetensors.numpy.save(tensors, metadata))
    write_json(path / CONFIG, config)


def check_adapter(path) -> bool:
    """Whether an adapter has a checksum, which fits; False for one made by PEFT or an older famx.

    Raises:
      ConfigError: there is no adapter, or it is damaged.
    """
    import safetensors

    path = adapter_directory(path)
    _read(path)
    with local_copy(path / WEIGHTS) as local, safetensors.safe_open(local, "np") as file:
        return _CHECKSUM in (file.metadata() or {})


def adapter_memory(path) -> dict[str, Any]:
    """Fields of the DecoderConfig that an adapter was trained with; empty for an adapter made by PEFT.

    Raises:
      ConfigError: there is no adapter, or it is damaged.
    """
    path = adapter_directory(path)
    return dict(_read(path).config.famx_memory or {})


def check_continued(path, lora: Lora | None) -> None:
    """Raises ConfigError if adapters with these settings cannot begin as a saved one; reads no weights.

    Args:
      path: the directory of the saved adapter.
      lora: settings of the adapters that are to begin; None if there are none.
    """
    path = adapter_directory(path)
    try:
        config = read_adapter_config(path)
    except FileNotFoundError:
        raise _missing(path) from None
    alpha = _alpha(config)
    if lora is None:
        raise ConfigError(f"The adapter {path} needs adapters to begin with it: set TRAINABLE='lora'.")
    if lora.rank != config.r or not math.isclose(lora.scale, alpha / config.r):
        raise ConfigError(
            f"The adapter {path} has rank {config.r} and alpha {alpha:g}, the run's adapters have rank"
            f" {lora.rank} and alpha {lora.scale * lora.rank:g}: set Lora.rank={config.r} and"
            f" Lora.alpha={alpha:g}."
        )


def check_base(path, fingerprint: str) -> None:
    """Raises ConfigError if an adapter names the fingerprint of its base model, and it is another."""
    import safetensors

    path = adapter_directory(path)
    with local_copy(path / WEIGHTS) as local, safetensors.safe_open(local, "np") as file:
        _check_base(path, fingerprint, (file.metadata() or {}).get(FINGERPRINT))


def load_adapter(path, params, fingerprint: str | None = None) -> tuple[dict[str, Any], Lora]:
    """Load an adapter, saved by famx or PEFT, for a base model.

    Args:
      path: the directory.
      params: parameters of the base model; only their shapes are used.
      fingerprint: fingerprint of the base model, compared with the saved one if there is one.

    Returns:
      `(tree, lora)`: the adapters, any parameters of the memory and norms, numpy float32, for `combine`;
      and the adapters' settings.

    Raises:
      ConfigError: there is no adapter, it is damaged, it uses unsupported options, or it does not fit the
        base model.
    """
    path = adapter_directory(path)
    config, tensors, _, saved = _read(path)
    _check_base(path, fingerprint, saved)
    kernels, parts, adapters = select(params, tuple(GROUPS)), {}, {}  # parts: tensors by path and layer
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if name.startswith(OURS):
            continue
        if match and _OURS.get(match[2]) in kernels:
            parts.setdefault(_OURS[match[2]], {})[match[3], int(match[1])] = tensor
        else:
            raise ConfigError(f"The adapter {path} has {name}, which the base does not have.")
    rank = config.r
    for ours, layers in parts.items():
        shape, n = value(kernels[ours]).shape, inputs_end(ours)
        width, out = math.prod(shape[1:n]), math.prod(shape[n:])
        label = f"{path}: {_THEIRS[ours]}"
        a = _stack(layers, "A", shape[0], (rank, width), label)
        b = _stack(layers, "B", shape[0], (out, rank), label)
        adapters[f"{ours}/lora_a"] = a.reshape(*shape[:n], rank)
        adapters[f"{ours}/lora_b"] = b.reshape(shape[0], rank, *shape[n:])
    for name in tensors:
        if name.startswith(OURS):
            adapters[name.removeprefix(OURS)] = _own_parameter(tensors[name], name, params, path)
    alpha = _alpha(config)
    alpha = None if alpha == rank else alpha
    lora = Lora(rank, alpha, config.lora_dropout or 0.0, _targets(parts, kernels))
    return unflatten_dict(adapters, sep="/"), lora


def _read(path: pathlib.Path) -> _Saved:
    """The adapter in a directory; ConfigError if there is none, or it is damaged."""
    import safetensors

    try:
        config = read_adapter_config(path)
        with local_copy(path / WEIGHTS) as local, safetensors.safe_open(local, "np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        tensors = {name: _float32(tensor, name) for name, tensor in stored.items()}
    except FileNotFoundError:
        raise _missing(path) from None
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"The adapter {path} is damaged: {WEIGHTS} cannot be read: {shown(str(error), 200)}."
        ) from None
    checked = {name: getattr(config, name) for name in _CHECKED}
    if metadata.get(_CHECKSUM) not in (None, _checksum(checked, stored)):
        raise ConfigError(
            f"The adapter {path} is not as it was saved, the checksum of {WEIGHTS} and {CONFIG} does not"
            " fit: copy both again."
        )
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    return _Saved(config, tensors, dtypes, metadata.get(FINGERPRINT))


def _check_base(path: pathlib.Path, fingerprint: str | None, saved: str | None) -> None:
    if fingerprint and saved and fingerprint != saved:
        raise ConfigError(
            f"The adapter {path} was trained on another base model (fingerprint {saved[:12]}, this one"
            f" has {fingerprint[:12]}): load it with the model that it was trained on."
        )


def _missing(path: pathlib.Path) -> ConfigError:
    return ConfigError(
        f"There is no adapter in {path}: it must contain {CONFIG} and {WEIGHTS}. Those that come with"
        f" famx, by their names: {', '.join(_shipped()) or 'none'}."
    )


def _alpha(config: AdapterConfig) -> float:
    """Numerator of the scale `alpha / rank`."""
    return config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)


def _checksum(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    fields = {**fields, "lora_alpha": float(fields["lora_alpha"])}
    return checksum(json.loads(json.dumps(fields)), tensors)


def _float32(tensor: np.ndarray, name: str) -> np.ndarray:
    """A tensor of an adapter in float32; ValueError if it has other values than finite numbers."""
    if tensor.dtype.name not in _DTYPES:
        raise ValueError(f"{name} is of type {tensor.dtype.name}")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} has values that are not finite")
    return tensor


def _stack(parts, letter: str, layers: int, shape, label: str):
    """Transpose and stack the tensors of all layers: `[layers, *reversed(shape)]`.

    Raises:
      ConfigError: a layer is missing, there are more layers than in the base, or a tensor is not of
        `shape`.
    """
    deepest = max(layer for _, layer in parts) + 1
    if deepest > layers:
        raise ConfigError(f"The adapter {label} is for {deepest} layers, but the base has {layers}.")
    tensors = []
    for layer in range(layers):
        tensor = parts.get((letter, layer))
        if tensor is None:
            raise ConfigError(
                f"The adapter {label} has no lora_{letter} for layer {layer}: the base has more"
                " layers than the adapter, or the adapter is incomplete."
            )
        if tensor.shape != shape:
            raise ConfigError(
                f"The adapter {label} has a lora_{letter} of shape {list(tensor.shape)}, where the"
                f" base needs {list(shape)}: it belongs to another model."
            )
        tensors.append(tensor.T)
    return np.stack(tensors)


def _own_parameter(tensor, name: str, params, path):
    """Parameter that is no adapter; ConfigError if the base has none of this name and shape."""
    ours = name.removeprefix(OURS)
    wanted = flatten_dict(params, sep="/").get(ours)
    if wanted is None:
        raise ConfigError(
            f"The adapter {path} has {ours}, a parameter of its memory, but the base has no such memory:"
            " give the base the memory that the adapter was trained with."
        )
    if tensor.shape != value(wanted).shape:
        raise ConfigError(
            f"{ours} of the adapter {path} has shape {list(tensor.shape)}, but that of the base"
            f" {list(value(wanted).shape)}: give the base the memory that the adapter was trained with."
        )
    return tensor


def _targets(adapted, kernels) -> tuple[str, ...]:
    """`Lora.targets` of the adapted paths: the complete groups, and the other paths."""
    complete = [
        group for group, paths in GROUPS.items() if {p for p in paths if p in kernels} <= set(adapted)
    ]
    rest = [path for path in kernels if path in adapted and not any(path in GROUPS[g] for g in complete)]
    return (*complete, *rest)
