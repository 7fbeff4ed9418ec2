"""Trains with several processes on this machine.

    python -m launch.local --config.processes=2 --gin_file=gin_configs/examples/passkey_tiny.gin \\
        --gin.MODEL_DIR="'/tmp/famx/two_processes'"

Lines that a process prints come with its number. SIGTERM and Ctrl-C are passed on, so that the run
saves and stops; one process that dies ends the others, and its exit code is that of the launch.
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

from ml_collections import ConfigDict

from famx.base.signals import handling
from launch.commands import Commands
from launch.job import Job, run


def process_environment(config: ConfigDict, index: int) -> dict[str, str]:
    """What a process sees of jax's devices."""
    count = config.devices_per_process
    if config.platform != "cpu":
        first = index * count
        return {
            "JAX_PLATFORMS": config.platform,
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + count))),
        }
    old = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{old} --xla_force_host_platform_device_count={count}".strip()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """The processes of one training, and their output."""

    def __init__(self, config: ConfigDict, job: Job, commands: Commands):
        self.config, self.job, self.commands = config, job, commands
        self.stopping = False
        self.children: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        self._print = threading.Lock()

    def start(self) -> None:
        """Starts them, or in a dry run says how."""
        job, config = self.job, self.config
        address = f"localhost:{_free_port()}"
        for index in range(config.processes):
            place = (f"--coordinator_address={address}", f"--num_processes={config.processes}")
            command = job.train(sys.executable, *place, f"--process_id={index}")
            seen = process_environment(config, index)
            words = [f"{name}={value}" for name, value in (job.shown | seen).items()]
            words += [f"{name}=***" for name in job.secret]
            self.commands.say(f"$ {shlex.join(['env', *words, *command])}")
            if not (self.commands.dry_run or self.stopping):
                self._start(index, command, {**os.environ, **job.shown, **job.secret, **seen})

    def _start(self, index: int, command: list[str], environment: dict[str, str]) -> None:
        # Sessions of their own: Ctrl-C reaches them once, through this process.
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.children.append(child)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            thread = threading.Thread(target=self._pass_on, args=(index, source, sink), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _pass_on(self, index: int, source, sink) -> None:
        for line in source:
            with self._print:
                print(f"[{index}] {self.commands.mask(line.rstrip())}", file=sink, flush=True)

    def stop(self, *_) -> None:
        """Asks all to save and stop; a handler of signals."""
        self.stopping = True
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Sends a signal to those that run."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self) -> int:
        """Waits for all, or for the first that dies; its exit code, 128 + n if signal n ended it."""
        code = 0
        while code == 0 and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
            code = next((child.returncode for child in self.children if child.poll()), 0)
        code = code or next((child.returncode for child in self.children if child.returncode), 0)
        if code:
            self._end()
        for thread in self._threads:
            thread.join(timeout=5)
        return code if code >= 0 else 128 - code

    def _end(self) -> None:
        self.signal(signal.SIGTERM)
        end = time.monotonic() + self.config.grace_seconds
        while time.monotonic() < end and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.wait()


def launch(config: ConfigDict, job: Job, commands: Commands) -> int:
    processes = Processes(config, job, commands)
    with handling(processes.stop):
        processes.start()
        return processes.wait()


if __name__ == "__main__":
    run("local", launch, default="local.py", check_gin=False)
