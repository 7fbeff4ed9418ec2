"""Attention backends: which one can compute a model's attention on a device."""

import importlib.util

import jax

from famx.base.chips import find
from famx.base.errors import ConfigError

ATTENTION_BACKENDS = ("auto", "xla", "blockwise", "splash", "cudnn", "tokamax")
LANES = 128  # lanes of a TPU's vector registers; splash attention tiles rows and columns by them
WIDTHS = 8  # cuDNN's heads are a multiple of this wide
_PLATFORMS = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}
_WIDEST = 256
_NARROW = 128  # head_dim up to which cuDNN computes on any GPU; wider heads need compute capability 9.0
_HOPPER = (9, 0)


def kernel_width(config) -> int:
    """Width of the heads in a fused kernel, with what `column_dimensions` adds."""
    memory = config.memory
    more = WIDTHS * (memory.has_column_bias or memory.masks_columns)
    return config.head_dim * (1 + memory.plain_columns) + more


def refusal(config, backend: str) -> str | None:
    """One sentence that says why `backend` cannot compute this model's attention, or None.

    Args:
      config: a `DecoderConfig`, possibly not yet checked.
      backend: other than "auto".
    """
    name = f"attention_backend {backend!r}"
    if backend == "splash":
        if config.block_size % LANES:
            return f"{name} needs a block_size that is a multiple of {LANES}, got {config.block_size}."
        if config.dtype == "float64":
            return f"{name} accumulates in float32: set dtype to bfloat16 or float32, not float64."
    if backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return f"{name} needs the package tokamax: pip install 'famx[tokamax]', or choose auto."
    if backend == "cudnn":
        if config.dtype != "bfloat16":
            return f"{name} computes in bfloat16 only: set dtype to bfloat16, not {config.dtype}."
        if config.attention_softcap is not None:
            return (
                f"{name} does not support attention_softcap {config.attention_softcap}: set it to None."
            )
        if config.head_dim % WIDTHS or config.head_dim > _WIDEST:
            return (
                f"{name} needs a head_dim that is a multiple of {WIDTHS} up to {_WIDEST}, got"
                f" {config.head_dim}."
            )
        if kernel_width(config) > _WIDEST:
            return (
                f"{name} has no room for what the memory's columns need beside a head_dim of"
                f" {config.head_dim}: choose auto or xla."
            )
        if config.window_mask and not config.memory_segments:
            return f"{name} does not support window_mask without memory_segments: choose xla."
    return None


def resolve_backend(config, device, devices: int = 1) -> str:
    """The attention backend of a program for `devices` devices like `device`; never "auto".

    Args:
      config: a `DecoderConfig`.
      device: one of the devices that the program is compiled for, which are not always those where it
        is compiled: a `jax.Device`, or what a mesh knows of it (`jax.sharding.AbstractDevice`).
      devices: number of devices of all processes.

    Raises:
      ConfigError: the config names a backend that the device does not have.
    """
    backend, platform = config.attention_backend, device.platform
    wide = kernel_width(config) > _NARROW
    if backend != "auto":
        platforms = _PLATFORMS.get(backend, (platform,))
        if platform not in platforms:
            raise ConfigError(
                f"attention_backend {backend!r} runs on {platforms[0].upper()} alone, not on"
                f" {platform.upper()}: choose auto or xla."
            )
        if backend == "cudnn" and wide and _computes_wide_heads(device) is False:
            raise ConfigError(
                f"attention_backend 'cudnn' needs a Hopper GPU or a later one for head_dim"
                f" {kernel_width(config)}, more than {_NARROW}, not {device.device_kind}: choose auto or"
                " xla."
            )
        return backend
    if platform == "tpu" and refusal(config, "splash") is None:
        return "splash"
    if platform in _PLATFORMS["cudnn"] and refusal(config, "cudnn") is None:
        if not wide or _computes_wide_heads(device):
            return "cudnn"
    # Small blocks fit the cache anyway; a sharded batch must not be read row by row.
    if platform == "cpu" and devices == 1 and config.block_size >= 128:
        return "blockwise"
    return "xla"


def _computes_wide_heads(device) -> bool | None:
    """Whether cuDNN computes wide heads on a GPU; None if that is not known.

    A mesh knows only the kind of its devices: a published one, or that of this process's devices.
    """
    chip = find(device.device_kind)
    if chip is not None:
        return chip.capability >= _HOPPER
    for local in jax.devices():
        if local.device_kind == device.device_kind and hasattr(local, "compute_capability"):
            return tuple(map(int, local.compute_capability.split("."))) >= _HOPPER
    return None
