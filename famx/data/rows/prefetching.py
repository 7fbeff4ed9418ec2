"""Batches made ahead of time in a thread."""

import queue
import threading
from typing import Any

import numpy as np


class Prefetch:
    """Makes the batches of an iterator ahead of time in a thread.

    `get_state` ignores the batches made ahead: it is the state after the last batch returned. Do not use
    or change the iterator while the thread runs; `close` ends the thread.
    """

    def __init__(self, batches: Any, size: int = 2):
        """
        Args:
          batches: an iterator with `get_state` and `set_state`, such as `PackedRows`.
          size: number of batches made ahead.

        Raises:
          ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"Prefetch needs room for at least 1 batch, but its size is {size}.")
        self._batches, self._size = batches, size
        self._start(batches.get_state())

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          StopIteration: the iterator has ended, or `close` was called.
          Exception: the exception of the iterator, again at every further call.
        """
        if self._error is not None:
            raise self._error
        batch, state, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def get_state(self) -> dict[str, Any]:
        """The iterator's state after the last batch that was returned."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drop the batches made ahead and continue from `state`."""
        self.close()
        self._batches.set_state(state)
        self._start(state)

    def close(self) -> None:
        """End the thread; `set_state` starts it again."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)  # the thread may be waiting for a free slot
            except queue.Empty:
                pass
        self._error = StopIteration()

    def _start(self, state: dict[str, Any]) -> None:
        self._state, self._error = state, None
        self._ready, self._stop = queue.Queue(self._size), threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(self._batches, self._ready, self._stop), daemon=True)
        self._thread.start()


def _fill(batches: Any, ready: queue.Queue, stop: threading.Event) -> None:
    """Put (batch, state after it, None) until `stop` is set; after an error (None, None, error)."""
    while not stop.is_set():
        try:
            item = (next(batches), batches.get_state(), None)
        except Exception as error:  # raised in the thread that asks for batches
            item = (None, None, error)
        ready.put(item)
        if item[2] is not None:
            return
