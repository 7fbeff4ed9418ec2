"""Batches that are made on a thread before their steps begin.

The content of a batch may depend on metrics (`famx.training.curriculum`). A resumed run must draw the
same batches as an uninterrupted one, so the batch of step `s` depends on exactly the metrics of the steps
up to `s - 1 - OBSERVED_DELAY`: metrics are read `METRICS_DELAY` steps after their step began, and the
batch that is made then is that of `BATCHES_AHEAD` steps later.
"""

import queue
from typing import Any

from famx.base.errors import BadData
from famx.data.rows.prefetching import Prefetch
from famx.training.feeds import Feed, Rows

METRICS_DELAY = 2  # number of steps that may run on the devices while the host reads older metrics
BATCHES_AHEAD = 2  # number of batches that are made while earlier steps run
OBSERVED_DELAY = METRICS_DELAY + BATCHES_AHEAD


class BatchesAhead:
    """Runs a feed on a thread; the feed must not be used elsewhere until `close`.

    Batches are requested and taken in the order of their steps.

    Args:
      feed: the feed, at the position of the first requested step.
      steps: number of steps of the run; no batch is made for later ones.
    """

    def __init__(self, feed: Feed, steps: int):
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._made = Prefetch(_Requested(feed, steps, self._requests), BATCHES_AHEAD + 1)
        self._next: tuple[Any, Rows | BadData | None] | None = None

    def ask(self, step: int, observed: tuple[int | None, float] | None = None) -> None:
        """Requests the batch of `step`, which is made after the feed has observed `(blocks, metric)`."""
        self._requests.put((step, observed))

    def state(self) -> Any:
        """The feed's state before the batch that `take` returns next; waits for that batch.

        Raises:
          Exception: whatever the feed raised, except BadData; `take` raises it too.
        """
        if self._next is None:
            self._next = next(self._made)
        return self._next[0]

    def take(self) -> Rows:
        """The next batch; waits until it is made.

        Raises:
          BadData: the data of the batch cannot be used. `state` still returns the state before it.
        """
        self.state()
        if isinstance(self._next[1], BadData):
            raise self._next[1]
        (_, rows), self._next = self._next, None
        return rows

    def close(self) -> None:
        """Ends the thread."""
        self._requests.put(None)
        self._made.close()


class _Requested:
    """The iterator that the thread runs: one item `(state before the batch, batch)` per request.

    An error of the data takes the place of its batch.
    """

    def __init__(self, feed: Feed, steps: int, requests: queue.SimpleQueue):
        self._feed, self._steps, self._requests = feed, steps, requests

    def __next__(self):
        request = self._requests.get()
        if request is None:
            raise StopIteration
        step, observed = request
        if observed is not None:
            self._feed.observe(*observed)
        state = self._feed.get_state()
        if step >= self._steps:
            return state, None
        try:
            return state, self._feed.next(step)
        except BadData as error:  # raised by `take`: until then the state before it is of use
            return state, error
        except OSError as error:
            if error.filename is None:
                raise
            return state, BadData(f"{error.filename} cannot be read: {error.strerror}.")

    def get_state(self):
        return None  # each item has its own
