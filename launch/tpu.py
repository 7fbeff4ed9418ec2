"""Launcher for Cloud TPU slices, through queued resources.

    python -m launch.tpu --config=launch/configs/v5e_256.py --config.project=my-project \\
        --config.zone=us-west4-a --config.bucket=my-bucket --config.name=fam \\
        --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR=gs://my-bucket/fam --dry_run

Requests the slices, waits for them, copies famx and the gin files, installs them, trains on all workers,
prints the output of worker 0, restarts after a preemption, and deletes the slices at the end. The logs of
all workers are kept in the bucket, and the last lines of those that fail are printed. Each step first
checks the current state, so that the same command resumes an interrupted launch or attaches to a training
run in progress.
"""

import pathlib
import re
import shlex
import time

from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from famx.base.signals import interrupt_on_sigterm
from launch import estimate
from launch.commands import Commands
from launch.job import DELETE, RESTARTED, STOPPED, Job, add_wheel, check_model_dir, run

# States of a queued resource.
_LOST = ("FAILED", "SUSPENDED")
_GOING_AWAY = ("SUSPENDING", "DELETING")
_ALPHA = ("reservation", "provisioning-model", "max-run-duration")  # flags of `gcloud alpha` alone
_LAST_LINES = 30  # of a worker's log that are shown if it failed
_ATTEMPTS = 3  # per command: new workers refuse connections until their ssh keys have arrived
_MAX_UNANSWERED = 10  # consecutive status queries that worker 0 may fail to answer
_WORKER = pathlib.Path(__file__).with_name("worker.sh")


class TrainingLost(ConfigError):
    """The run cannot be continued automatically, and deleting the slices would lose no running work."""


