"""Batches and documents of tasks whose examples are addressed by an index."""

import dataclasses
from typing import Any

import numpy as np


def check_shards(batch_size: int, shard_index: int, num_shards: int) -> None:
    """Raises ValueError unless the batch divides into shards and the shard is one of them."""
    if num_shards < 1 or not 0 <= shard_index < num_shards:
        raise ValueError(f"Shard {shard_index} is not one of {num_shards} shards.")
    if batch_size < 1 or batch_size % num_shards:
        raise ValueError(
            f"A batch of {batch_size} rows cannot be divided evenly among {num_shards} shards; "
            "choose a batch size that is a multiple of the number of hosts."
        )


class IndexedBatches:
    """An endless iterator over `task.batch` of consecutive indices, with an exact position.

    `length` may be changed between steps (a curriculum). Every host takes its own rows of one
    global batch: shard s of n yields rows s * B / n and on.
    """

    def __init__(
        self,
        task: Any,
        batch_size: int,
        length: int,
        seed: int | None = None,
        start: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
        **example_kwargs: Any,
    ):
        """
        Args:
          task: an object with `batch(indices, length, **example_kwargs)`, such as `PasskeyTask`.
          batch_size: rows of the global batch.
          length: tokens of a row.
          seed: replaces the seed of the task, which must be a dataclass then; None keeps it.
          start: index of the first example.
          shard_index, num_shards: which part of the global batch this host makes.
          **example_kwargs: handed to `task.batch`.

        Raises:
          ValueError: the batch does not divide into the shards.
        """
        check_shards(batch_size, shard_index, num_shards)
        self.task = task if seed is None else dataclasses.replace(task, seed=seed)
        self.batch_size, self.length, self._next = batch_size, length, start
        self._rows = batch_size // num_shards
        self._first_row = shard_index * self._rows
        self._example_kwargs = example_kwargs

    def __iter__(self) -> "IndexedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._next + self._first_row
        batch = self.task.batch(
            range(first, first + self._rows), self.length, **self._example_kwargs
        )
        self._next += self.batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """The next index and the length, as plain numbers that JSON can hold."""
        return dict(next_index=int(self._next), length=int(self.length))

    def set_state(self, state: dict[str, int]) -> None:
        """Continue exactly where `get_state` was called, on any number of shards."""
        self._next, self.length = int(state["next_index"]), int(state["length"])


class IndexedDocuments:
    """Examples `start` to `start + count - 1` of a task as documents for continuous lanes.

    Item i is the pair (tokens int32 [length], loss weights float32 [length]).
    """

    def __init__(self, task: Any, length: int, count: int, start: int = 0, **example_kwargs: Any):
        self.task, self.length, self._count, self._start = task, length, count, start
        self._example_kwargs = example_kwargs

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < self._count:
            raise IndexError(f"Document {i} is not one of {self._count} documents.")
        row = self.task.example(self._start + i, self.length, **self._example_kwargs)
        return row["tokens"], row["weights"]

    def num_tokens(self, i: int) -> int:
        """Every document has the same number of tokens."""
        return self.length
