"""Continuous lanes: each row of the batch reads a whole document over several steps."""

from typing import Any

import numpy as np

from famx.base.errors import BadData, BadRecord
from famx.data.rows.batches import check_shards
from famx.data.rows.documents import (
    CheckedDocuments,
    CountedDocuments,
    Documents,
    columns,
    empty_rows,
    place_of,
)


class ContinuousLanes:
    """An endless iterator of batches whose lanes each read one document, piece by piece.

    Each epoch shuffles the documents into one queue; a lane whose document has ended takes the next
    document. Every step yields, for the rows of this shard (B = batch_size / num_shards):

      decoder_input_tokens int32 [B, L]: the targets shifted by one; the first token is bos in a new
        document, and the last target of the previous piece in a later piece
      decoder_target_tokens int32 [B, L]: tokens of the document, with padding after its end
      decoder_loss_weights float32 [B, L]: 1, or the weights of the document; 0 on padding
      reset bool [B]: True if the lane begins a new document at this step

    and the features and values of documents that have such (`famx.data.rows.Documents`), zero in padding.
    """

    # famx.data.rows.packing.PackedRows overrides these.
    _several_documents = False  # a row may continue with the next document
    _whole_documents = False  # a document that does not fit into the rest of a row begins the next

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
        skip_bad: bool = False,
    ):
        """
        Args:
          documents: see `famx.data.rows.Documents`; none may be empty.
          batch_size: number of lanes of all shards together.
          length: number of tokens of a piece; may be changed between steps.
          seed: seed of the order of the documents.
          shard_index, num_shards: this host yields rows `shard_index * B` to
            `(shard_index + 1) * B - 1` of the global batch; all hosts follow one global schedule.
          bos_id, pad_id: ids before a document and after its end.
          skip_bad: leave out documents that raise BadRecord; `skipped` counts them.

        Raises:
          ValueError: there is no document, a size is out of range, or the batch does not divide among
            the shards.
        """
        check_shards(batch_size, shard_index, num_shards)
        if length < 1:
            raise ValueError(f"A row needs a length of at least 1 token, but it is {length}.")
        if not len(documents):
            raise ValueError("Lanes need at least one document, but there is none.")
        self.documents, self.batch_size, self.length, self.seed = (
            documents, batch_size, length, seed)
        self.bos_id, self.pad_id = bos_id, pad_id
        rows = batch_size // num_shards
        self._shard = range(shard_index * rows, (shard_index + 1) * rows)  # lanes of this host
        self._epoch, self._taken = 0, 0  # number of this epoch's documents that lanes have taken
        self._lanes = [None] * batch_size  # [document, offset, size] of every lane of all shards
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order of the documents)
        self._loaded: dict[int, dict[str, np.ndarray]] = {}  # lane of this host -> `columns`
        self._skip_bad = skip_bad
        self.skipped, self.last_skipped = 0, ""  # number of bad documents left out, the last one's error

    def __iter__(self) -> "ContinuousLanes":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = empty_rows(self.documents, len(self._shard), self.length, self.pad_id)
        reset = np.zeros(len(self._shard), bool)
        for lane in range(self.batch_size):
            used = 0
            while used < self.length:
                if self._lanes[lane] is None:
                    self._lanes[lane] = self._take(lane)
                document, offset, size = self._lanes[lane]
                room = self.length - used
                if self._whole_documents and room < size <= self.length:
                    break
                n = min(room, size - offset)
                start, end, stop = used, used + n, offset + n
                if lane in self._shard:
                    row = lane - self._shard.start
                    for name, array in self._load(lane, document, size).items():
                        batch[name][row, start:end] = array[offset:stop]
                    reset[row] |= start == offset == 0
                used = end
                self._lanes[lane] = [document, stop, size]
                if stop == size:
                    self._lanes[lane] = None
                    self._loaded.pop(lane, None)
                    if not self._several_documents:
                        break
        return {**batch, "reset": reset}

    def get_state(self) -> dict[str, Any]:
        """The position of all lanes of all shards, as JSON values."""
        return dict(
            epoch=self._epoch,
            taken=self._taken,
            lanes=[None if lane is None else list(lane) for lane in self._lanes],
            num_documents=len(self.documents),
            seed=self.seed,
            **({"skipped": self.skipped} if self.skipped else {}),
        )

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from the position of `get_state`, exactly, on any number of shards.

        Raises:
          ValueError: the number of documents, the batch size or the seed has changed.
        """
        current = (len(self.documents), self.batch_size, self.seed)
        saved = (state["num_documents"], len(state["lanes"]), state["seed"])
        names = ("number of documents", "batch size", "seed")
        for name, value, saved_value in zip(names, current, saved):
            if value != saved_value:
                raise ValueError(
                    f"These lanes cannot resume: the {name} was {saved_value} and is now {value}; resume "
                    "with the data and settings of the run that was saved."
                )
        self._epoch, self._taken = int(state["epoch"]), int(state["taken"])
        self.skipped = int(state.get("skipped", 0))
        self._lanes = [None if lane is None else list(lane) for lane in state["lanes"]]
        self._loaded = {}

    def _take(self, lane: int) -> list[int]:
        """Take the next document of the queue that can be used, as [document, offset 0, size]."""
        for _ in range(len(self.documents)):
            try:
                return self._take_next(lane)
            except BadRecord as error:
                if not self._skip_bad:
                    raise
                self.skipped, self.last_skipped = self.skipped + 1, str(error)
        raise BadData(f"None of the {len(self.documents)} documents can be used. {self.last_skipped}")

    def _take_next(self, lane: int) -> list[int]:
        if self._taken == len(self.documents):
            self._epoch, self._taken = self._epoch + 1, 0
        document = int(self._queue()[self._taken])
        self._taken += 1
        if isinstance(self.documents, CountedDocuments):
            if self._skip_bad and isinstance(self.documents, CheckedDocuments):
                self.documents.check(document)
            size = int(self.documents.num_tokens(document))
        else:
            loaded = columns(self.documents, document, self.bos_id)
            size = len(loaded["decoder_target_tokens"])
            if lane in self._shard:
                self._loaded[lane] = loaded
        if not size:
            place = place_of(self.documents, document)
            raise BadRecord(f"{place} is empty; leave empty documents out.")
        return [document, 0, size]

    def _queue(self) -> np.ndarray:
        """The order of the documents in this epoch."""
        if self._order is None or self._order[0] != self._epoch:
            rng = np.random.default_rng([self.seed, self._epoch])
            self._order = (self._epoch, rng.permutation(len(self.documents)))
        return self._order[1]

    def _load(self, lane: int, document: int, size: int) -> dict[str, np.ndarray]:
        if lane not in self._loaded:
            self._loaded[lane] = columns(self.documents, document, self.bos_id)
        loaded = self._loaded[lane]
        tokens, weights = loaded["decoder_target_tokens"], loaded["decoder_loss_weights"]
        if len(tokens) != size:
            raise BadData(
                f"{place_of(self.documents, document)} had {size} tokens and now has {len(tokens)}; do"
                " not change the text during a run."
            )
        if len(weights) != size:
            raise BadData(
                f"{place_of(self.documents, document)} has {size} tokens but {len(weights)} loss weights;"
                " give every token one weight."
            )
        return loaded
