"""Runs a grid of settings and seeds, each cell in a process of its own, and tabulates the results.

    famx ablate memories --gin.STUDY_DIR=/tmp/famx/memories --processes=2

Cells that are complete are not run again, those that were stopped are resumed. The tasks of a Slurm
array, or of a Kubernetes job with an index, share the cells: each takes those of its number. `--task` and
`--tasks` say the same where nothing else does; `launch.slurm` and `launch.gke` start such tasks.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define
from famx.base.ranges import NonNegative, Positive


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
        print(commands.tables(study, values.only))
        return
    options = (values.processes, values.gpus, values.dry_run)
    code = commands.run(study, values.only, commands.share(values.task, values.tasks), *options)
    sys.exit(values.exit_code_if_stopped or code if code > commands.STOPPED else code)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, argument="gin_file")
