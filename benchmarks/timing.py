"""Times of several functions, measured in turns so that a busy machine slows all of them alike."""

import contextlib
import dataclasses
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from famx.base.tables import number


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of some measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values) -> "Spread":
        lower, median, upper = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
        return cls(float(median), float(lower), float(upper))

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.lower)}, {number(self.upper)}]"


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of each function in each round, float64 `[rounds]`."""

    seconds: Mapping[str, np.ndarray]

    def spread(self, name: str, scale: float = 1.0) -> Spread:
        """Of the function's seconds times `scale`."""
        return Spread.of(self.seconds[name] * scale)

    def ratio(self, name: str, reference: str, scale: float = 1.0) -> Spread:
        """Of the quotients within a round, which slow changes of the load leave alone."""
        return Spread.of(self.seconds[name] / self.seconds[reference] * scale)


def interleave(functions: Mapping[str, Callable[[], Any]], repeats: int) -> Timings:
    """Calls every function once per round, in turns forwards and backwards, after a warm-up.

    Args:
      functions: by name; each must be compiled already and return the arrays to wait for.
      repeats: rounds that count.

    Raises:
      ValueError: if there is nothing to measure.
    """
    if repeats < 1 or not functions:
        raise ValueError(f"Nothing to measure: {len(functions)} functions, {repeats} repeats.")
    names = list(functions)
    seconds = {name: [] for name in names}
    for name in names:
        jax.block_until_ready(functions[name]())
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            began = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - began)
    return Timings({name: np.asarray(values) for name, values in seconds.items()})


def peak_memory(forget: bool = False) -> float:
    """The most MiB that this process has held, where Linux lets it forget the past: since then."""
    if forget:
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    affinity = getattr(os, "sched_getaffinity", None)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "load": load,
    }


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
