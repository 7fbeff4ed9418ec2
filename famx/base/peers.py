"""Processes of one run: they compare their settings before they begin, and notice when one is lost.

All of it goes through the key-value store that process 0 keeps for jax. Each process writes there that it
is alive, several times within the limit, and looks whether the others did. A process that ends by an error
writes its sentence there first, which the others repeat.

A process that loses another one ends at once with the exit code `LOST`, since the collective operation that
it waits for never ends: the same command, in all processes, resumes from the last checkpoint.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from famx.base.describe import differences, shown
from famx.base.errors import ConfigError

LOST = 75  # exit code after the loss of another process: EX_TEMPFAIL, "try again"
BAD_INPUT = 2  # exit code of a mistake of the user, in all processes

_BEATS = 5  # signs of life within the limit
_SLICE = 1.0  # longest time in seconds between two looks at the others
_LINGER = 10.0  # seconds that process 0 keeps the store for the others to read why the run ends
_AGAIN = "Start the same command again in all processes: it goes on from the last checkpoint."
# What libraries say of a collective operation or a call of the store when the other side is gone.
_BROKEN = re.compile(
    r"Gloo|NCCL|coordination service|CoordinationService|Connection (?:closed|reset|refused)|Socket closed"
    r"|heartbeat|UNAVAILABLE|peer"
)


class PeerLost(Exception):
    """Another process of the run ended or does not answer; the message is a sentence."""


def _client() -> Any:
    """The client of jax's key-value store; None in a run of one process."""
    from jax._src import distributed  # jax has no public name for it

    return distributed.global_state.client if jax.process_count() > 1 else None


# ---------------------------------------------------------------- agreement

_asked: dict[str, int] = {}  # number of agreements by name: a key of the store is set once


def agree(what: str, values: Mapping[str, Any], seconds: float = 300.0) -> None:
    """Returns once all processes have called it with equal values.

    Args:
      what: name of the values; all processes call this in the same order.
      values: JSON values, such as `famx.base.describe.describe` returns.
      seconds: longest time to wait for the other processes.

    Raises:
      ConfigError: in all processes, if the values of two of them differ.
      PeerLost: another process ended, or did not come in time.
    """
    client = _client()
    if client is None:
        return
    number = _asked[what] = _asked.get(what, 0) + 1
    index, key = jax.process_index(), f"famx/{what}.{number}"
    end = time.monotonic() + seconds
    client.key_value_set(f"{key}/{index}", json.dumps(values, sort_keys=True))
    if index == 0:
        verdict = _compared(client, key, values, end)
        client.key_value_set(f"{key}/verdict", verdict)
    else:
        verdict = _wait_for(client, f"{key}/verdict", 0, end)
    with contextlib.suppress(Exception):  # process 0 keeps the store until all have read the verdict
        client.wait_at_barrier(f"{key}/read", int(1000 * _LINGER))
    if verdict:
        raise ConfigError(verdict)


def _compared(client: Any, key: str, values: Mapping[str, Any], end: float) -> str:
    """The first difference between this process and another one as a sentence; "" for none."""
    mine = json.loads(json.dumps(values))
    for other in range(1, jax.process_count()):
        theirs = json.loads(_wait_for(client, f"{key}/{other}", other, end))
        for name, here, there in differences(mine, theirs):
            return (
                f"The processes of this run differ: {name} is {shown(here)} in process 0 and"
                f" {shown(there)} in process {other}. Start all with the same command, data and version."
            )
    return ""


def _wait_for(client: Any, key: str, process: int, end: float) -> str:
    """A value of the store once `process` has set it."""
    while True:
        left = end - time.monotonic()
        try:
            return client.blocking_key_value_get(key, max(1, int(1000 * min(_SLICE, left))))
        except Exception as error:
            _raise_if_one_ended(client)
            if _refused(error) or left <= 0:
                raise PeerLost(
                    f"Process {process} did not come to the start of the run in time. {_AGAIN}"
                ) from error


def _refused(error: Exception) -> bool:
    return "UNAVAILABLE" in str(error)


def _raise_if_one_ended(client: Any) -> None:
    """Raises PeerLost with the sentence of a process that ended by an error."""
    with contextlib.suppress(RuntimeError, ValueError):  # there is no such key, or no store any more
        for key, sentence in client.key_value_dir_get("famx/ended"):
            process = int(key.rpartition("/")[2])
            if process != jax.process_index():
                raise PeerLost(f"Process {process} of this run ended: {sentence}")


# ---------------------------------------------------------------- watching


@contextlib.contextmanager
def together(limit: float = 60.0) -> Iterator[None]:
    """A context in which the processes of a run watch each other; ends the process if one is lost.

    In a run of one process it does nothing. In one of several, errors end the process here and not at the
    end of the interpreter, where jax would wait for the others: with one sentence and `BAD_INPUT` for a
    mistake of the user, or `LOST` if another process is gone.

    Args:
      limit: seconds without a sign of life after which a process counts as lost.
    """
    client = _client()
    if client is None:
        yield
        return
    watch = _Watch(client, limit)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.stop()
        _end(client, error)
    watch.done()


class _Watch:
    """Two threads: one writes and reads signs of life, the other ends the process if they are missing."""

    def __init__(self, client: Any, limit: float):
        self._client, self._limit = client, limit
        self._index, self._count = jax.process_index(), jax.process_count()
        self._stopped = threading.Event()
        now = time.monotonic()
        self._heard = dict.fromkeys(set(range(self._count)) - {self._index}, now)
        self._signs: dict[int, str] = {}  # the last sign of each process
        self._answered = now  # when the store last answered

    def start(self) -> None:
        """Starts the threads, and handles that jax aborts the process when process 0 is gone."""
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()
        if self._index:
            _on_abort(self._aborted)

    def stop(self) -> None:
        """Ends the threads."""
        self._stopped.set()

    def done(self) -> None:
        """Ends the threads, and tells the others not to expect a sign of life any more."""
        self.stop()
        with contextlib.suppress(Exception):
            self._sign("done")

    def _sign(self, text: str) -> None:
        self._client.key_value_set(f"famx/alive/{self._index}", text, allow_overwrite=True)

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(min(_SLICE, self._limit / _BEATS)):
            with contextlib.suppress(RuntimeError, ValueError):  # noticed by `_look` if it lasts
                number += 1
                self._sign(str(number))
                _raise_if_one_ended_in(self._client, self._leave)
                now = time.monotonic()
                for key, sign in self._client.key_value_dir_get("famx/alive"):
                    process = int(key.rpartition("/")[2])
                    if sign == "done":
                        self._heard.pop(process, None)
                    elif process in self._heard and self._signs.get(process) != sign:
                        self._signs[process], self._heard[process] = sign, now
                self._answered = now

    def _look(self) -> None:
        while not self._stopped.wait(min(_SLICE, self._limit / _BEATS)):
            now = time.monotonic()
            if now - self._answered > self._limit:
                self._leave(self._silent(0))
            for process, heard in list(self._heard.items()):
                if self._answered - heard > self._limit:
                    self._leave(self._silent(process))

    def _silent(self, process: int) -> str:
        return f"Process {process} of this run has not answered for {self._limit:g} seconds. {_AGAIN}"

    def _leave(self, sentence: str) -> None:
        if not self._stopped.is_set():
            _exit(sentence, LOST)

    def _aborted(self) -> bool:
        """Whether jax aborts the process because process 0, with the store, is gone."""
        from jax._src import distributed

        host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return False
        except (OSError, ValueError):
            self._leave(f"Process 0 of this run is gone. {_AGAIN}")
            return True
