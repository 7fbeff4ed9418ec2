"""Child processes of tests have default signal handlers and are killed when their test ends."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import processes
import pytest

HERE = pathlib.Path(__file__).parent
INTERRUPTED = """
import signal, time
try:
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(5)
"""


@pytest.fixture
def ignored():
    """SIGINT and SIGTERM ignored, as SIGINT is in the background of a shell script."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in old)
    for number, handler in old.items():
        signal.signal(number, handler)


def test_a_child_can_be_interrupted_where_signals_are_ignored(ignored):
    command = [sys.executable, "-c", INTERRUPTED]
    process = processes.start_process(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 5


# A test that starts a child, and a grandchild in a new session, writes their ids to a file, then END.
LEAVES = """
import os, pathlib, subprocess, sys, time
import pytest

@pytest.mark.timeout(5)
def test():
    command = "setsid sleep 600 & echo $! >> ids; echo $$ >> ids; exec sleep 600"
    process = subprocess.Popen(["bash", "-c", command], start_new_session=True)
    while not pathlib.Path("ids").exists() or len(pathlib.Path("ids").read_text().split()) < 2:
        time.sleep(0.01)
    END
"""


def runs(number: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.sampled(6)
@pytest.mark.skipif(not processes.PROC.is_dir(), reason="ends what tests leave on Linux alone")
@pytest.mark.parametrize(
    "end, options, words",
    [
        ("pass", (), "1 passed"),
        ("assert False", (), "1 failed"),
        ("process.wait()", (), "Timeout (>5"),
        ("process.wait()", ("-n1",), "Timeout (>5"),
        ("os._exit(3)", ("-n1",), "worker 'gw0' crashed"),
    ],
)
def test_what_a_test_started_ends_with_it(tmp_path, end, options, words):
    (tmp_path / "test_it.py").write_text(LEAVES.replace("END", end))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "processes", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, "test_it.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert words in done.stdout, done.stdout + done.stderr
    numbers = [int(word) for word in (tmp_path / "ids").read_text().split()]
    assert len(numbers) == 2 and not any(map(runs, numbers))


def test_the_end_of_a_test_leaves_the_tests_around_it(tmp_path):
    process = processes.start_process(["sleep", "600"])
    inner = os.environ[processes.MARK] + "1/"
    assert process.pid in processes.below(os.environ[processes.MARK].removesuffix("test/"))
    processes.end(inner)
    time.sleep(0.1)
    assert process.poll() is None


def test_all_tests_start_processes_that_way():
    users = {path.name for path in HERE.rglob("*.py") if "subprocess.Popen(" in path.read_text()}
    assert users == {"processes.py", "test_processes.py"}
