"""Processes of one run: they compare their settings before they begin, and notice when one is lost.

All of it goes through the key-value store that process 0 keeps for jax. Each process writes there that
it is alive, several times within the limit, and looks whether the others did. A process that ends by an
error writes its sentence there first, which the others repeat.

A process that loses another one ends at once, since the collective operation that it waits for never
ends. Its exit code is `LOST`, after which the same command, in all processes, resumes from the last
checkpoint; or, if the other one told of an error, the exit code of that: a restart would not mend it.
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
from typing import Any, NamedTuple

from famx.base.describe import differences, shown
from famx.base.errors import ConfigError, causes
from famx.base.native_stderr import NativeStderr

LOST = 75  # exit code after the loss of another process: EX_TEMPFAIL, "try again"
BAD_INPUT = 2  # exit code of a mistake of the user, in all processes

_BEATS = 5  # signs of life within the limit
_SLICE = 1.0  # longest time in seconds between two looks at the others
_LINGER = 10.0  # seconds that process 0 keeps the store for the others to read why the run ends
_LINGER_IF_LOST = 2.0  # the same if another process is gone and will not read it
_AGAIN = "Start the same command again in all processes: it resumes from the last checkpoint."
# What libraries say of a collective operation or a call of the store when the other side is gone.
_BROKEN = re.compile(
    r"Gloo|NCCL|coordination service|CoordinationService|Connection (?:closed|reset|refused)"
    r"|Socket closed|missed heartbeat|by peer"
)


class PeerLost(Exception):
    """Another process of the run ended or does not answer; the message is a sentence.

    Attributes:
      code: exit code of this process: that of the other one if it told of its error, or `LOST`.
    """

    def __init__(self, sentence: str, code: int = LOST):
        super().__init__(sentence)
        self.code = code


class _Group(NamedTuple):
    """The processes of a run.

    Attributes:
      client: client of jax's key-value store.
      index: index of this process.
      count: number of processes.
      address: `HOST:PORT` of process 0.
    """

    client: Any
    index: int
    count: int
    address: str

    @property
    def others(self) -> set[int]:
        """The indices of the other processes."""
        return set(range(self.count)) - {self.index}


def _group() -> _Group | None:
    """The processes that jax joined; None for a run of one process. Creates no devices."""
    from jax._src import distributed  # jax has no public name for it

    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return None
    return _Group(state.client, state.process_id, state.num_processes, state.coordinator_address or "")


# ---------------------------------------------------------------- agreement

_asked: dict[str, int] = {}  # number of agreements by name: a key of the store is set once
_start_seconds = 300.0  # longest wait for the other processes, set by `together`


def agree(what: str, values: Mapping[str, Any], seconds: float | None = None) -> None:
    """Returns once all processes have called it with equal values.

    Args:
      what: name of the values; all processes call this in the same order.
      values: JSON values, such as `famx.base.describe.describe` returns.
      seconds: longest time to wait for the other processes; None: that of `together`.

    Raises:
      ConfigError: in all processes, if the values of two of them differ.
      PeerLost: another process ended, or did not come in time.
    """
    group = _group()
    if group is None:
        return
    number = _asked[what] = _asked.get(what, 0) + 1
    key = f"famx/{what}.{number}"
    end = time.monotonic() + (_start_seconds if seconds is None else seconds)
    group.client.key_value_set(f"{key}/{group.index}", json.dumps(values))
    if group.index == 0:
        verdict = _compared(group, key, values, end)
        group.client.key_value_set(f"{key}/verdict", verdict)
    else:
        verdict = _wait_for(group, f"{key}/verdict", 0, end)
    with contextlib.suppress(Exception):  # process 0 keeps the store until all have read the verdict
        group.client.wait_at_barrier(f"{key}/read", int(1000 * _LINGER))
    if verdict:
        raise ConfigError(verdict)


def _compared(group: _Group, key: str, values: Mapping[str, Any], end: float) -> str:
    """The first difference between this process and another one as a sentence; "" for none."""
    mine = json.loads(json.dumps(values))
    for other in range(1, group.count):
        theirs = json.loads(_wait_for(group, f"{key}/{other}", other, end))
        for name, here, there in differences(mine, theirs):
            return (
                f"The processes of this run differ: {name} is {shown(here)} in process 0 and"
                f" {shown(there)} in process {other}. Start all with the same command, data and version."
            )
    return ""


def _wait_for(group: _Group, key: str, process: int, end: float) -> str:
    """A value of the store once `process` has set it."""
    while True:
        left = end - time.monotonic()
        try:
            return group.client.blocking_key_value_get(key, max(1, int(1000 * min(_SLICE, left))))
        except Exception as error:
            _raise_if_one_ended(group)
            if _refused(error) or left <= 0:
                raise PeerLost(
                    f"Process {process} did not come to the start of the run in time. {_AGAIN}"
                ) from error


def _refused(error: Exception) -> bool:
    return "UNAVAILABLE" in str(error)


def _raise_if_one_ended(group: _Group) -> None:
    """Raises PeerLost with the sentence of a process that ended by an error."""
    with contextlib.suppress(RuntimeError, ValueError):  # no such key, or no store any more
        for key, told in group.client.key_value_dir_get("famx/ended"):
            process = int(key.rpartition("/")[2])
            if process != group.index:
                sentence, code = json.loads(told)
                raise PeerLost(f"Process {process} of this run ended: {sentence}", code)


# ---------------------------------------------------------------- watching


@contextlib.contextmanager
def together(limit: float = 60.0, start: float = 300.0) -> Iterator[None]:
    """A context in which the processes of a run watch each other; ends the process if one is lost.

    In a run of one process it does nothing. In one of several, errors end the process here and not at the
    end of the interpreter, where jax would wait for the others: with one sentence and `BAD_INPUT` for a
    mistake of the user, or `LOST` if another process is gone.

    Args:
      limit: seconds without a sign of life after which a process counts as lost.
      start: seconds that `agree` waits for the other processes.
    """
    global _start_seconds
    _start_seconds = start
    group = _group()
    if group is None:
        yield
        return
    stderr = NativeStderr() if group.index else None  # jax aborts all processes but process 0
    watch = _Watch(group, limit, stderr)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.stop()
        _end(group, error, stderr)
    watch.done()
    if stderr is not None:
        stderr.pass_on(all_=True)


class _Watch:
    """Two threads: one writes and reads signs of life, the other ends the process if they are missing."""

    def __init__(self, group: _Group, limit: float, stderr: NativeStderr | None):
        self._group, self._limit, self._stderr = group, limit, stderr
        self._stopped = threading.Event()
        now = time.monotonic()
        self._heard = dict.fromkeys(group.others, now)
        self._signs: dict[int, str] = {}  # the last sign of each process
        self._answered = now  # when the store last answered

    def start(self) -> None:
        """Starts the threads, and handles that jax aborts the process when process 0 is gone."""
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()
        if self._stderr is not None:
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
        key = f"famx/alive/{self._group.index}"
        self._group.client.key_value_set(key, text, allow_overwrite=True)

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(min(_SLICE, self._limit / _BEATS)):
            with contextlib.suppress(RuntimeError, ValueError):  # noticed by `_look` if it lasts
                number += 1
                self._sign(str(number))
                self._leave_if_one_ended()
                now = time.monotonic()
                for key, sign in self._group.client.key_value_dir_get("famx/alive"):
                    process = int(key.rpartition("/")[2])
                    if sign == "done":
                        self._heard.pop(process, None)
                    elif process in self._heard and self._signs.get(process) != sign:
                        self._signs[process], self._heard[process] = sign, now
                self._answered = now

    def _leave_if_one_ended(self) -> None:
        try:
            _raise_if_one_ended(self._group)
        except PeerLost as lost:
            with contextlib.suppress(RuntimeError, ValueError):
                _tell(self._group, *_reason(lost))
            self._leave(lost)

    def _look(self) -> None:
        before, period = time.monotonic(), min(_SLICE, self._limit / _BEATS)
        while not self._stopped.wait(period):
            now = time.monotonic()
            if now - before > self._limit / 2:  # this process itself stood still and heard nobody
                self._answered += now - before
                self._heard = {process: heard + now - before for process, heard in self._heard.items()}
            before = now
            if self._stderr is not None:
                self._stderr.pass_on()
            if now - self._answered > self._limit:
                self._leave(self._silent(0))
            for process, heard in list(self._heard.items()):
                if self._answered - heard > self._limit:
                    self._leave(self._silent(process))

    def _silent(self, process: int) -> PeerLost:
        return PeerLost(
            f"Process {process} of this run has not answered for {self._limit:g} seconds. {_AGAIN}"
        )

    def _leave(self, lost: PeerLost) -> None:
        if not self._stopped.is_set():
            _exit(*_reason(lost))

    def _aborted(self) -> None:
        """Ends the process if jax aborts it because process 0, with the store, is gone."""
        host, _, port = self._group.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (OSError, ValueError):
            _exit(*_reason(PeerLost(f"Process 0 of this run is gone. {_AGAIN}")))
        if self._stderr is not None:
            self._stderr.pass_on(all_=True)


def _end(group: _Group, error: Exception, stderr: NativeStderr | None) -> None:
    """Ends the process after an error: the other processes first learn of it."""
    lost = error if isinstance(error, PeerLost) else None
    if isinstance(error, ConfigError):
        sentence, code = str(error).split("\n  In call to configurable")[0], BAD_INPUT
    elif lost is None and not of_a_lost_peer(error):
        traceback.print_exception(error)
        sentence, code = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 1
    else:
        lost = lost or _loss(group)
        sentence, code = _reason(lost)
    with contextlib.suppress(Exception):
        _tell(group, sentence, code)
        if group.index == 0:
            _linger(group, _LINGER_IF_LOST if code == LOST else _LINGER)
    if stderr is not None and lost is None:
        stderr.pass_on(all_=True)
    _exit(sentence, code)


_told: tuple[str, int] | None = None  # what this process has told the others before it ends


def tell(sentence: str, code: int = BAD_INPUT) -> None:
    """Tell the other processes, if there are any, that this one must end, and with which exit code.

    To be called where an error is known before it reaches `together`: this process may be waiting for the
    others meanwhile, and they for it.
    """
    global _told
    group = _group()
    if group is not None:
        _told = sentence, code
        with contextlib.suppress(Exception):
            _tell(group, sentence, code)


def _reason(lost: PeerLost) -> tuple[str, int]:
    """Why this process ends, and its exit code: what it told the others, since they then end as well."""
    return _told or (str(lost), lost.code)


def _tell(group: _Group, sentence: str, code: int) -> None:
    """Tells the other processes that this one ends, why, and with which exit code."""
    told = json.dumps([sentence, code])
    group.client.key_value_set(f"famx/ended/{group.index}", told, allow_overwrite=True)


def _linger(group: _Group, seconds: float) -> None:
    """Waits until the other processes have ended, too, since the store ends with process 0."""
    end = time.monotonic() + seconds
    while len(group.client.key_value_dir_get("famx/ended")) < group.count and time.monotonic() < end:
        time.sleep(_SLICE / 10)


def of_a_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of an operation with a process that is gone."""
    return any(_BROKEN.search(str(one)) and not isinstance(one, OSError) for one in causes(error))


