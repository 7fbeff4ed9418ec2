"""Runs a grid of settings and seeds, each cell in a process of its own, and tabulates the results.

    python -m famx.ablate --gin_file=gin_configs/studies/memories.gin --processes=2

Cells that are complete are not run again, those that were stopped are resumed. The tasks of a Slurm
array, or of a Kubernetes job with an index, share the cells: each takes those of its number. `--task` and
`--tasks` say the same where nothing else does; `launch.slurm` and `launch.gke` start such tasks.
"""

import os
import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define
from famx.base.errors import ConfigError
from famx.base.ranges import NonNegative, Positive

_INDICES = (  # variables of the number of a task, and of the number of tasks
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)


def define_flags() -> None:
    define("processes", Positive, 1, "Cells that run at a time.")
    define("gpus", Positive, None, "Give each process one of this number of GPUs.")
    define("task", NonNegative, 0, "Number of this task among those that share the cells, from 0.")
    define("tasks", Positive, None, "Number of tasks that share the cells.")
    flags.DEFINE_integer(
        "exit_code_if_stopped", 0, "Exit code of a study that SIGTERM or SIGINT stopped early.", 0, 255
    )
    flags.DEFINE_string("only", "", "Regular expression that names of cells must contain.")
    flags.DEFINE_bool("dry_run", False, "Print the cells and their commands alone.")
    flags.DEFINE_bool("tables", False, "Write the tables of the cells that are complete; run nothing.")


def main() -> None:
    from famx.study import commands

    values = flags.FLAGS
    gin_utils.parse_gin_flags()
    study = gin_utils.call(commands.study)
    if values.tables:
        print(commands.tables(study))
        return
    options = (values.processes, values.gpus, values.dry_run)
    code = commands.run(study, values.only, _index(values.task, values.tasks), *options)
    sys.exit(values.exit_code_if_stopped or code if code > commands.STOPPED else code)


def _index(task: int, tasks: int | None) -> tuple[int, int]:
    """Number of this task, and number of tasks."""
    if tasks is not None:
        if task >= tasks:
            raise ConfigError(f"--task={task} must be below --tasks={tasks}.")
        return task, tasks
    known = (pair for pair in _INDICES if set(pair) <= set(os.environ))
    return next(((int(os.environ[task]), int(os.environ[count])) for task, count in known), (0, 1))


if __name__ == "__main__":
    gin_utils.run(main, define_flags)
