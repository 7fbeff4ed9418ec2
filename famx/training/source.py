"""What a feed makes rows of: a task, and the shape of its rows."""

import dataclasses
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.tasks import Kind, kind_of
from famx.training.curriculum import Curriculum


@dataclasses.dataclass(frozen=True)
class Source:
    """A task and the shape of the rows that a feed makes of it.

    Attributes:
      task: rows by index, documents, or a task of SeqIO.
      batch_size: number of rows of the global batch.
      length: number of tokens of a row.
      block_size: number of tokens of a block.
      random_seed: seed of the order of documents and of the draws of a curriculum.
      shard: index of this host, and number of hosts.
      curriculum: distribution of document lengths; None: rows of `length` tokens.
      packed: whether rows hold several documents, see `famx.training.run.Data`.
      stage: index of the stage of the run, see `famx.training.stages`; each has documents of its own, or
        an order of its own.
    """

    task: Any
    batch_size: int
    length: int
    block_size: int
    random_seed: int = 0
    shard: tuple[int, int] = (0, 1)
    curriculum: Curriculum | None = None
    packed: bool | None = None
    stage: int = 0
    skip_bad: bool = False

    @property
    def order_seed(self) -> int:
        """Seed of the order of documents."""
        if self.stage == 0:
            return self.random_seed
        return int(np.random.SeedSequence([self.random_seed, self.stage]).generate_state(1)[0])

    @property
    def indexed(self) -> bool:
        """Whether the task makes rows by index."""
        return kind_of(self.task) is Kind.MADE

    @property
    def is_seqio(self) -> bool:
        """Whether the task is one of SeqIO, neither rows by index nor documents."""
        return kind_of(self.task) is Kind.SEQIO

    def check_rows(self, whole_blocks: bool) -> None:
        """Raises ConfigError if a row is shorter than a block, or does not hold whole blocks but must.

        Likewise if the task keeps statements within blocks, as `DistanceProbe` does, and these do not
        divide those of the model.
        """
        size, length = self.block_size, self.length
        if length < size:
            raise ConfigError(
                f"The row length {length} of TASK_FEATURE_LENGTHS is shorter than a block of {size}"
                f" tokens: use at least {size} or change DecoderConfig.block_size."
            )
        if length % size and (whole_blocks or self.curriculum is not None):
            raise ConfigError(
                f"The row length {length} of TASK_FEATURE_LENGTHS must be a multiple of the block size "
                f"{size} where states are carried from row to row or a curriculum counts blocks: use"
                f" {length // size * size}, or change DecoderConfig.block_size."
            )
        own = getattr(self.task, "block_size", None) if self.indexed else None
        if own is not None and size % own:
            raise ConfigError(
                f"{type(self.task).__name__} keeps statements within blocks of {own} tokens, but those of"
                f" the model have {size}: set its block_size to {size} in TASK_OPTIONS, or in the options"
                " of a stage that has other blocks."
            )
