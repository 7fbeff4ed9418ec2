"""Trains on slices of Cloud TPU through queued resources.

    python -m launch.tpu --config=launch/configs/v5e_256.py --config.project=my-project \\
        --config.zone=us-west4-a --config.bucket=my-bucket --config.name=fam \\
        --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR="'/mnt/famx/fam'" --dry_run

Requests the slices, waits for them, copies famx and the gin files, installs, trains on all workers,
prints what worker 0 prints, begins anew after a preemption, and deletes the slices. Each step looks at
what is there: the same command again goes on where the last one ended, or attaches to what runs.
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
from launch.job import DELETE, STOPPED, Job, add_wheel, check_model_dir, run

_ENDED = ("FAILED", "SUSPENDED")
_ENDING = ("SUSPENDING", "DELETING")
_TRIES = 3  # of a step on fresh workers, whose ssh keys may not have arrived yet
_SILENT = 10  # questions in a row that worker 0 may leave unanswered
_WORKER = pathlib.Path(__file__).with_name("worker.sh")


class GivenUp(ConfigError):
    """The training cannot go on by itself; nothing that runs would be lost with the slices."""


class Slices:
    """A queued resource, and the training on its workers."""

    def __init__(self, config: ConfigDict, job: Job, commands: Commands):
        self.config, self.job, self.commands = config, job, commands
        self.requested = False  # in this launch, or found

    # ---------------------------------------------------------------- the queued resource

    def gcloud(self, action: str, *words: str) -> list[str]:
        where = [f"--project={self.config.project}", f"--zone={self.config.zone}", "--quiet"]
        return ["gcloud", "compute", "tpus", "queued-resources", action, *words, *where]

    def state(self, assume: str) -> str:
        """Of the queued resource, such as ACTIVE; '' if there is none."""
        command = self.gcloud("describe", self.job.name, "--format=value(state.state)")
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.config.poll_seconds)
            code, state, error = self.commands.capture(*command, assume=assume)
            if code == 0 or "NOT_FOUND" in error:
                return "" if code else state
        raise ConfigError(f"gcloud could not describe {self.job.name}: {error or f'code {code}'}")

    def create(self) -> None:
        config = self.config
        words = [f"--accelerator-type={config.accelerator}"]
        words += [f"--runtime-version={config.runtime_version}"]
        if config.num_slices == 1:
            words += [f"--node-id={config.name}"]
        else:
            words += [f"--node-count={config.num_slices}", f"--node-prefix={config.name}"]
        if config.provisioning != "on_demand":
            words += [f"--{config.provisioning}"]
        for name in ("network", "subnetwork", "service_account", "valid_until_duration"):
            if config[name]:
                words += [f"--{name.replace('_', '-')}={config[name]}"]
        if config.internal_ips:
            words += ["--internal-ips"]
        if self.commands.run(*self.gcloud("create", config.name, *words)):
            raise ConfigError(f"gcloud could not request {config.accelerator}: see the lines above.")

    def delete(self) -> None:
        self.commands.run(*self.gcloud("delete", self.job.name, "--force"))

    def obtain(self) -> bool:
        """Requests the slices unless they are there, and waits; False if they were taken meanwhile."""
        while (state := self.state(assume="")) in _ENDING:
            time.sleep(self.config.poll_seconds)
        if state in _ENDED:
            self.delete()
            state = ""
        if not state:
            if not self.requested:
                estimate.show(self.config, self.job, self.commands)
            self.requested = True
            self.create()
        self.requested = True
        shown = None
        while (state := self.state(assume="ACTIVE")) != "ACTIVE":
            if state in (*_ENDED, *_ENDING, ""):
                self.commands.say(f"{self.job.name} is {state or 'gone'}.")
                return False
            if state != shown:
                self.commands.say(f"{self.job.name} is {state}.")
                shown = state
            time.sleep(self.config.poll_seconds)
        return True

    # ---------------------------------------------------------------- its workers

    def ssh(self, *words: str, everywhere: bool) -> list[str]:
        which = "all" if everywhere else "0"
        remote = shlex.join(["bash", f"{self.job.stage.name}/worker.sh", *words])
        place = [f"--node={which}", f"--worker={which}", *self._tunnel()]
        return self.gcloud("ssh", self.job.name, *place, f"--command={remote}")

    def copy(self) -> list[str]:
        place = ["--node=all", "--worker=all", "--recurse", *self._tunnel()]
        return self.gcloud("scp", str(self.job.stage), f"{self.job.name}:", *place)

    def _tunnel(self) -> list[str]:
        return ["--tunnel-through-iap"] if self.config.internal_ips else []

    def status(self, assume: str) -> str:
        """Of the training on worker 0: absent, running, lost or exited CODE; '' if the slice is lost."""
        command = self.ssh("status", everywhere=False)
        for _ in range(_SILENT):
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

    def everywhere(self, what: str, *command: str) -> bool:
        """Runs a step on all workers, again if need be; False if the slice was lost."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.config.poll_seconds)
            if self.commands.run(*command) == 0:
                return True
            if self.state(assume="ACTIVE") != "ACTIVE":
                return False
        raise GivenUp(f"{what} failed on workers of {self.job.name}: see the lines above.")

    def run_once(self) -> int | None:
        """Trains, or attaches to a training that runs; its exit code, or None to begin anew."""
        status = self.status(assume="absent")
        if status == "running":
            self.commands.say("A training runs here already: following it, as it was started.")
        elif not status or not (
            self.everywhere("Copying", *self.copy())
            and self.everywhere("Installing", *self.ssh("setup", everywhere=True))
            and self.everywhere("Starting", *self.ssh("start", everywhere=True))
        ):
            return None
        line = 1
        while True:
            line += self.commands.stream(*self.ssh("follow", str(line), everywhere=False))[1]
            status = self.status(assume="exited 0")
            if status != "running":
                break
            time.sleep(self.config.poll_seconds)  # the connection was cut, not the training
        if not status.startswith("exited"):
            return None
        code = int(status.split()[1])
        if code in (0, 2):
            return code
        return None if code == STOPPED or code > 127 or self._going() else code

    def _going(self) -> bool:
        """Whether workers are being taken away, of which the state may tell a little late."""
        if self.state(assume="ACTIVE") == "ACTIVE":
            time.sleep(self.config.poll_seconds)
        return self.state(assume="ACTIVE") != "ACTIVE"

    def train(self) -> int:
        """The exit code of the training, begun anew as often as the config allows."""
        for attempt in range(self.config.restarts + 1):
            if attempt:
                self.commands.say(f"Restart {attempt} of {self.config.restarts}.")
            if self.obtain() and (code := self.run_once()) is not None:
                return code
        raise GivenUp(f"{self.job.name} was lost {attempt + 1} times: raise --config.restarts to go on.")

    def interrupted(self) -> None:
        """After Ctrl-C: stops and deletes if --delete=always, or says how to."""
        if not self.requested:
            self.commands.say("Nothing was requested.")
            return
        if DELETE.value == "always":
            if self.state(assume="ACTIVE") == "ACTIVE":
                self.commands.run(*self.ssh("stop", everywhere=True))
            self.delete()
            return
        self.commands.say("Slices and training stay. The same command attaches again; these end them:")
        self.commands.say(f"  {shlex.join(self.ssh('stop', everywhere=True))}")
        self.commands.say(f"  {shlex.join(self.gcloud('delete', self.job.name, '--force'))}")


def write_stage(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Puts together what every worker gets."""
    commands.make_directory(job.stage)
    wheel = add_wheel(config, job, commands)
    command = job.train("venv/bin/python", "--multiprocess", f"--exit_code_if_stopped={STOPPED}")
    values = {"BUCKET": config.bucket, "MOUNT": config.mount, "PYTHON": config.python, "WHEEL": wheel}
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    commands.write(job.stage / "settings.sh", "\n".join([*lines, f"COMMAND=({shlex.join(command)})", ""]))
    job.write_environment(commands)
    job.write_gin_files(commands)
    commands.copy(_WORKER, job.stage / _WORKER.name)


@interrupt_on_sigterm()
def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    check_model_dir(config, job)
    commands.require("gcloud")
    slices = Slices(config, job, commands)
    write_stage(config, job, commands)
    try:
        code = slices.train()
    except KeyboardInterrupt:
        slices.interrupted()
        return 130
    except GivenUp:
        if DELETE.value != "never":
            slices.delete()
        raise
    if DELETE.value != "never":
        slices.delete()
    return code


if __name__ == "__main__":
    run("tpu", launch)
