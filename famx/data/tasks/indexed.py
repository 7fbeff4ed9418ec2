"""Examples of a task that is made by index, as documents."""

import numpy as np

from famx.data.tasks.kinds import Made


class IndexedDocuments:
    """Examples `start` to `start + count - 1` of a task as documents, all of one length.

    Item `i` is the pair (tokens int32 `[length]`, loss weights float32 `[length]`).
    """

    def __init__(self, task: Made, length: int, count: int, start: int = 0):
        self.task, self.length, self._count, self._start = task, length, count, start

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < self._count:
            raise IndexError(f"Document {i} is not one of {self._count} documents.")
        batch = self.task.batch([self._start + i], self.length)  # `example` may also decode the prompt
        return batch["decoder_target_tokens"][0], batch["decoder_loss_weights"][0]

    def num_tokens(self, i: int) -> int:
        """Number of tokens, the same for every document."""
        return self.length
