"""Processes of one run: they agree before they begin, and none waits for one that is gone."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import free_address, start_process

from famx.base import gin_utils, peers
from famx.base.errors import ConfigError

PROGRAM = """
import sys, time
from famx.base import distributed, peers
from famx.base.errors import ConfigError
address, index, moment, limit = sys.argv[1], int(sys.argv[2]), sys.argv[3], 4.0
distributed.initialize(False, address, 2, index, limit, 120.0)
with peers.together(limit):
    import numpy as np
    from jax.experimental import multihost_utils
    if moment == f"mistake of {index}":
        raise ConfigError("BATCH_SIZE 3 is odd.")
    if moment == f"bug in {index}":
        raise KeyError("a bug")
    if moment == "late" and index:
        time.sleep(600)
    settings = {"steps": 20, "optimizer": {"type": "adamw", "rate": index if moment == "differ" else 0}}
    peers.agree("settings", settings, 3.0 if moment == "late" else 60.0)
    peers.agree("settings", {"again": True})
    for step in range(2000):
        multihost_utils.process_allgather(np.int32(step))
        if not step:
            print("stepping", flush=True)
        if moment == "end" and step == 5:
            break
        time.sleep(0.02)
print("end", flush=True)
"""
AGAIN = "Start the same command again in all processes"


def start_two(moment):
    address = free_address()
    return [
        start_process(
            [sys.executable, "-c", PROGRAM, address, str(i), moment], cwd=gin_utils.gin_root(),
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for i in range(2)
    ]  # fmt: skip


def ended(process):
    """`(exit code, what it wrote to standard error)`."""
    _, text = process.communicate(timeout=120)
    return process.returncode, text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "number, sentence", [("SIGKILL", "is gone"), ("SIGSTOP", "has not answered for 4 seconds")]
)
def test_a_process_that_is_lost_ends_the_others(victim, number, sentence):
    processes = start_two("stepping")
    for process in processes:
        while (line := process.stdout.readline()) != "stepping\n":
            assert line.startswith("[Gloo]")
    began = time.monotonic()
    processes[victim].send_signal(getattr(signal, number))
    code, text = ended(processes[1 - victim])
    assert code == peers.LOST == 75 and time.monotonic() - began < 30
    (line,) = [line for line in text.splitlines() if not line.startswith("[Gloo]")]  # its greeting
    assert f"famx: error: Process {victim} of this run {sentence}" in line and AGAIN in line
    processes[victim].kill()
    processes[victim].communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, codes, sentences",
    [
        ("end", (0, 0), ("", "")),
        ("differ", (2, 2), 2 * ("differ: optimizer.rate is 0 in process 0 and 1 in process 1.",)),
        ("mistake of 1", (2, 2), ("Process 1 of this run ended: BATCH_SIZE", ": BATCH_SIZE 3 is odd.")),
        ("mistake of 0", (2, 2), (": BATCH_SIZE 3 is odd.", "Process 0 of this run ended: BATCH_SIZE")),
        ("bug in 1", (1, 1), ("ended: KeyError: 'a bug'", "Traceback (most")),
        ("late", (75, 75), ("Process 1 did not come to the start", "Process 0 of this run ended")),
    ],
)
def test_all_processes_end_together(moment, codes, sentences):
    processes = start_two(moment)
    for process, code, sentence in zip(processes, codes, sentences, strict=True):
        found, text = ended(process)
        assert found == code and sentence in text, text
        assert len(text.splitlines()) <= (1 if "bug" not in moment else 20)


# ---------------------------------------------------------------- without processes


@dataclasses.dataclass
class Store:
    """The key-value store of a group of processes that never end."""

    values: dict = dataclasses.field(default_factory=dict)

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        if key in self.values:
            return self.values[key]
        time.sleep(milliseconds / 1000)
        raise RuntimeError("DEADLINE_EXCEEDED")

    def key_value_dir_get(self, key):
        return [(k, value) for k, value in self.values.items() if k.startswith(key)]

    def wait_at_barrier(self, key, milliseconds):
        pass


@pytest.fixture
def store(monkeypatch):
    """The store of three processes, of which this is process 0."""
    made = Store()
    monkeypatch.setattr(peers, "_group", lambda: peers._Group(made, 0, 3, "localhost:1"))
    monkeypatch.setattr(peers, "_asked", {})
    return made


def test_one_process_agrees_with_itself():
    peers.agree("settings", {"steps": 20})
    with peers.together():
        pass


def test_the_first_difference_is_named_with_its_process(store):
    store.values |= {"famx/settings.1/1": '{"steps": 20}', "famx/settings.1/2": '{"steps": 30}'}
    with pytest.raises(ConfigError, match="steps is 20 in process 0 and 30 in process 2"):
        peers.agree("settings", {"steps": 20})
    assert "steps is 20" in store.values["famx/settings.1/verdict"]  # all others read it


def test_values_that_json_changes_are_equal(store):
    store.values |= {f"famx/settings.1/{i}": '{"lengths": [1, 2]}' for i in (1, 2)}
    peers.agree("settings", {"lengths": (1, 2)})
    assert store.values["famx/settings.1/verdict"] == ""


def test_a_process_that_does_not_come_is_named(store):
    store.values["famx/settings.1/1"] = "{}"
    with pytest.raises(peers.PeerLost, match="Process 2 did not come to the start of the run in time"):
        peers.agree("settings", {}, seconds=0.1)


def test_a_process_that_ended_is_not_waited_for(store):
    peers._tell(peers._group()._replace(index=2), "MODEL_DIR is not set.", 2)
    with pytest.raises(peers.PeerLost, match="Process 2 of this run ended: MODEL_DIR is not") as ended:
        peers.agree("settings", {}, seconds=60)
    assert ended.value.code == 2
