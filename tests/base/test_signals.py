"""Signals that ask a process to stop."""

import os
import signal
import subprocess
import sys

import pytest

from famx.base import signals
from famx.base.gin_utils import gin_root


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_asks_for_a_stop_and_the_old_handler_returns(number):
    old = signal.getsignal(number)
    with signals.graceful_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop() and signals.was_stopped()
    assert signal.getsignal(number) == old and signals.was_stopped()
    assert signals.stopped_code() == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    with signals.graceful_stop():
        assert not signals.was_stopped() and signals.stopped_code() == 0


def test_only_the_signals_that_are_named_ask():
    received = []
    with signals.handling(lambda number, frame: received.append(number), (signal.SIGUSR1,)):
        with signals.graceful_stop((signal.SIGINT,)) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1] and not stop()


def test_a_stop_that_came_too_late_to_be_seen_is_none():
    with signals.graceful_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
    assert not signals.was_stopped()


def test_a_repeated_signal_may_be_harmless():
    with signals.graceful_stop((signal.SIGINT,), exit_on_repeat=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop()


def test_a_limit_of_time_stops_like_a_signal(monkeypatch):
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with signals.graceful_stop(seconds=5) as stop, signals.graceful_stop() as unlimited:
        now = 104.0
        assert not stop()
        now = 105.0
        assert stop() and not unlimited()
        assert stop() and signals.was_stopped() and signals.stopped_code() == 0


def test_sigterm_as_an_interrupt():
    with signals.interrupt_on_sigterm(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def run(code):
    code = f"import os, signal, sys\nfrom famx.base import signals\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=gin_root(), capture_output=True, text=True, timeout=60
    )


def test_the_second_signal_ends_the_process_at_once():
    result = run("""
with signals.graceful_stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
""")
    assert (result.returncode, result.stdout) == (128 + signal.SIGINT, "asked\n"), result.stderr


def test_an_interrupt_ends_in_a_sentence():
    result = run("""
print("begun")
with signals.exit_on_interrupt("Stopped; the same command resumes."):
    raise KeyboardInterrupt
""")
    assert (result.returncode, result.stdout) == (130, "begun\n")
    assert result.stderr == "Stopped; the same command resumes.\n"


def test_the_module_needs_no_jax():
    result = run("print('jax' in sys.modules)")
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
