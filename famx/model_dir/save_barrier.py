"""How the processes of a run wait for each other in a save. Its own file, as orbax is slow to import."""

import sys
import threading
from collections.abc import Callable

from orbax.checkpoint import multihost

from famx.model_dir.commit import LAST_THREAD


class SaveBarrier:
    """Orbax' barrier, but for a process whose part of a save has failed.

    Before orbax raises the error of this process, it lets its last thread of the save wait for the other
    processes, and they wait for the part that failed: all would stand still until orbax gives up after 20
    minutes. So such a process does not wait.

    Args:
      failed: called with the error of such a process.
    """

    def __init__(self, failed: Callable[[BaseException], None]):
        self._failed = failed
        self._wait = multihost.get_barrier_sync_fn()
        self._told: BaseException | None = None
        self.waits = 0  # number of threads that wait for other processes

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have called it with this key, for at most `timeout_ms`."""
        error = sys.exc_info()[1]  # of a `finally`
        if error is not None and threading.current_thread().name == LAST_THREAD:
            if error is not self._told:
                self._told = error
                self._failed(error)
            return
        self.waits += 1
        try:
            self._wait(key=key, timeout_ms=timeout_ms)
        finally:
            self.waits -= 1
