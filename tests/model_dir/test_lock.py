"""One run per MODEL_DIR: refused while the first lives, and never blocked by one that was killed."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from processes import start_process

import famx
from famx.base.errors import ConfigError
from famx.model_dir import lock as lock_module
from famx.model_dir.lock import FILE, RunLock, run_lock

ROOT = str(pathlib.Path(famx.__file__).parent.parent)

OWNER = """
import os, pathlib, sys, time
from famx.model_dir.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]), beat_seconds=0.05)
lock.acquire()
child = os.fork() if "fork" in sys.argv else -1
if child == 0:
    print("child", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(0.5)
print("has it", flush=True)
time.sleep(600)
"""


def start_owner(directory, *options):
    process = start_process(
        [sys.executable, "-c", OWNER, str(directory), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    lines = [process.stdout.readline()]
    while lines[-1] and lines[-1] != "has it\n":
        lines.append(process.stdout.readline())
    return process, lines


def refusal(directory, **settings):
    with pytest.raises(ConfigError) as caught:
        RunLock(directory, **settings).acquire()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    """The first one has forked a child, which lives on and must not keep the lock."""
    process, _ = start_owner(tmp_path, "fork")
    before = (tmp_path / FILE).read_bytes()
    sentence = refusal(tmp_path)
    assert f"in use by the run of process {process.pid} on host {socket.gethostname()}" in sentence
    process.send_signal(signal.SIGSTOP)  # it still has the directory, though it does nothing
    assert f"process {process.pid} " in refusal(tmp_path, lease_seconds=0.1)
    process.send_signal(signal.SIGCONT)
    while json.loads((tmp_path / FILE).read_bytes())["beat"] <= json.loads(before)["beat"]:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / FILE).exists()
    began = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert time.monotonic() - began < 5
    assert json.loads((tmp_path / FILE).read_bytes())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_second_run_of_one_process_is_refused(tmp_path):
    with run_lock(tmp_path) as lock:
        lock.check()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host"):
            with run_lock(tmp_path):
                pass
        assert (tmp_path / FILE).exists()
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path):
        pass


def leave_lease(directory, **changes):
    """A lease of another machine, as a network file system shows it."""
    lease = lock_module._new_lease() | {"host": "node7", "pid": 41, "machine": "other"} | changes
    (directory / FILE).write_text(json.dumps(lease).ljust(lock_module._BYTES))
    return lease


def test_a_lease_of_another_machine_counts_while_its_heart_beats(tmp_path):
    stop = threading.Event()

    def beat():
        for number in range(1000):
            leave_lease(tmp_path, beat=number, token="x")
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        while not (tmp_path / FILE).exists():
            time.sleep(0.01)
        assert "process 41 on host node7" in refusal(tmp_path, lease_seconds=20, beat_seconds=0.1)
    finally:
        stop.set()
        thread.join()


def test_a_lease_without_heartbeat_is_taken_over(tmp_path, capsys):
    leave_lease(tmp_path)
    lock = RunLock(tmp_path, beat_seconds=0.05, lease_seconds=0.5)
    lock.acquire()
    assert "process 41 on host node7 may still have" in capsys.readouterr().err
    lock.release()

    leave_lease(tmp_path)
    old = time.time() - 1000
    os.utime(tmp_path / FILE, (old, old))
    lock = RunLock(tmp_path)
    lock.acquire()  # at once
    assert not capsys.readouterr().err
    lock.release()


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[1]", b"{", b"\xff" * 2000])
def test_any_other_content_is_no_lease(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock_module, "_SETTLE_SECONDS", 0.05)


def test_without_flock_a_living_process_of_this_machine_has_the_lock(tmp_path, no_flock):
    first = RunLock(tmp_path)
    first.acquire()
    assert f"process {os.getpid()} " in refusal(tmp_path)
    first.release()
    ended = start_process(["true"])
    ended.wait()
    leave_lease(tmp_path, machine=lock_module._machine(), pid=ended.pid, started="1")
    second = RunLock(tmp_path)
    second.acquire()
    second.release()


def test_without_flock_the_last_of_two_that_begin_at_once_has_the_lock(tmp_path, no_flock, monkeypatch):
    lock = RunLock(tmp_path)
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: leave_lease(tmp_path))
    with pytest.raises(ConfigError, match="process 41 on host node7 has taken over"):
        lock.acquire()


def test_a_run_that_stood_still_and_was_taken_over_ends(tmp_path):
    with run_lock(tmp_path) as lock:
        lease = leave_lease(tmp_path)
        with pytest.raises(ConfigError, match="process 41 on host node7 has taken over MODEL_DIR"):
            lock.check()
    assert json.loads((tmp_path / FILE).read_bytes())["token"] == lease["token"]  # the other's


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match="run.lock cannot be written: Permission denied"):
        with run_lock(tmp_path):
            pass
