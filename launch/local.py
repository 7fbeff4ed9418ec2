"""Launcher for several training processes on this machine.

    python -m launch.local --config.processes=2 --gin_file=gin_configs/examples/passkey_tiny.gin \\
        --gin.MODEL_DIR=/tmp/famx/two_processes

Output lines are prefixed with the number of their process. SIGTERM and Ctrl-C are forwarded, so that the
run saves a checkpoint and stops; the exit code is then 143 or 130. If a process dies, the others are
stopped, and its exit code becomes that of the launcher.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from ml_collections import ConfigDict

from famx.base.peers import LOST
from famx.base.signals import handling
from launch.commands import Commands
from launch.job import STOPPED, Job, run

_LOST_SECONDS = 5.0  # in which a process ends whose failure others have noticed
_FINE = (None, 0, STOPPED)  # codes of processes that still run, are done, or have saved and stopped


def process_environment(config: ConfigDict, index: int) -> dict[str, str]:
    """Environment variables that give process `index` its JAX platform and devices."""
    count = config.devices_per_process
    if config.platform != "cpu":
        first = index * count
        return {
            "JAX_PLATFORMS": config.platform,
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + count))),
        }
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """The processes of one training run.

    Attributes:
      config, job, commands: as for every launcher.
      children: the processes that were started.
      stopping: the signal that requested a stop, or None.
    """

    def __init__(self, config: ConfigDict, job: Job, commands: Commands):
        self.config, self.job, self.commands = config, job, commands
        self.stopping: int | None = None
        self.children: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        self._print = threading.Lock()

    def start(self) -> None:
        """Starts all processes, or prints their commands in a dry run."""
        job, config = self.job, self.config
        address = f"localhost:{_free_port()}"
        for index in range(config.processes):
            cluster = (f"--coordinator_address={address}", f"--num_processes={config.processes}")
            stopped = f"--exit_code_if_stopped={STOPPED}"
            command = job.train(sys.executable, *cluster, stopped, f"--process_id={index}")
            devices = process_environment(config, index)
            assignments = [f"{name}={value}" for name, value in (job.shown | devices).items()]
            assignments += [f"{name}=***" for name in job.secret]
            self.commands.say(f"$ {shlex.join(['env', *assignments, *command])}")
            if not self.commands.dry_run and self.stopping is None:
                self._start(index, command, {**os.environ, **job.shown, **job.secret, **devices})

    def _start(self, index: int, command: list[str], environment: dict[str, str]) -> None:
        # In their own sessions, the processes do not receive Ctrl-C directly; `stop` forwards it once.
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.children.append(child)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            thread = threading.Thread(target=self._print_lines, args=(index, source, sink), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _print_lines(self, index: int, source, sink) -> None:
        for line in source:
            with self._print:
                print(f"[{index}] {self.commands.mask(line.rstrip())}", file=sink, flush=True)

    def stop(self, number: int = signal.SIGTERM, frame: Any = None) -> None:
        """Tells all processes to save and stop. Usable as a signal handler."""
        self.stopping = number
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Sends signal `number` to the processes that are still running."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self) -> int:
        """Waits until all processes have ended; stops the others when one fails.

        Returns:
          0; 128 + n if signal n stopped the run; or the exit code of the process that failed, 128 + n if
          signal n killed it.
        """
        code = 0
        while code == 0 and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
            code = self._failed()
        code = code or self._failed()
        if code == LOST:  # the process that failed by itself may end a moment later
            deadline = time.monotonic() + _LOST_SECONDS
            while self._failed() == LOST and time.monotonic() < deadline:
                time.sleep(0.05)
            code = self._failed()
        if code:
            self._end()
        for thread in self._threads:
            thread.join(timeout=5)
        if not code and any(child.returncode == STOPPED for child in self.children):
            return 128 + (self.stopping or signal.SIGTERM)
        return code if code >= 0 else 128 - code

    def _failed(self) -> int:
        """Exit code of a process that failed, rather not because another one was lost; 0: of none."""
        codes = [child.returncode for child in self.children if child.poll() not in _FINE]
        return next((code for code in codes if code != LOST), codes[0] if codes else 0)

    def _end(self) -> None:
        """Stops the remaining processes, and kills those that do not stop within `grace_seconds`."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + self.config.grace_seconds
        while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.wait()


def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    """Runs the training processes; returns the exit code of the launcher."""
    processes = Processes(config, job, commands)
    with handling(processes.stop):
        processes.start()
        return processes.wait()


if __name__ == "__main__":
    run("local", launch, default="local.py", check_gin=False)
