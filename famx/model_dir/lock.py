"""One run for each MODEL_DIR: a lock that ends with the process that holds it.

`MODEL_DIR/run.lock` exists while a run has the directory. The run holds an flock on it, which the system
releases when the process ends, however it ends. Since some shared file systems (object stores, some
network file systems) do not share such locks, the file is also a lease: it names host and process and a
heartbeat, which changes every few seconds. A lease whose heartbeat stands still has been left by a run
that was killed, and is taken over. In a store (gs://) there is no flock, but the file is written only if
nobody else has written it since it was read, so that of two runs one gets it.
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
from famx.base.files import is_stored

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
    lock, sentence = (StoredLock if is_stored(directory) else RunLock)(directory), None
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
        self._begin_to_beat()

    def check(self) -> None:
        """Make sure, in all processes of the run, that it still has the directory.

        Raises:
          ConfigError: another run has taken it over, because this one was not running for a time.
        """
        sentence = None
        if self._held:
            try:
                self._check_own()
            except ConfigError as error:
                sentence = str(error)
        if (sentence := agreed(sentence)) is not None:
            raise ConfigError(sentence)

    def release(self) -> None:
        """Give the lock back, and remove its file; does nothing without the lock."""
        if not self._held:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, ConfigError):
            self._check_own()
            self._remove()
        self._close()

    @property
    def _held(self) -> bool:
        return self._file is not None

    def _begin_to_beat(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="run_lock", daemon=True)
        self._thread.start()

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

    def _remove(self) -> None:
        if self._is_open_file():
            self._path.unlink()

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
        left = self._lease_seconds - self._age()
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

    def _age(self) -> float:
        """For how many seconds the lease has not changed, as far as that is known."""
        return max(0.0, self._clock() - self._path.stat().st_mtime)

    def _clock(self) -> float:
        """The time of the file system, which gives files their times."""
        probe = self._directory / f".{FILE}.{os.getpid()}"
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _check_own(self) -> None:
        self._check_lease(self._read())

    def _check_lease(self, lease: dict[str, Any]) -> None:
        """Raises ConfigError if another run has written a lease."""
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


class StoredLock(RunLock):
    """As `RunLock`, in a store, where the lease is replaced only if it is the one that was read.

    A run that cannot write its lease for longer than `lease_seconds` may be taken over. It notices before
    its next checkpoint, since `check` writes the lease as well.
    """

    def __init__(self, directory: pathlib.Path, *seconds: float):
        super().__init__(directory, *seconds)
        self._stamp: bytes | None = None  # of the lease that this run has written; None: it has none
        self._writing = threading.Lock()

    def acquire(self) -> None:
        content, stamp = self._path.read_stamped()
        self._check_left(_lease(content), locked=False)
        latest, newest = self._path.read_stamped()
        if newest != stamp and latest is not None:
            raise self._taken(_lease(latest))
        self._lease = {**_new_lease(), "beat": 1, "time": time.time()}
        self._stamp = self._path.write_if(self._content(), newest)
        if self._stamp is None:
            raise self._taken(self._read())
        self._begin_to_beat()

    @property
    def _held(self) -> bool:
        return self._stamp is not None

    def _content(self) -> bytes:
        return json.dumps(self._lease).encode()

    def _read(self) -> dict[str, Any]:
        return _lease(self._path.read_stamped()[0])

    def _write(self) -> None:
        """Nothing: `_check_own` has written the lease."""

    def _check_own(self) -> None:
        with self._writing:
            self._lease = {**self._lease, "beat": self._lease["beat"] + 1, "time": time.time()}
            written = self._path.write_if(self._content(), self._stamp)
            while written is None:  # another has written or removed it, or the answer was lost
                content, stamp = self._path.read_stamped()
                self._check_lease(_lease(content))
                written = stamp if content else self._path.write_if(self._content(), stamp)
            self._stamp = written

    def _remove(self) -> None:
        self._path.write_if(None, self._stamp)

    def _close(self) -> None:
        self._stamp = None

    def _age(self) -> float:
        return 0.0  # the clocks of two machines are not compared


def _lease(content: bytes | None) -> dict[str, Any]:
    """A lease as JSON; empty if there is none, or it cannot be read."""
    try:
        lease = json.loads(content or b"")
        return lease if isinstance(lease, dict) else {}
    except ValueError:
        return {}


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
