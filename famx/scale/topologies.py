"""Devices to compile for: TPU slices and GPUs by name, without hardware; this machine's; virtual CPUs."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from famx.base.chips import TPUS, Chip, find
from famx.base.errors import ConfigError
from famx.base.ranges import Positive
from famx.base.values import checked
from famx.scale import gpus

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT}  # examples for error messages
_CPU = Chip("cpu", 0.0, 0.0, 0.0)  # no published rates, so that no bounds are computed


@checked
def devices(topology: str, num_slices: Positive = 1) -> tuple[Sequence[jax.Device], Chip]:
    """Devices of a topology and their chip. Call it before JAX initialises its backends.

    Args:
      topology: a TPU slice such as "v5p:4x4x4", or GPUs of one machine such as "h100" or "h100:8",
        neither of which need exist; "gpu" for the GPUs of this machine; "cpu:8" for 8 virtual CPU
        devices.
      num_slices: number of TPU slices, connected by the data center network.

    Raises:
      ConfigError: the topology is unknown, or its compiler or device is missing.
    """
    name, _, shape = topology.partition(":")
    if name in TPUS:
        selected = _tpus(name, shape, num_slices)
    elif num_slices > 1:
        raise ConfigError(f"--num_slices is for TPUs only, not for --topology={topology}.")
    elif name in gpus.GPUS and topology != f"{name}:":
        selected = gpus.devices(name, shape)
    elif topology == "gpu":
        selected = _gpus()
    elif re.fullmatch(r"cpu:[1-9]\d*", topology):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        selected = jax.devices("cpu")[: int(shape)]
        if len(selected) < int(shape):
            raise ConfigError(f"JAX created only {len(selected)} of {shape} CPU devices.")
    else:
        raise ConfigError(f"Unknown topology {topology!r}: {_known()}.")
    return selected, find(selected[0].device_kind) or _CPU


def _tpus(name: str, shape: str, num_slices: int) -> Sequence[jax.Device]:
    axes = len(SHAPES[name][0].split("x"))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{axes - 1}}}", shape):
        raise ConfigError(
            f"Unknown topology {name}:{shape}: {name} slices have {axes} dimensions, such as"
            f" {name}:{SHAPES[name][3]}; {_known()}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            'Compiling for a TPU needs its compiler, libtpu: pip install "famx[tpu]", or only libtpu.'
        )
    jax.config.update("jax_platforms", "cpu")  # libtpu is needed only as a compiler
    # Otherwise libtpu queries the cloud's metadata server and locks the TPU chips of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # one device per chip
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{shape}", **options
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            f"Unknown topology {name}:{shape} ({str(error).splitlines()[0]}): {_known()}."
        ) from error


def _gpus() -> Sequence[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError as error:
        raise ConfigError(
            "--topology=gpu compiles for the GPUs of this machine, but JAX finds none: use a machine"
            ' with a GPU, and pip install "famx[cuda13]".'
        ) from error


def _known() -> str:
    tpus = "; ".join(f"{name}:" + ", ".join(shapes) for name, shapes in SHAPES.items())
    named = ", ".join(gpus.GPUS)
    return f"use one of {tpus}; {named}, alone or as h100:8; gpu; cpu:N"
