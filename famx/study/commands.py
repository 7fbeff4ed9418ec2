"""What the command `famx ablate` does."""

import os
import re
import shlex

import gin

from famx.base import gin_checks
from famx.base.errors import ConfigError
from famx.base.signals import STOP_SIGNALS, handling
from famx.base.text import nearest
from famx.study import results
from famx.study.grid import Cell, Study, check_pattern
from famx.study.runner import Runner, command, is_complete

STOPPED = 128  # exit codes above are of signals
_INDICES = (  # variables of the number of a task, and of the number of tasks
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)


@gin.configurable
def study(study: Study) -> Study:
    """The study that the gin files describe.

    Raises:
      ConfigError: a value is not valid, or a binding has no effect.
    """
    gin_checks.check_all_used()
    return study


def tables(study: Study, only: str = "") -> str:
    """Writes the tables and figures of the cells whose names contain `only`; returns the summary."""
    return results.write(study, selected(study, only))


def share(task: int, tasks: int | None) -> tuple[int, int]:
    """Number of this task among those that share the cells, and number of tasks.

    Args:
      task, tasks: what the command line says; without `tasks`, variables of Slurm or Kubernetes count.

    Raises:
      ConfigError: there is no such task.
    """
    if tasks is not None:
        if task >= tasks:
            raise ConfigError(f"--task={task} must be below --tasks={tasks}.")
        return task, tasks
    known = (pair for pair in _INDICES if set(pair) <= set(os.environ))
    return next(((int(os.environ[task]), int(os.environ[count])) for task, count in known), (0, 1))


def run(
    study: Study, only: str, index: tuple[int, int], processes: int, gpus: int | None, dry_run: bool
) -> int:
    """Runs the cells and tabulates them; returns the exit code.

    Args:
      study: the study.
      only: regular expression that names of cells must contain.
      index: number of this task, and number of tasks that share the cells.
      processes, gpus: see `Runner`.
      dry_run: whether to print the commands alone.
    """
    cells = [cell for i, cell in enumerate(selected(study, only)) if i % index[1] == index[0] % index[1]]
    if dry_run:
        for cell in cells:
            done = "  # complete" if is_complete(cell) else ""
            print(f"{shlex.join(command(cell))}{done}")
        return 0
    runner = Runner(study, processes, gpus, lambda line: print(line, flush=True))
    stopped: list[int] = []

    def stop(number, frame):
        stopped.append(number)
        runner.stop()

    with handling(stop, STOP_SIGNALS):
        failed = runner.run(cells)
    if stopped:
        print("Stopped; the same command continues.", flush=True)
        return STOPPED + stopped[0]
    if any(map(is_complete, study.cells())):
        print(tables(study))
    return 1 if failed else 0


def selected(study: Study, only: str) -> list[Cell]:
    """The cells whose names contain the regular expression `only`."""
    check_pattern(only, f"--only={only}")
    found = [cell for cell in study.cells() if re.search(only, cell.name)]
    if not found:
        names = [cell.name for cell in study.cells()]
        raise ConfigError(
            f"--only={only} selects none of the {len(names)} cells.{nearest(only.strip('^$'), names)}"
            " --dry_run without --only lists their commands."
        )
    return found
