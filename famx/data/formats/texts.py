"""Text files as records, and the records of a split, for several formats."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from famx.data.storage import validation_names
from famx.data.storage.records import where
from famx.data.storage.unchanged import Unchanged, check_size, decoded
from famx.data.tasks.examples import Example, Records


class EmptySplit(ValueError):
    """The files have records, but none of this split."""


class TextFolder:
    """Text files as records with `name` and `text`, each read at access.

    Args:
      paths: the files, in order.
      names: their names.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str]):
        self.paths, self.names = paths, names
        self._unchanged = Unchanged(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Document {i} is not one of {len(self)} documents.")
        check_size(self.paths[i], self._unchanged.size(self.paths[i]))
        self._unchanged.check(self.paths[i])
        with open(self.paths[i], "rb") as file:
            return {"name": self.names[i], "text": self.decode(file.read(), i)}

    def decode(self, data: bytes, i: int) -> str:
        """Decode the text of file `i`; raises BadRecord if it is not UTF-8."""
        return decoded(data, self.paths[i])

    def where(self, i: int) -> str:
        """The place of a record, see `famx.data.storage.records.where`."""
        return self.paths[i]


class Part:
    """The records of a split, "train" or "validation", chosen by a hash of their names.

    Raises:
      EmptySplit: the split has no record.
    """

    def __init__(
        self, records: Records, names: Sequence[str], split: str, fraction: float = 0.05, seed: int = 0
    ):
        held_out = validation_names(names, fraction, seed)
        self.records = records
        self._numbers = np.array(
            [i for i, name in enumerate(names) if (name in held_out) == (split == "validation")],
            np.int64,
        )
        if not len(self._numbers):
            raise EmptySplit(
                f"The {split} split has none of {len(names)} records; add more of them."
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        return self.records[int(self._numbers[i])]

    def where(self, i: int) -> str:
        """The place of a record, see `famx.data.storage.records.where`."""
        return where(self.records, int(self._numbers[i]))


def preprocess_text(record: Mapping[str, Any]) -> Example:
    """Make an example of kind "documents" from a record with `name` and `text`."""
    return {"id": record["name"], "inputs": "", "targets": record["text"], "references": []}
