"""Packed rows: every lane of the batch is an endless stream of documents, one after another."""

import queue
import threading
from typing import Any

import numpy as np

from famx.data.rows.lanes import ContinuousLanes, Documents


class PackedRows(ContinuousLanes):
    """An endless iterator of batches whose rows hold several documents.

    Like `ContinuousLanes`, but a lane whose document has ended goes on with the next one in the same
    row. Nothing masks one document from the next: the model must learn to forget. A document longer
    than what is left of its row continues at the start of the same lane's row in the next step, so
    its state can be handed on. Every step yields, for the rows of this shard
    (B = batch_size / num_shards):

      decoder_input_tokens int32 [B, L]: bos first in a document; elsewhere the target before
      decoder_target_tokens int32 [B, L]: the documents' tokens, and nothing between them
      decoder_loss_weights float32 [B, L]: 1, or the documents' own weights, bit for bit
      reset bool [B]: True where the row begins with a new document

    With `whole_documents`, a document that fits a row but not what is left of this one waits for the
    lane's next row; the rest of this row is padding of weight 0. A longer document begins at once.
    Without it, rows hold no padding at all.

    The order of an epoch, the rows of a shard, and `get_state`/`set_state` are those of
    `ContinuousLanes`: every epoch takes every document once, all hosts follow one global schedule,
    and the state resumes in the middle of a document on any number of shards.
    """

    _several_documents = True

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        length: int,
        seed: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
        bos_id: int = 1,
        pad_id: int = 0,
        whole_documents: bool = False,
    ):
        """
        Args:
          documents: see `famx.data.rows.lanes.Documents`; none may be empty.
          batch_size: number of rows over all shards.
          length: tokens of a row; may be changed between steps.
          seed: seed of the order of the documents.
          shard_index, num_shards: this host makes the rows from shard_index * B on.
          bos_id, pad_id: ids in front of a document, and in a row's rest that no document fits.
          whole_documents: cut only documents that are longer than a row, or begin before one ends.

        Raises:
          ValueError: there is no document, or a size is out of range or does not divide.
        """
        super().__init__(
            documents, batch_size, length, seed, shard_index, num_shards, bos_id, pad_id)
        self._whole_documents = whole_documents


class Prefetch:
    """Makes the batches of an iterator ahead in a thread; its state is that of the batch handed out.

    Meanwhile the iterator belongs to the thread: do not use or change it. `close` ends the thread.
    """

    def __init__(self, batches: Any, size: int = 2):
        """
        Args:
          batches: an iterator with `get_state` and `set_state`, such as `PackedRows`.
          size: number of batches that may wait.

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
          Exception: whatever the iterator raised, again at every further call.
        """
        if self._error is not None:
            raise self._error
        batch, state, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def get_state(self) -> dict[str, Any]:
        """The iterator's state after the last batch that was handed out."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drops what was made ahead and continues from `state`."""
        self.close()
        self._batches.set_state(state)
        self._start(state)

    def close(self) -> None:
        """Ends the thread; `set_state` starts it again."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)  # the thread may wait for room
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
    """Puts (batch, state after it, None) until told to stop; at an error (None, None, error)."""
    while not stop.is_set():
        try:
            item = (next(batches), batches.get_state(), None)
        except Exception as error:  # handed to the thread that asks for batches
            item = (None, None, error)
        ready.put(item)
        if item[2] is not None:
            return
