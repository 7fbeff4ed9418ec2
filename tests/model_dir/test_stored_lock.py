"""One run for each directory of a bucket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import start_process

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.gin_utils import gin_root
from famx.model_dir import lock as lock_module
from famx.model_dir.lock import FILE, StoredLock, run_lock

RUN = as_path("gs://bucket/run")
OWNER = """
import time
from famx.base.files import as_path
from famx.model_dir.lock import StoredLock
StoredLock(as_path("gs://bucket/run"), 0.05).acquire()
print("has it", flush=True)
time.sleep(600)
"""


def lease(**changes):
    return json.dumps({**lock_module._new_lease(), **changes}).encode()


def refusal(**settings):
    with pytest.raises(ConfigError) as caught:
        StoredLock(RUN, *settings.values()).acquire()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_run_is_refused_until_the_first_is_killed(gcs):
    process = start_process(
        [sys.executable, "-c", OWNER], cwd=gin_root(), stdout=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "has it\n"
    said = refusal()
    assert said.startswith(f"MODEL_DIR {RUN} is in use by the run of process {process.pid} on host ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_lock(RUN) as lock:
        lock.check()
        assert json.loads((RUN / FILE).read_bytes())["pid"] == os.getpid()
    assert not gcs.objects


def test_a_second_run_of_one_process_is_refused(gcs):
    with run_lock(RUN):
        assert f"process {os.getpid()} on host" in refusal()
    with run_lock(RUN):
        pass


def test_of_runs_that_begin_at_once_one_has_the_lock(gcs):
    for _ in range(5):
        locks, had = [StoredLock(RUN) for _ in range(4)], []
        barrier = threading.Barrier(len(locks))

        def begin(lock, had=had, barrier=barrier):
            barrier.wait()
            try:
                lock.acquire()
                had.append(lock)
            except ConfigError as error:
                assert "is in use by the run of process" in str(error)

        threads = [threading.Thread(target=begin, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(had) == 1
        had[0].release()
        assert not gcs.objects


def test_a_lease_of_another_machine_counts_while_its_heart_beats(gcs, capsys):
    (RUN / FILE).write_bytes(lease(machine="another", host="far", beat=1))
    ended = threading.Event()

    def beat():
        for number in range(2, 1000):
            if ended.wait(0.1):
                return
            (RUN / FILE).write_bytes(lease(machine="another", host="far", beat=number))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "on host far" in refusal(beat_seconds=0.05, lease_seconds=20.0)
    finally:
        ended.set()
        thread.join()
    assert "Waiting up to 20 s" in capsys.readouterr().err


def test_a_lease_without_heartbeat_is_taken_over(gcs):
    (RUN / FILE).write_bytes(lease(machine="another", host="far", beat=1))
    began = time.monotonic()
    lock = StoredLock(RUN, 0.05, 0.5)
    lock.acquire()
    assert time.monotonic() - began >= 0.5
    lock.release()
    assert not gcs.objects


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_any_other_content_is_no_lease(gcs, content):
    (RUN / FILE).write_bytes(content)
    with run_lock(RUN) as lock:
        lock.check()


def test_a_run_that_was_taken_over_ends_and_leaves_the_lock(gcs):
    with pytest.raises(ConfigError, match="process 1 on host far has taken over MODEL_DIR gs://bucket/run"):
        with run_lock(RUN) as lock:
            (RUN / FILE).write_bytes(lease(host="far", pid=1))
            lock.check()
    assert json.loads((RUN / FILE).read_bytes())["host"] == "far"


def test_the_heart_beats_and_a_removed_lock_is_written_again(gcs):
    lock = StoredLock(RUN, 0.02)
    lock.acquire()
    first = json.loads((RUN / FILE).read_bytes())["beat"]
    while json.loads((RUN / FILE).read_bytes())["beat"] < first + 3:
        time.sleep(0.01)
    (RUN / FILE).unlink()
    lock.check()
    assert json.loads((RUN / FILE).read_bytes())["pid"] == os.getpid()
    lock.release()
    assert not gcs.objects


def test_a_write_whose_answer_was_lost_is_known_as_ones_own(gcs):
    lock = StoredLock(RUN, 600.0)
    lock.acquire()
    gcs.put("bucket", f"run/{FILE}", gcs.content("bucket", f"run/{FILE}"))  # another generation
    lock.check()
    lock.check()
    lock.release()
    assert not gcs.objects


def test_a_store_that_refuses_is_a_sentence(gcs):
    lock = StoredLock(RUN, 600.0)
    lock.acquire()
    gcs.refuse = lambda *_: 403
    with pytest.raises(ConfigError, match=f"^{RUN}/{FILE} cannot be read or written: there is no access"):
        lock.check()
    with pytest.raises(ConfigError, match=f"^{RUN}/{FILE} cannot be"):
        with run_lock(RUN):
            pass
    gcs.refuse = lambda *_: None
    lock.release()
    assert not gcs.objects
