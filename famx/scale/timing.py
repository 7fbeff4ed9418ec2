"""Timing of several functions in turns, so that load on the machine slows all of them alike."""

import contextlib
import dataclasses
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from famx.base.tables import number


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of a set of measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values) -> "Spread":
        """Computes median and quartiles of an array."""
        lower, median, upper = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
        return cls(float(median), float(lower), float(upper))

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.lower)}, {number(self.upper)}]"


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds per function and round: `{name: float64 [rounds]}`."""

    seconds: Mapping[Hashable, np.ndarray]

    def spread(self, name: Hashable, scale: float = 1.0) -> Spread:
        """Spread of the function's seconds, multiplied by `scale`."""
        return Spread.of(self.seconds[name] * scale)

    def ratio(self, name: Hashable, reference: Hashable, scale: float = 1.0) -> Spread:
        """Spread of `scale * seconds[name] / seconds[reference]`.

        Quotients are taken within each round, so that slow changes of the load cancel.
        """
        return Spread.of(self.seconds[name] / self.seconds[reference] * scale)


def interleave(
    functions: Mapping[Hashable, Callable[[], Any]], repeats: int, warm_up: bool = True
) -> Timings:
    """Times every function once per round.

    Every second round runs in reverse order, so that no function always follows the same one.

    Args:
      functions: `{name: function}`; each must already be compiled, and return the arrays to wait for.
      repeats: number of timed rounds.
      warm_up: call each function once before, untimed.

    Raises:
      ValueError: there are no functions or no rounds.
    """
    if repeats < 1 or not functions:
        raise ValueError(f"Nothing to measure: {len(functions)} functions, {repeats} repeats.")
    names = list(functions)
    seconds = {name: [] for name in names}
    for name in names if warm_up else ():
        jax.block_until_ready(functions[name]())
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            began = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - began)
    return Timings({name: np.asarray(values) for name, values in seconds.items()})


def peak_memory(forget: bool = False) -> float:
    """Peak resident memory of this process in MiB.

    Args:
      forget: reset the peak first, so that later calls report the peak since then. Linux only.
    """
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
    """Description of this machine and its load average, for the notes of a table."""
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
