"""Flags of multi-process runs, and detecting a request to stop."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from processes import free_address, start_process

from famx.base import distributed, gin_utils
from famx.base.errors import ConfigError


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call of jax.distributed.initialize, which is replaced by a no-op."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def test_one_process_joins_nobody(joined):
    distributed.initialize()
    assert joined == []


def test_a_process_that_is_told_all_detects_nothing(joined):
    distributed.initialize(coordinator_address="node7:1234", num_processes=4, process_id=3)
    waits = {"heartbeat_timeout_seconds": 130, "initialization_timeout": 300}
    options = {"cluster_detection_method": "deactivate", **waits}
    assert joined == [(("node7:1234", 4, 3), options)]
    distributed.initialize(coordinator_address="[::1]:1234", num_processes=1, process_id=0)
    assert joined[1][0] == ("[::1]:1234", 1, 0)


def test_a_process_of_a_cluster_detects_all(joined):
    distributed.initialize(multiprocess=True, limit=5.5, start=20)
    assert joined == [((), {"heartbeat_timeout_seconds": 21, "initialization_timeout": 20})]


@pytest.mark.parametrize(
    "given,sentence",
    [
        (dict(num_processes=2), "Give all of --coordinator_address, --num_processes and --process_id"),
        (dict(coordinator_address="x:1", num_processes=2), "Give all of"),
        (dict(coordinator_address="x", num_processes=2, process_id=0), "must be HOST:PORT, not x."),
        (
            dict(coordinator_address="x:1", num_processes=2, process_id=2),
            "between 0 and 1, the last process",
        ),
        (dict(coordinator_address="x:1", num_processes=2, process_id=-1), "--process_id -1 must lie"),
        (
            dict(coordinator_address="x:1", num_processes=0, process_id=0),
            "--num_processes must be at least 1, not 0.",
        ),
        (dict(limit=0), "--peer_timeout_seconds and --start_timeout_seconds must be above 0, not 0 and"),
        (dict(multiprocess=True, process_id=0), "--multiprocess finds the other processes by itself"),
    ],
)
def test_flags_that_do_not_fit(joined, given, sentence):
    with pytest.raises(ConfigError) as caught:
        distributed.initialize(**given)
    assert sentence in str(caught.value) and joined == []


@pytest.mark.parametrize(
    "text,kind", [("coordinator_address should be defined.", ConfigError), ("x", ValueError)]
)
def test_no_cluster_around(monkeypatch, text, kind):
    def fail(**waits):
        raise ValueError(text)

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError) as caught:
        distributed.initialize(multiprocess=True)
    assert type(caught.value) is kind
    assert ("detected no TPU slice, GKE job or Slurm step" in str(caught.value)) == (kind is ConfigError)


TWO = """
import contextlib, sys
from famx.base import distributed, signals
def main(moment, address, index):
    distributed.initialize(coordinator_address=address, num_processes=2, process_id=int(index))
    context = contextlib.nullcontext(lambda: False)
    if moment == "training":
        context = signals.graceful_stop()
    with context as stop:
        print("ready", flush=True)
        sys.stdin.readline()
        print(stop(), signals.was_stopped())
main(*sys.argv[1:])
"""


def start_two(moment):
    address = free_address()
    processes = [
        start_process(
            [sys.executable, "-c", TWO, moment, address, str(i)], cwd=gin_utils.gin_root(),
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) for i in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    return processes


@pytest.mark.slow
def test_a_signal_to_one_process_is_known_to_all():
    processes = start_two("training")
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        text, _ = process.communicate()
        assert text.endswith("True True\n") and process.returncode == 0, text


@pytest.mark.slow
def test_a_process_that_does_not_train_yet_ends_by_a_signal():
    processes = start_two("starting")
    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(timeout=20) == -signal.SIGTERM
    for process in processes:
        process.kill()
        process.communicate()


STOPPED = """
import os, signal, sys
from absl import flags
from famx import train
from famx.base import gin_utils, signals
gin_utils.parse_gin_flags = lambda: None
def run(_):
    with signals.graceful_stop() as stop:
        if os.environ["STOP_BY"]:
            os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
        stop()
gin_utils.call = run
gin_utils.run(train.main, train.define_flags, argument="gin_file")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "by,flags,code",
    [
        ("", ["--exit_code_if_stopped=43"], 0),
        ("SIGTERM", ["--exit_code_if_stopped=42"], 42),
        ("SIGTERM", ["--exit_code_if_stopped=0"], 0),
        ("SIGTERM", [], 143),
        ("SIGINT", [], 130),
    ],
)
def test_a_stopped_run_ends_with_the_exit_code_that_was_asked_for(by, flags, code):
    result = subprocess.run(
        [sys.executable, "-c", STOPPED, "passkey_tiny", *flags], cwd=gin_utils.gin_root(),
        capture_output=True, text=True, env={**os.environ, "STOP_BY": by},
    )  # fmt: skip
    assert result.returncode == code, result.stderr
