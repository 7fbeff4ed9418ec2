"""Devices to compile for: TPU slices by name that need not exist, a machine's GPUs, virtual CPUs."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from famx.base.chips import TPUS, Chip, find
from famx.base.errors import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT}  # the usual ones
_CPU = Chip("cpu", 0.0, 0.0, 0.0)


def devices(topology: str, num_slices: int = 1) -> tuple[Sequence[jax.Device], Chip]:
    """The devices of a topology and their chip. To be called before JAX has looked for devices.

    Args:
      topology: a TPU slice such as "v5p:4x4x4", which only has to have a name; "gpu", those of this
        machine; "cpu:8", so many virtual devices of this machine.
      num_slices: so many TPU slices, joined by the data center network.

    Raises:
      ConfigError: there is no such topology, or what it takes to compile for it is missing.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices must be at least 1, not {num_slices}.")
    name, _, shape = topology.partition(":")
    if name in TPUS:
        found = _tpus(name, shape, num_slices)
    elif num_slices > 1:
        raise ConfigError(f"Only TPUs have several slices, and --topology={topology} has none.")
    elif topology == "gpu":
        found = _gpus()
    elif re.fullmatch(r"cpu:[1-9]\d*", topology):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        found = jax.devices("cpu")[: int(shape)]
        if len(found) < int(shape):
            raise ConfigError(f"Only {len(found)} CPU devices could be made, not {shape}.")
    else:
        raise ConfigError(f"There is no topology {topology!r}: {_known()}.")
    return found, find(found[0].device_kind) or _CPU


def _tpus(name: str, shape: str, num_slices: int) -> Sequence[jax.Device]:
    axes = len(SHAPES[name][0].split("x"))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{axes - 1}}}", shape):
        raise ConfigError(
            f"There is no topology {name}:{shape}: {name} slices have {axes} sizes, such as"
            f" {name}:{SHAPES[name][3]}; {_known()}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            'Compiling for a TPU needs its compiler, libtpu: pip install "famx[tpu]", or libtpu alone.'
        )
    jax.config.update("jax_platforms", "cpu")  # the compiler is all that is wanted of libtpu
    # It asks the cloud what machine it is on, and locks the chips of this machine, unless told not to.
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
            f"There is no topology {name}:{shape} ({str(error).splitlines()[0]}): {_known()}."
        ) from error


def _gpus() -> Sequence[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError as error:
        raise ConfigError(
            "--topology=gpu compiles for the GPUs of this machine, and JAX finds none:"
            ' pip install "famx[cuda13]" on a machine with one.'
        ) from error


def _known() -> str:
    tpus = "; ".join(f"{name}:" + ", ".join(shapes) for name, shapes in SHAPES.items())
    return f"known are {tpus}; gpu; cpu:N"
