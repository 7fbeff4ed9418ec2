"""Runs the cells of a study, each in a process of its own.

A cell that is complete is never run again; one that was stopped is resumed, since its command is that of
a run. A lock lets several runners, such as the tasks of a Slurm array, share a study.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import IO

import famx
from famx.base.files import write_json
from famx.base.text import clock
from famx.study.grid import Cell, Study

DONE, LOG = "cell.json", "log.txt"
_LOCK = "cell.lock"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_complete(cell: Cell) -> bool:
    """Whether the cell has run to its end."""
    return (cell.directory / DONE).is_file()


def command(cell: Cell) -> list[str]:
    """The command that runs a cell, or resumes it."""
    return [sys.executable, "-m", "famx.train", f"--gin_file={cell.gin_file}"]


class Runner:
    """Runs cells side by side.

    Args:
      study: the study.
      processes: number of cells that run at a time. On CPUs each process gets its part of the cores, as
        far as they go round.
      gpus: number of GPUs; each process then sees one of them. None: all processes see all devices.
      say: called with each line for the user.
    """

    def __init__(
        self,
        study: Study,
        processes: int = 1,
        gpus: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self._study, self._processes, self._gpus, self._say = study, processes, gpus, say
        self._free = list(range(processes))
        self._running: set[subprocess.Popen] = set()
        self._guard, self._stopped = threading.Lock(), False

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """Runs cells that are not complete; returns those that failed.

        Raises:
          ConfigError: a cell exists with other settings; known before anything runs.
        """
        for cell in cells:
            self._study.write_gin_file(cell)
        waiting = [cell for cell in cells if not is_complete(cell)]
        if len(waiting) < len(cells):
            self._say(f"{len(cells) - len(waiting)} of {len(cells)} cells are complete.")
        with concurrent.futures.ThreadPoolExecutor(self._processes) as pool:
            results = list(pool.map(self._run, waiting))
        return [cell for cell, code in zip(waiting, results, strict=True) if code]

    def stop(self) -> None:
        """Asks the running cells to save and stop, and begins no others."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _run(self, cell: Cell) -> int:
        """Exit code of a cell; 0 also if another runner has it."""
        with _locked(cell.directory / _LOCK) as mine:
            if self._stopped or is_complete(cell):
                return 0
            if mine is None:
                self._say(f"{cell.name}: runs elsewhere.")
                return 0
            with open(cell.directory / LOG, "ab") as log, self._place() as place:
                return self._train(cell, mine, log, place)

    def _train(self, cell: Cell, lock: IO[str], log: IO[bytes], place: int) -> int:
        began = time.monotonic()
        with self._guard:
            if self._stopped:
                return 0
            # The process holds the lock, too, should it live longer than this one. It has a session of
            # its own, or Ctrl-C in a terminal would reach it twice, which ends it without a checkpoint.
            process = subprocess.Popen(
                [*self._prefix(place), *command(cell)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment(place), pass_fds=[lock.fileno()], start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        self._say(f"{cell.name}: begins.")
        code = process.wait()
        with self._guard:
            self._running.discard(process)
            if self._stopped:
                return 0
        seconds = time.monotonic() - began
        if code:
            self._say(f"{cell.name}: failed with exit code {code}; see {cell.directory / LOG}.")
            return code
        about = {
            "choices": dict(cell.choices), "seed": cell.seed, "command": command(cell)[1:],
            "seconds": seconds, **versions(),
        }  # fmt: skip
        write_json(cell.directory / DONE, about)
        self._say(f"{cell.name}: complete after {clock(seconds)}.")
        return 0

    @contextlib.contextmanager
    def _place(self) -> Iterator[int]:
        """Index of a process among those that run side by side."""
        with self._guard:
            place = self._free.pop()
        try:
            yield place
        finally:
            with self._guard:
                self._free.append(place)

    def _environment(self, place: int) -> dict[str, str]:
        own = {} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": str(place % self._gpus)}
        return dict(os.environ) | own

    def _prefix(self, place: int) -> list[str]:
        """Puts the process on its own cores: two that share all of them take longer than one by one."""
        if self._gpus is not None or self._processes == 1 or not hasattr(os, "sched_getaffinity"):
            return []
        cores = sorted(os.sched_getaffinity(0))
        own = cores[place :: self._processes]
        if not own or len(own) == len(cores):
            return []
        return [sys.executable, "-c", _ON_CORES, ",".join(map(str, own))]


_ON_CORES = (
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(',')));"
    " os.execv(sys.argv[2], sys.argv[2:])"
)


def versions() -> dict[str, str]:
    """Versions of famx, Python and what a run computes with."""
    found = {"famx": famx.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_record(cell: Cell) -> dict:
    """What is recorded of a complete cell: choices, seed, command, seconds and versions."""
    return json.loads((cell.directory / DONE).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[IO[str] | None]:
    """The locked file, whose lock ends with the process however that ends; None: another has it."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file
