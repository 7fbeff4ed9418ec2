"""Runs a grid of settings and seeds, each cell in a process of its own, and tabulates the results.

    python -m famx.ablate --gin_file=gin_configs/studies/memories.gin --processes=2

Cells that are complete are not run again, those that were stopped are resumed. The tasks of a Slurm
array, or of a Kubernetes job with an index, share the cells: each takes those of its number.
"""

import os
import sys

from absl import flags

from famx.base import gin_utils

_INDICES = (  # variables of the number of a task, and of the number of tasks
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)


def define_flags() -> None:
    flags.DEFINE_integer("processes", 1, "Cells that run at a time.", lower_bound=1)
    flags.DEFINE_integer("gpus", None, "Give each process one of this number of GPUs.", lower_bound=1)
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
    known = (pair for pair in _INDICES if set(pair) <= set(os.environ))
    index = next(((int(os.environ[task]), int(os.environ[count])) for task, count in known), (0, 1))
    sys.exit(commands.run(study, values.only, index, values.processes, values.gpus, values.dry_run))


if __name__ == "__main__":
    gin_utils.run(main, define_flags)
