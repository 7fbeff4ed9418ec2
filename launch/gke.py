"""Launcher for TPU slices on Google Kubernetes Engine, through xpk.

    python -m launch.gke --config=launch/configs/gke_v5e_256.py --config.project=my-project \\
        --config.zone=us-west4-a --config.cluster=my-cluster --config.bucket=my-bucket \\
        --config.base_image=python:3.12 --config.name=fam \\
        --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR=/mnt/famx/fam --dry_run

Submits a workload, waits until it ends, and deletes it. Kubernetes restarts it after a preemption. With
--create_cluster the cluster is created first and the bucket attached to it.
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


def create_workload(config: ConfigDict, job: Job) -> list[str]:
    """Command that submits the training as a workload."""
    slices = [f"--tpu-type={config.accelerator}", f"--num-slices={config.num_slices}"]
    if config.image:
        # xpk runs the command in a subshell and sends it SIGTERM; `exec` lets Python receive the signal.
        image, command = [f"--docker-image={config.image}"], _train(job)
    else:
        image = [f"--base-docker-image={config.base_image}", f"--script-dir={job.stage}"]
        command = ["bash", "run.sh"]
    return _xpk(
        config, "workload", "create", f"--workload={job.name}", *slices, *image,
        f"--command=exec {shlex.join(command)}", f"--env-file={job.stage / 'environment.txt'}",
        f"--storage={_storage(config)}", f"--priority={config.priority}",
        f"--max-restarts={config.restarts}", f"--restart-on-exit-codes={','.join(map(str, RESTARTED))}",
        f"--termination-grace-period-seconds={_GRACE_SECONDS}",
    )  # fmt: skip


def _train(job: Job) -> list[str]:
    return job.train("python", "--multiprocess", f"--exit_code_if_stopped={STOPPED}")


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
    if "$(" in shlex.join(_train(job)):
        raise ConfigError("Kubernetes would expand $( ) in a gin binding: move it to a gin file.")
    commands.make_directory(job.stage)
    if config.base_image:
        wheel = add_wheel(config, job, commands)
        install = f'pip install --quiet "famx[{config.extras}] @ file://$PWD/"{shlex.quote(wheel)}'
        text = f"#!/bin/bash\nset -euo pipefail\n{install}\nexec {shlex.join(_train(job))}\n"
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
    estimate.show(config, job, commands)
    write_stage(config, job, commands)
    commands.environment.update(job.secret)
    for command in create_cluster(config) if _CREATE.value else []:
        if commands.run(*command):
            raise ConfigError(f"xpk failed to prepare the cluster {config.cluster}: see the lines above.")
    if commands.run(*create_workload(config, job)):
        raise ConfigError(f"xpk failed to submit {job.name}: see the lines above.")
    follow = ["kubectl", "logs", "--follow", f"--selector=xpk.google.com/workload={job.name},"
              "batch.kubernetes.io/job-completion-index=0"]  # fmt: skip
    commands.say(f"To follow the log of the first worker: {shlex.join(follow)}")
    delete = _xpk(config, "workload", "delete", f"--workload={job.name}", "--force")
    if not _WAIT.value:
        commands.say(f"To delete the workload: {shlex.join(delete)}")
        return 0
    try:
        code = commands.run(*_xpk(config, "workload", "list", f"--wait-for-job-completion={job.name}"))
    except KeyboardInterrupt:
        if DELETE.value == "always":
            commands.run(*delete)
        else:
            commands.say(f"The workload keeps running. To delete it: {shlex.join(delete)}")
        return 130
    if DELETE.value != "never":
        commands.run(*delete)
    return code


if __name__ == "__main__":
    run("gke", launch)
