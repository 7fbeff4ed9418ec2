"""Launcher for Slurm GPU clusters: one process per node, with all GPUs of the node.

    python -m launch.slurm --config=launch/configs/slurm_8gpu.py --config.nodes=4 --config.name=fam \\
        --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR=/shared/runs/fam --dry_run

Writes a batch script and submits it. The processes find each other through Slurm's environment
variables. Before the time limit and on preemption the run saves a checkpoint, and the job is requeued.
With `--config.study_tasks=N` the gin files describe a study, and N tasks of an array share its cells.
`stage_dir` and MODEL_DIR must be on a file system shared by all nodes.
"""

import shlex

from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from launch.commands import Commands
from launch.job import RESTARTED, STOPPED, Job, run

_OPTIONS = ("time", "partition", "account", "qos", "constraint")


def batch_script(config: ConfigDict, job: Job) -> str:
    """The batch script for sbatch."""
    options = {
        "job-name": job.name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        **{name: config[name] for name in _OPTIONS if config[name]},
        "output": _log(job, "%A_%a" if config.study_tasks else "%j"),
        "open-mode": "append",  # a requeued job appends to its log
        "signal": f"TERM@{config.warning_seconds}",  # sent to the processes of srun, not to this script
    }
    if config.study_tasks:
        options["array"] = f"0-{config.study_tasks - 1}"
    if config.gpus_per_node:
        options["gpus-per-node"] = config.gpus_per_node
    if config.cpus_per_task:
        options["cpus-per-task"] = config.cpus_per_task
    if config.memory:
        options["mem"] = config.memory
    stopped = f"--exit_code_if_stopped={STOPPED}"
    if config.study_tasks:
        gpus = config.gpus_per_node  # a cell on each
        side_by_side = [f"--processes={gpus}", f"--gpus={gpus}"] if gpus else []
        command = job.study(config.python, stopped, *side_by_side)
    else:
        command = job.train(config.python, "--multiprocess", stopped)
    step = ["srun", "--wait=60"]
    if config.cpus_per_task:
        step += [f"--cpus-per-task={config.cpus_per_task}"]  # srun does not inherit it from sbatch
    # By default JAX gives each process of a Slurm job a single GPU.
    devices = "" if config.study_tasks else ",".join(map(str, range(config.gpus_per_node)))
    again = [f'[ "$code" -eq {code} ]' for code in RESTARTED]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" for name, value in options.items()),
            "#SBATCH --requeue",
            "set -u",
            "cancelled=",
            "trap 'cancelled=1' TERM  # by scancel, or by a preemption, which Slurm requeues itself",
            f"cd {shlex.quote(str(job.stage))} || exit 1",
            *([f". {shlex.quote(config.prologue)}"] if config.prologue else []),
            ". ./environment.sh",
            *([f"export JAX_LOCAL_DEVICE_IDS={devices}"] if devices else []),
            "code=0",
            f"{shlex.join([*step, *command])} || code=$?",
            f"if {{ {' || '.join(again)}; }} && [ -z \"$cancelled\" ] &&",
            f'   [ "${{SLURM_RESTART_COUNT:-0}}" -lt {config.restarts} ]; then',
            '  exec scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def _log(job: Job, number: str) -> str:
    return str(job.stage.parent / f"{job.stage.name}-{number}.log")


def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    """Writes and submits the batch script; returns the exit code of the launcher."""
    if any(c.isspace() or c == "%" for c in str(job.stage)):
        raise ConfigError(f"--config.stage_dir must not contain spaces or %, not {job.stage.parent}.")
    if config.prologue and any(c in config.prologue for c in "\n\r\0"):
        raise ConfigError("--config.prologue must be the path of a file.")
    commands.require("sbatch")
    queue = ("squeue", "--me", "--noheader", f"--name={job.name}", "--format=%i")
    if queued := commands.capture(*queue, assume="")[1]:
        raise ConfigError(
            f"Job {queued.split()[0]} is already named {job.name}: cancel it with scancel, or choose"
            " another --config.name."
        )
    commands.make_directory(job.stage)
    job.write_environment(commands)
    job.write_gin_files(commands)
    script = job.stage / "job.sh"
    commands.write(script, batch_script(config, job))
    code, out, error = commands.capture("sbatch", "--parsable", str(script), assume="JOB")
    if code:
        raise ConfigError(f"sbatch rejected the job: {error or out or f'exit code {code}'}")
    number = out.split(";")[0]
    log = _log(job, f"{number}_TASK" if config.study_tasks else number)
    commands.say(f"Submitted job {number}. Log: {log}. To cancel: scancel {number}")
    return 0


if __name__ == "__main__":
    run("slurm", launch)
