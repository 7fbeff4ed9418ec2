"""One run for each MODEL_DIR: a lock that ends with the process that holds it.

`MODEL_DIR/run.lock` exists while a run has the directory. The run holds an flock on it, which the system
releases when the process ends, however it ends. Since some shared file systems (object stores, some
network file systems) do not share such locks, the file is also a lease: it names host and process and a
heartbeat, which changes every few seconds. A lease whose heartbeat stands still has been left by a run
that was killed, and is taken over.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax

from famx.base.distributed import agreed
from famx.base.errors import ConfigError

FILE = "run.lock"
BEAT_SECONDS = 10.0
LEASE_SECONDS = 45.0  # without a heartbeat, after which a run is taken for dead
_SETTLE_SECONDS = 2.0  # for which a new lease must stay unchanged where there is no flock
_BYTES = 1024  # size of the file, which is always written as a whole
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def run_lock(directory: pathlib.Path) -> Iterator["RunLock"]:
    """A context in which this run, alone, has a MODEL_DIR; all its processes must enter it.

    Raises:
      ConfigError: another run has the directory; the sentence names its host and process.
    """
    lock, sentence = RunLock(directory), None
    if jax.process_index() == 0:
        try:
            lock.acquire()
        except ConfigError as error:
            sentence = str(error)
        except OSError as error:
            sentence = f"{directory / FILE} cannot be written: {error.strerror}."
    try:
        if (sentence := agreed(sentence)) is not None:
            raise ConfigError(sentence)
        yield lock
    finally:
        lock.release()


class RunLock:
    """The lock of a MODEL_DIR, of which process 0 of a run holds one.

    Args:
      directory: the MODEL_DIR, which exists.
      beat_seconds: time between two heartbeats.
      lease_seconds: time without a heartbeat after which a lease counts for nothing.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        beat_seconds: float = BEAT_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ):
        self._directory, self._path = directory, directory / FILE
        self._beat_seconds, self._lease_seconds = beat_seconds, lease_seconds
        self._file: int | None = None
        self._lease: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; waits only for a lease of another machine that may have been left.

        Raises:
          ConfigError: another run has the directory.
          OSError: the file cannot be written.
        """
        locked = self._open()
        try:
            self._check_left(self._read(), locked)
            self._lease = _new_lease()
            self._write()
            if not locked:
                time.sleep(min(_SETTLE_SECONDS, self._lease_seconds))
                self._check_own()
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._beat, name="run_lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure, in all processes of the run, that it still has the directory.

        Raises:
          ConfigError: another run has taken it over, because this one was not running for a time.
        """
        sentence = None
        if self._file is not None:
            try:
                self._check_own()
            except ConfigError as error:
                sentence = str(error)
        if (sentence := agreed(sentence)) is not None:
            raise ConfigError(sentence)

    def release(self) -> None:
        """Give the lock back, and remove its file; does nothing without the lock."""
        if self._file is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, ConfigError):
            self._check_own()
            if self._is_open_file():
                self._path.unlink()
        self._close()

    # -------------------------------------------------------------- the file

    def _open(self) -> bool:
        """Opens the file and locks it; returns whether the file system has locks."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            os.register_at_fork(after_in_child=self._forget)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lease = self._read()
                self._close()
                raise self._taken(lease) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    self._close()
                    raise
                return False
            if self._is_open_file():
                return True
            self._close()  # its owner has just removed it

    def _is_open_file(self) -> bool:
        """Whether the path still leads to the open file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _forget(self) -> None:
        """In a forked process, which must not keep the lock when this one has ended."""
        with contextlib.suppress(OSError):
            self._close()

    def _read(self) -> dict[str, Any]:
        """The lease in the file; empty if there is none, or it cannot be read."""
        for _ in range(5):
            data = self._path.read_bytes()[:_BYTES] if self._path.exists() else b""
            try:
                lease = json.loads(data)
                return lease if isinstance(lease, dict) else {}
            except ValueError:
                if not data.strip():
                    return {}
                time.sleep(0.1)  # it is being written
        return {}

    def _write(self) -> None:
        self._lease = {**self._lease, "beat": self._lease["beat"] + 1, "time": time.time()}
        os.pwrite(self._file, json.dumps(self._lease).encode().ljust(_BYTES), 0)
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            with contextlib.suppress(OSError, ConfigError):  # a full disk must not end the heartbeat
                self._check_own()
                self._write()

    # -------------------------------------------------------------- whose it is

    def _check_left(self, lease: dict[str, Any], locked: bool) -> None:
        """Raises ConfigError unless the run that wrote a lease has ended."""
        if not lease:
            return
        if lease.get("machine") == _machine():
            if locked:
                return
            if lease.get("processes") == _processes():
                if _started(lease.get("pid")) == lease.get("started"):
                    raise self._taken(lease)
                return
        age = max(0.0, self._clock() - self._path.stat().st_mtime)
        left = self._lease_seconds - age
        if left > 0:
            print(
                f"Waiting up to {left:.0f} s, since the run of {_name(lease)} may still have"
                f" {self._directory} ...",
                file=sys.stderr,
            )
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat_seconds / 4))
            now = self._read()
            if not now:
                return
            if (now.get("token"), now.get("beat")) != (lease.get("token"), lease.get("beat")):
                raise self._taken(now)

    def _clock(self) -> float:
        """The time of the file system, which gives files their times."""
        probe = self._directory / f".{FILE}.{os.getpid()}"
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _check_own(self) -> None:
        lease = self._read()
        if lease and lease.get("token") != self._lease["token"]:
            raise ConfigError(
                f"The run of {_name(lease)} has taken over MODEL_DIR {self._directory}: this one stood"
                " still for too long, and ends without saving."
            )

    def _taken(self, lease: dict[str, Any]) -> ConfigError:
        since = lease.get("since")
        return ConfigError(
            f"MODEL_DIR {self._directory} is in use by the run of {_name(lease)}"
            f"{f', which began at {since}' if since else ''}: wait until it ends, stop it, or choose"
            " another MODEL_DIR."
        )


def _new_lease() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "machine": _machine(),
        "processes": _processes(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _name(lease: dict[str, Any]) -> str:
    return f"process {lease.get('pid', 'unknown')} on host {lease.get('host', 'unknown')}"


def _machine() -> str:
    """An identifier of this machine since it was started."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _processes() -> str:
    """An identifier of the numbering of processes, of which each container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """When a process of this machine started, in the system's ticks; None: there is no such process."""
    try:
        return pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[-1].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
