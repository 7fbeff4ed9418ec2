"""How the processes that train one model together find each other.

    famx train FILE --multiprocess ...                         on TPU, GKE or Slurm
    famx train FILE --coordinator_address=host:1234 --num_processes=2 --process_id=0 ...

The first form detects the cluster that it runs on; the second works everywhere, with one command per
process. `launch/` writes these commands.
"""

import math
import re
import signal
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from famx.base.errors import ConfigError
from famx.base.native_stderr import stdout_to_stderr

_SENTENCE_BYTES = 4096


def initialize(
    multiprocess: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    limit: float = 60.0,
    start: float = 300.0,
) -> None:
    """Joins the other processes of a run, if there are any; to be called before jax creates its devices.

    Args:
      multiprocess: whether to detect the other processes of a TPU slice, GKE job or Slurm step.
      coordinator_address: `HOST:PORT` of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      limit: seconds without a sign of life after which a process counts as lost, see
        `famx.base.peers`, which is to notice it before jax does.
      start: seconds in which all processes must have started.

    Raises:
      ConfigError: the arguments do not fit together, or `multiprocess` detects no cluster.
    """
    if not (limit > 0 and start > 0):
        raise ConfigError(
            f"--peer_timeout_seconds and --start_timeout_seconds must be above 0, not {limit:g} and"
            f" {start:g}."
        )
    waits = {
        "heartbeat_timeout_seconds": math.ceil(2 * limit) + 10,
        "initialization_timeout": math.ceil(start),
    }
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        if multiprocess:
            _detect(waits)
        return
    if multiprocess:
        raise ConfigError(
            "--multiprocess finds the other processes by itself: leave out --coordinator_address,"
            " --num_processes and --process_id, or leave out --multiprocess."
        )
    if None in given:
        raise ConfigError("Give all of --coordinator_address, --num_processes and --process_id, or none.")
    address, count, index = given
    if not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
        raise ConfigError(f"--coordinator_address must be HOST:PORT, not {address}.")
    if count < 1:
        raise ConfigError(f"--num_processes must be at least 1, not {count}.")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id {index} must lie between 0 and {count - 1}, the last process.")
    _join(address, count, index, cluster_detection_method="deactivate", **waits)


def _join(*args, **kwargs) -> None:
    stdout_to_stderr()  # Gloo greets there
    jax.distributed.initialize(*args, **kwargs)
    # jax now handles SIGTERM; until training begins, SIGTERM should end the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _detect(waits: Mapping[str, int]) -> None:
    try:
        _join(**waits)
    except ValueError as error:
        if "must be defined" not in str(error) and "should be defined" not in str(error):
            raise
        raise ConfigError(
            "--multiprocess detected no TPU slice, GKE job or Slurm step: start the command within one of"
            " these, or give --coordinator_address, --num_processes and --process_id."
        ) from error


def on_host(array) -> np.ndarray:
    """An array in the memory of this process.

    If the devices of several processes hold it in parts, all of them must call this.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def agreed(sentence: str | None) -> str | None:
    """The sentence of the first process that has one, the same in all; waits for all processes."""
    if jax.process_count() == 1:
        return sentence
    data = (sentence or "").encode()[:_SENTENCE_BYTES]
    row = np.zeros(_SENTENCE_BYTES, np.uint8)
    row[: len(data)] = list(data)
    rows = multihost_utils.process_allgather(row)
    sentences = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows)
    return next(filter(None, sentences), None)