def _loss(group: _Group) -> PeerLost:
    """The loss of another process to which a connection broke."""
    with contextlib.suppress(Exception):
        time.sleep(_SLICE)  # the other process may be about to tell why it ends
        try:
            _raise_if_one_ended(group)
        except PeerLost as lost:
            return lost
    which = f"Process {group.others.pop()}" if group.count == 2 else "Another process"
    return PeerLost(f"{which} of this run is gone: the connection to it broke. {_AGAIN}")


def _exit(sentence: str, code: int) -> None:
    """Ends the process with a sentence, without waiting for others; only the first call has an effect."""
    if not _leaving.acquire(blocking=False):
        time.sleep(_LINGER)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"famx: error: {sentence}\n")
        sys.stderr.flush()
    os._exit(code)


_leaving = threading.Lock()
_handlers: list[Any] = []  # callbacks of C, which must not be freed


def _on_abort(handle: Any) -> None:
    """Calls `handle` when a library aborts the process; the process aborts if it returns.

    jax ends a process by SIGABRT, from a thread of its own, as soon as process 0 is gone. Python's own
    handlers run only in the main thread, and only later.
    """
    library = ctypes.CDLL(None)

    def handler(number: int) -> None:
        handle()
        library.signal(number, None)  # the default: abort

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handler))
    library.signal(signal.SIGABRT, _handlers[-1])
