"""NVIDIA GPUs to compile for, without hardware: their description for XLA, and the tools it needs."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from famx.base.chips import find
from famx.base.errors import ConfigError

_KIB, _MIB = 2**10, 2**20
MOST_DEVICES = 8  # of one machine
_INSTALL = 'pip install "famx[cuda13-compiler]"'


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as XLA's compiler needs to know it; the rest of it is in `famx.base.chips`.

    Sources: NVIDIA's data sheets and architecture white papers (multiprocessors, clock, L2 cache); the
    table of technical specifications per compute capability of the CUDA programming guide (shared
    memory, lanes); for B200, whose multiprocessors and clock NVIDIA does not publish, what its driver
    reports.

    Attributes:
      kind: device kind, as JAX names it on such a device.
      cores: multiprocessors.
      lanes: float32 operations that a multiprocessor starts per clock.
      clock: highest clock rate in GHz.
      cache: bytes of the L2 cache.
      shared: KiB of shared memory of a multiprocessor. One block of threads can have 1 KiB less.
    """

    kind: str
    cores: int
    lanes: int
    clock: float
    cache: int
    shared: int

    @property
    def description(self) -> str:
        """The GPU as a `GpuTargetConfigProto` of XLA, in text format.

        Without the versions of driver, runtime and toolkit XLA assumes 0.0.0 and leaves library calls
        and copies out of CUDA graphs. The architecture-specific features of Hopper and Blackwell (sm_90a,
        sm_100a) are those that a device of this kind has.
        """
        chip = find(self.kind)
        major, minor = chip.capability
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        info = {
            "name": f'"{self.kind}"',
            "device_vendor": '"NVIDIA Corporation"',
            "cuda_compute_capability": (
                f"{{ major: {major} minor: {minor} feature_extension: {extension} }}"
            ),
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "clock_rate_ghz": self.clock,
            "l2_cache_size": self.cache,
            "memory_bandwidth": int(chip.bandwidth),
            "device_memory_size": int(chip.memory),
            "shared_memory_per_core": self.shared * _KIB,
            "shared_memory_per_block_optin": (self.shared - 1) * _KIB,
            **_ALIKE,
        }
        lines = "".join(f"  {name}: {value}\n" for name, value in info.items())
        major, minor, patch = _CUDNN
        return (
            f"gpu_device_info {{\n{lines}}}\n"
            'platform_name: "CUDA"\n'
            f"dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}\n"
            f'device_description_str: "{self.kind}"\n'
        )


_CUDA, _CUDNN = '"13.0.0"', (9, 12, 0)  # the oldest versions that JAX's wheels for CUDA 13 accept
# The same for every compute capability since 8.0.
_ALIKE = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 * _KIB,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "driver_version": _CUDA,
    "runtime_version": _CUDA,
    "compile_time_toolkit_version": _CUDA,
    "dnn_version": '"%d.%d.%d"' % _CUDNN,
}

GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 108, 64, 1.41, 40 * _MIB, 164),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 128, 1.98, 50 * _MIB, 228),
    "h200": Gpu("NVIDIA H200", 132, 128, 1.98, 50 * _MIB, 228),
    "b200": Gpu("NVIDIA B200", 148, 128, 1.965, 126 * _MIB, 228),
}


def devices(name: str, count: str) -> Sequence[jax.Device]:
    """`count` devices ("" is 1) of one machine of the GPU `name`, connected by NVLink.

    Raises:
      ConfigError: the count is wrong, or a part of the compiler is not installed.
    """
    if not re.fullmatch(r"[1-9]\d*", count or "1") or int(count or 1) > MOST_DEVICES:
        raise ConfigError(
            f"Unknown topology {name}:{count}: name the GPUs of one machine, {name} for one or up to"
            f" {name}:{MOST_DEVICES}."
        )
    _check_tools()
    jax.config.update("jax_platforms", "cpu")  # the plugin is needed only as a compiler
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[name].description, topology=f"1x1x{count or 1}"
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"The installed jax-cuda13-plugin does not compile for {name} ({str(error).splitlines()[0]}):"
            f" install the version of your JAX, {jax.__version__}, with {_INSTALL}."
        ) from error


def _check_tools() -> None:
    """Checks for JAX's CUDA plugin, and for ptxas and libdevice where JAX and XLA look for them."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ConfigError(
            f"Compiling for a GPU needs JAX's CUDA plugin, jax-cuda13-plugin: {_INSTALL}; no GPU or"
            " driver is needed."
        )
    roots = _toolkits()
    has = lambda *parts: any(root.joinpath(*parts).is_file() for root in roots)
    tools = {
        "the assembler ptxas": has("bin", "ptxas") or shutil.which("ptxas"),
        "the library libdevice": has("nvvm", "libdevice", "libdevice.10.bc"),
    }
    if missing := [tool for tool, found in tools.items() if not found]:
        raise ConfigError(
            f"Compiling for a GPU needs {' and '.join(missing)}: {_INSTALL}, or set CUDA_ROOT to the"
            " directory of a CUDA toolkit."
        )


def _toolkits() -> list[pathlib.Path]:
    """Directories in which a CUDA toolkit may be."""
    roots = [os.environ["CUDA_ROOT"]] if "CUDA_ROOT" in os.environ else []
    roots += re.findall(r"--xla_gpu_cuda_data_dir=(\S+)", os.environ.get("XLA_FLAGS", ""))
    if nvidia := importlib.util.find_spec("nvidia"):
        roots += [f"{place}/cu13" for place in nvidia.submodule_search_locations or ()]
    return [pathlib.Path(root) for root in (*roots, "/usr/local/cuda", "/opt/cuda")]
