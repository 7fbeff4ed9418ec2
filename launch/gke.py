"""Launcher for TPU slices on Google Kubernetes Engine, through xpk.

    python -m launch.gke --config=launch/configs/gke_v5e_256.py --config.project=my-project \\
        --config.zone=us-west4-a --config.cluster=my-cluster --config.bucket=my-bucket \\
        --config.base_image=python:3.12 --config.name=fam \\
        --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR=/mnt/famx/fam --dry_run

Submits a workload, waits until it ends, and deletes it. Kubernetes restarts it after a preemption. With
--create_cluster the cluster is created first and the bucket attached to it. With
`--config.study_tasks=N` the gin files describe a study, and N workloads share its cells.
"""

import shlex

from absl import flags
from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from famx.base.signals import interrupt_on_sigterm
from launch import estimate
from launch.commands import Commands
from launch.job import DELETE, RESTARTED, STOPPED, Job, add_wheel, check_model_dir, run

_CREATE = flags.DEFINE_bool("create_cluster", False, "Create the cluster and attach the bucket first.")
_WAIT = flags.DEFINE_bool("wait", True, "Wait until the workload has ended.")

_MOUNT_OPTIONS = "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0"
_GRACE_SECONDS = 300  # seconds that a pod has to save a checkpoint before it is killed


def _xpk(config: ConfigDict, *words: str) -> list[str]:
    where = [f"--cluster={config.cluster}", f"--project={config.project}", f"--zone={config.zone}"]
    return ["xpk", *words, *where]


def _capacity(config: ConfigDict) -> str:
    if config.provisioning == "reserved":
        return f"--reservation={config.reservation}"
    return f"--{config.provisioning.replace('_', '-')}"


def create_cluster(config: ConfigDict) -> list[list[str]]:
    """Commands that create the cluster and attach the bucket to it."""
    slices = [f"--tpu-type={config.accelerator}", f"--num-slices={config.num_slices}", _capacity(config)]
    cluster = _xpk(config, "cluster", "create", *slices, "--enable-gcsfuse-csi-driver")
    bucket = _xpk(
        config, "storage", "attach", _storage(config), "--type=gcsfuse", f"--bucket={config.bucket}",
        f"--size={config.bucket_gigabytes}", f"--mount-point={config.mount}", "--readonly=false",
        "--auto-mount=false", f"--mount-options={_MOUNT_OPTIONS}",
    )  # fmt: skip
    return [cluster, bucket]


def _storage(config: ConfigDict) -> str:
    """Kubernetes name for the bucket: Kubernetes allows neither dots nor underscores in names."""
    return config.bucket.replace("_", "-").replace(".", "-")


def workloads(config: ConfigDict, job: Job) -> list[str]:
    """Names of the workloads: of a training run one, of a study one for each task."""
    tasks = config.study_tasks
    return [f"{job.name}-{task}" for task in range(tasks)] if tasks else [job.name]


def create_workload(config: ConfigDict, job: Job, name: str, task: int) -> list[str]:
    """Command that submits the training, or a task of a study, as a workload of this name."""
    slices = [f"--tpu-type={config.accelerator}", f"--num-slices={config.num_slices}"]
    if config.image:
        # xpk runs the command in a subshell and sends it SIGTERM; `exec` lets Python receive the signal.
        image, command = [f"--docker-image={config.image}"], _main(config, job, str(task))
    else:
        image = [f"--base-docker-image={config.base_image}", f"--script-dir={job.stage}"]
        command = ["bash", "run.sh", *([str(task)] if config.study_tasks else [])]
    return _xpk(
        config, "workload", "create", f"--workload={name}", *slices, *image,
        f"--command=exec {shlex.join(command)}", f"--env-file={job.stage / 'environment.txt'}",
        f"--storage={_storage(config)}", f"--priority={config.priority}",
        f"--max-restarts={config.restarts}", f"--restart-on-exit-codes={','.join(map(str, RESTARTED))}",
        f"--termination-grace-period-seconds={_GRACE_SECONDS}",
    )  # fmt: skip


def _main(config: ConfigDict, job: Job, task: str) -> list[str]:
    stopped = f"--exit_code_if_stopped={STOPPED}"
    if not config.study_tasks:
        return job.train("python", "--multiprocess", stopped)
    return job.study("python", stopped, f"--task={task}", f"--tasks={config.study_tasks}")


def write_stage(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Writes the contents of the image and the file of environment variables to the stage.

    Raises:
      ConfigError: a value cannot be passed through xpk or Kubernetes unchanged.
    """
    for name, value in (job.shown | job.secret).items():
        if any(c in value for c in '"\\'):  # xpk writes the value between quotes to a YAML file
            raise ConfigError(
                f"xpk cannot pass on the value of {name}, which contains a quote or a backslash."
            )
    if "$(" in shlex.join(_main(config, job, "")):
        raise ConfigError("Kubernetes would expand $( ) in a gin binding: move it to a gin file.")
    commands.make_directory(job.stage)
    if config.base_image:
        wheel = add_wheel(config, job, commands)
        install = f'pip install --quiet "famx[{config.extras}] @ file://$PWD/"{shlex.quote(wheel)}'
        # Quoted as it stands, and then the shell's own argument in its place.
        main = shlex.join(_main(config, job, "TASK")).replace("--task=TASK ", '--task="$1" ', 1)
        text = f"#!/bin/bash\nset -euo pipefail\n{install}\nexec {main}\n"
        commands.write(job.stage / "run.sh", text)
        job.write_gin_files(commands)
    # For a name without a value xpk takes the value from its own environment, so secrets stay out of
    # the file.
    lines = [f"{name}={value}\n" for name, value in job.shown.items()]
    lines += [f"{name}\n" for name in job.secret]
    commands.write(job.stage / "environment.txt", "".join(lines))


@interrupt_on_sigterm()
def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    """Submits the workload and waits for it; returns the exit code of the launcher."""
    check_model_dir(config, job)
    commands.require("xpk")
    if not config.study_tasks:  # its runs have gin files of their own
        estimate.show(config, job, commands)
    write_stage(config, job, commands)
    commands.environment.update(job.secret)
    for command in create_cluster(config) if _CREATE.value else []:
        if commands.run(*command):
            raise ConfigError(f"xpk failed to prepare the cluster {config.cluster}: see the lines above.")
    names = workloads(config, job)
    for task, name in enumerate(names):
        if commands.run(*create_workload(config, job, name, task)):
            raise ConfigError(f"xpk failed to submit {name}: see the lines above.")
    follow = ["kubectl", "logs", "--follow", f"--selector=xpk.google.com/workload={names[0]},"
              "batch.kubernetes.io/job-completion-index=0"]  # fmt: skip
    commands.say(f"To follow the log of the first worker: {shlex.join(follow)}")
    deletes = [_xpk(config, "workload", "delete", f"--workload={name}", "--force") for name in names]
    if not _WAIT.value:
        for delete in deletes:
            commands.say(f"To delete the workload: {shlex.join(delete)}")
        return 0
    codes = []
    try:
        for name in names:
            wait = f"--wait-for-job-completion={name}"
            codes.append(commands.run(*_xpk(config, "workload", "list", wait)))
    except KeyboardInterrupt:
        for delete in deletes:
            if DELETE.value == "always":
                commands.run(*delete)
            else:
                commands.say(f"The workload keeps running. To delete it: {shlex.join(delete)}")
        return 130
    for delete in deletes if DELETE.value != "never" else []:
        commands.run(*delete)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    run("gke", launch)