class Slices:
    """A queued resource and the training run on its workers.

    Attributes:
      config, job, commands: as for every launcher.
      requested: whether this launch requested the slices or found them.
    """

    def __init__(self, config: ConfigDict, job: Job, commands: Commands):
        self.config, self.job, self.commands = config, job, commands
        self.requested = False

    # ---------------------------------------------------------------- the queued resource

    def gcloud(self, action: str, *words: str) -> list[str]:
        """Command that performs an action on queued resources."""
        where = [f"--project={self.config.project}", f"--zone={self.config.zone}", "--quiet"]
        new = any(word.startswith(f"--{name}=") for word in words for name in _ALPHA)
        track = ["alpha"] if new and action == "create" else []
        return ["gcloud", *track, "compute", "tpus", "queued-resources", action, *words, *where]

    def state(self, assume: str) -> str:
        """State of the queued resource, such as ACTIVE; '' if it does not exist.

        In a dry run the result is `assume`.
        """
        command = self.gcloud("describe", self.job.name, "--format=value(state.state)")
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self.config.poll_seconds)
            code, state, error = self.commands.capture(*command, assume=assume)
            if code == 0 or "NOT_FOUND" in error:
                return "" if code else state
        raise ConfigError(f"gcloud failed to describe {self.job.name}: {error or f'exit code {code}'}")

    def create(self) -> None:
        """Requests the slices."""
        config = self.config
        words = [f"--accelerator-type={config.accelerator}"]
        words += [f"--runtime-version={config.runtime_version}"]
        if config.num_slices == 1:
            words += [f"--node-id={config.name}"]
        else:
            words += [f"--node-count={config.num_slices}", f"--node-prefix={config.name}"]
        if config.provisioning == "flex_start":
            words += ["--provisioning-model=flex-start", f"--max-run-duration={config.max_run_duration}"]
        elif config.reservation:
            words += [f"--reservation={config.reservation}"]
        elif config.provisioning != "on_demand":
            words += [f"--{config.provisioning}"]
        if config.labels:
            pairs = [f"{name}={config.labels[name]}" for name in sorted(config.labels)]
            words += [f"--labels={','.join(pairs)}"]
        for name in ("network", "subnetwork", "service_account", "valid_until_duration"):
            if config[name]:
                words += [f"--{name.replace('_', '-')}={config[name]}"]
        if config.internal_ips:
            words += ["--internal-ips"]
        if self.commands.run(*self.gcloud("create", config.name, *words)):
            raise ConfigError(f"gcloud failed to request {config.accelerator}: see the lines above.")

    def delete(self) -> None:
        """Deletes the slices."""
        self.commands.run(*self.gcloud("delete", self.job.name, "--force"))

    def obtain(self) -> bool:
        """Requests the slices if they do not exist, and waits until they are active.

        Returns:
          False if they were lost while waiting, for example by a preemption.
        """
        while (state := self.state(assume="")) in _GOING_AWAY:
            time.sleep(self.config.poll_seconds)
        if state in _LOST:
            self.delete()
            state = ""
        if not state:
            if not self.requested:  # a request after a preemption needs no second estimate
                estimate.show(self.config, self.job, self.commands)
            self.requested = True
            self.create()
        self.requested = True
        last_state = None
        while (state := self.state(assume="ACTIVE")) != "ACTIVE":
            if state in (*_LOST, *_GOING_AWAY, ""):
                self.commands.say(f"{self.job.name} is {state or 'gone'}.")
                return False
            if state != last_state:
                self.commands.say(f"{self.job.name} is {state}.")
                last_state = state
            time.sleep(self.config.poll_seconds)
        return True

    # ---------------------------------------------------------------- its workers

    def ssh(self, *words: str, all_workers: bool) -> list[str]:
        """Command that runs `worker.sh WORDS` on all workers, or on worker 0 of the first slice."""
        which = "all" if all_workers else "0"
        remote = shlex.join(["bash", f"{self.job.stage.name}/worker.sh", *words])
        workers = [f"--node={which}", f"--worker={which}", *self._tunnel()]
        return self.gcloud("ssh", self.job.name, *workers, f"--command={remote}")

    def copy(self) -> list[str]:
        """Command that copies the stage to all workers."""
        workers = ["--node=all", "--worker=all", "--recurse", *self._tunnel()]
        return self.gcloud("scp", str(self.job.stage), f"{self.job.name}:", *workers)

    def _tunnel(self) -> list[str]:
        return ["--tunnel-through-iap"] if self.config.internal_ips else []

    def status(self, assume: str) -> str:
        """Status of the training process on worker 0.

        Returns:
          "absent" (never started), "running", "lost" (ended without an exit code), "exited CODE", or ''
          if the slices are no longer active. In a dry run, `assume`.

        Raises:
          ConfigError: worker 0 of an active slice does not answer.
        """
        command = self.ssh("status", all_workers=False)
        for _ in range(_MAX_UNANSWERED):
            code, out, error = self.commands.capture(*command, assume=assume)
            answer = out.splitlines()[-1].strip() if out else ""
            if code == 0 and re.fullmatch(r"absent|running|lost|exited \d+", answer):
                return answer
            if "worker.sh" in error and "No such file" in error:
                return "absent"
            if self.state(assume="ACTIVE") != "ACTIVE":
                return ""
            time.sleep(self.config.poll_seconds)
        raise ConfigError(f"Worker 0 of {self.job.name} does not answer: {error or out or 'no output'}")

    def run_on_workers(self, step: str, *command: str) -> bool:
        """Runs a command for all workers, repeating it if it fails.

        Returns:
          False if the slices were lost.

        Raises:
          TrainingLost: every attempt failed although the slices are active.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self.config.poll_seconds)
            if self.commands.run(*command) == 0:
                return True
            if self.state(assume="ACTIVE") != "ACTIVE":
                return False
        raise TrainingLost(f"{step} failed on the workers of {self.job.name}: see the lines above.")

    def run_once(self) -> int | None:
        """Starts training, or attaches to a run in progress, and prints the output of worker 0.

        Returns:
          The exit code of the training, or None if it should be restarted.
        """
        status = self.status(assume="absent")
        if status == "running":
            self.commands.say("A training run is already in progress: attaching to it.")
        elif not status or not (
            self.run_on_workers("Copying", *self.copy())
            and self.run_on_workers("Installing", *self.ssh("setup", all_workers=True))
            and self.run_on_workers("Starting", *self.ssh("start", all_workers=True))
        ):
            return None
        line = 1
        while True:
            line += self.commands.stream(*self.ssh("follow", str(line), all_workers=False))[1]
            status = self.status(assume="exited 0")
            if status != "running":
                break
            time.sleep(self.config.poll_seconds)  # only the connection was cut: follow again
        if status == "lost":
            self.show_failures()
        if not status.startswith("exited"):
            return None
        code = int(status.split()[1])
        if code in (0, 2):  # finished, or a mistake of the user: a restart would not change it
            return code
        if code != STOPPED:
            self.show_failures()
        # Codes above 127 are deaths by a signal, as when a worker is shut down.
        return None if code in RESTARTED or code > 127 or self._preempted() else code

    def show_failures(self) -> None:
        """Prints the last lines of the workers that failed, while they still exist."""
        if self.state(assume="ACTIVE") == "ACTIVE":
            self.commands.run(*self.ssh("last", str(_LAST_LINES), all_workers=True))

    def _preempted(self) -> bool:
        """Whether the slices are being taken away; asks twice, because the state changes with a delay."""
        if self.state(assume="ACTIVE") == "ACTIVE":
            time.sleep(self.config.poll_seconds)
        return self.state(assume="ACTIVE") != "ACTIVE"

    def train(self) -> int:
        """Trains with up to `config.restarts` restarts; returns the exit code of the training.

        Raises:
          TrainingLost: the last restart was preempted or stopped as well.
        """
        for attempt in range(self.config.restarts + 1):
            if attempt:
                self.commands.say(f"Restart {attempt} of {self.config.restarts}.")
            if self.obtain() and (code := self.run_once()) is not None:
                return code
        raise TrainingLost(
            f"{self.job.name} was lost {attempt + 1} times: raise --config.restarts to continue."
        )

    def interrupted(self) -> None:
        """Handles Ctrl-C: stops and deletes everything if --delete=always, otherwise says how to."""
        if not self.requested:
            self.commands.say("Nothing was requested.")
            return
        if DELETE.value == "always":
            if self.state(assume="ACTIVE") == "ACTIVE":
                self.commands.run(*self.ssh("stop", all_workers=True))
            self.delete()
            return
        self.commands.say(
            "The slices and the training keep running. Run the same command to attach again, or these to"
            " stop the training and delete the slices:"
        )
        self.commands.say(f"  {shlex.join(self.ssh('stop', all_workers=True))}")
        self.commands.say(f"  {shlex.join(self.gcloud('delete', self.job.name, '--force'))}")


def logs_directory(job: Job) -> str:
    """Directory of the bucket, as the workers see it, that keeps the logs of all workers."""
    return f"{job.model_dir}/launch_logs"


def write_stage(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Collects the files that are copied to every worker."""
    commands.make_directory(job.stage)
    wheel = add_wheel(config, job, commands)
    command = job.train("venv/bin/python", "--multiprocess", f"--exit_code_if_stopped={STOPPED}")
    values = {"BUCKET": config.bucket, "MOUNT": config.mount, "PYTHON": config.python, "WHEEL": wheel}
    values["LOGS"] = logs_directory(job)
    values["EXTRAS"] = config.extras
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    commands.write(job.stage / "settings.sh", "\n".join([*lines, f"COMMAND=({shlex.join(command)})", ""]))
    job.write_environment(commands)
    job.write_gin_files(commands)
    commands.copy(_WORKER, job.stage / _WORKER.name)


@interrupt_on_sigterm()
def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    """Trains on queued resources; returns the exit code of the launcher."""
    check_model_dir(config, job)
    commands.require("gcloud")
    slices = Slices(config, job, commands)
    write_stage(config, job, commands)
    inside = logs_directory(job).removeprefix(config.mount.rstrip("/"))
    commands.say(f"The logs of all workers are kept in gs://{config.bucket}{inside}.")
    try:
        code = slices.train()
    except KeyboardInterrupt:
        slices.interrupted()
        return 130
    except TrainingLost:
        if DELETE.value != "never":
            slices.delete()
        raise
    if DELETE.value != "never":
        slices.delete()
    return code


if __name__ == "__main__":
    run("tpu", launch)
