"""Where a training step's batch comes from, and from which states its examples go on.

A feed has `next(step) -> (batch, blocks)` (numpy rows of this host; `blocks` is the length of the
documents, or None), `observe(blocks, value) -> bool` for a curriculum, `prepare(step, params, lanes)
-> lanes` for states made before the step, and `get_state`/`set_state` for exact resumption.
"""

import math
from typing import Any

import jax
import numpy as np

from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, ContinuousLanes, IndexedDocuments, PackedRows
from famx.data.tasks import Kind, kind_of, vocabulary_of
from famx.decoding import Streamer
from famx.training import state_passing as passing
from famx.training.curriculum import Curriculum


class Feed:
    """What a feed does unless it says otherwise: no curriculum, no states of its own."""

    def next(self, step: int):
        """`(batch, blocks)` of the step: this host's rows, and the documents' length or None."""
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps to go on exactly here, as JSON can hold it."""
        raise NotImplementedError

    def set_state(self, state) -> None:
        """Goes on from what `get_state` gave."""
        raise NotImplementedError

    def observe(self, blocks, value):
        """Takes a batch's metric; True if that unlocked longer documents."""
        return False

    def prepare(self, step, params, lanes):
        """The lanes' states before the step."""
        return lanes


class LaneFeed(Feed):
    """Documents read by continuous lanes. The engine carries the states, unless told not to."""

    def __init__(self, lanes: ContinuousLanes):
        self.lanes = lanes

    def next(self, step):
        return next(self.lanes), None

    def get_state(self):
        return self.lanes.get_state()

    def set_state(self, state):
        try:
            self.lanes.set_state(state)
        except ValueError as error:
            raise ConfigError(str(error)) from error


class SeqioFeed(Feed):
    """Rows of a SeqIO task or mixture; needs seqio, which the task's own module has imported."""

    def __init__(self, task, batch_size, length, seed, shard, packed=False):
        import seqio

        from famx.data.seqio import FamFeatureConverter

        vocabulary = task.output_features["targets"].vocabulary
        bos_id = check_bos(getattr(vocabulary, "bos_id", 1), task.name)
        dataset = seqio.get_dataset(
            task.name,
            {"targets": length},
            dataset_split="train",
            shuffle=True,
            num_epochs=None,
            seed=seed,
            shard_info=seqio.ShardInfo(*shard),
            trim_output_features=not packed,
            feature_converter=FamFeatureConverter(
                pack=packed, bos_id=bos_id, pad_id=vocabulary.pad_id
            ),
        )
        self._dataset = dataset.batch(batch_size // shard[1], drop_remainder=True)
        self.set_state({"batches": 0})

    def next(self, step):
        self._taken += 1
        return next(self._batches), None

    def get_state(self):
        return {"batches": self._taken}

    def set_state(self, state):
        """Goes on after so many batches of the same, seeded order."""
        self._taken = int(state["batches"])
        self._batches = self._dataset.skip(self._taken).as_numpy_iterator()


class IndexedFeed(Feed):
    """Rows of a task that is a pure function of an index; step `s` has indices `s * B` and on.

    Args:
      task: an object with `batch(indices, length)`, such as `PasskeyTask`.
      batch_size: rows of the global batch.
      block_size: tokens of a block.
      blocks: blocks through which the gradient goes; longer documents need an `AgedFeed`.
      length: tokens of a row of `blocks` blocks, if its last block is not whole; None: whole blocks.
      curriculum: draws the lengths; None: always `blocks`.
      seed: of the draws.
      shard: this host's index, and how many hosts there are.
    """

    def __init__(
        self, task, batch_size, block_size, blocks, curriculum, seed, shard=(0, 1), length=None
    ):
        self.length = length or blocks * block_size
        self.task, self.batch_size, self.block_size, self.blocks = task, batch_size, block_size, blocks
        self.curriculum = curriculum or Curriculum((blocks,))
        self.seed, self.shard = seed, shard
        if curriculum is None and self.length < task.min_length:
            raise ConfigError(
                f"The rows hold {self.length} tokens, but the task needs {task.min_length}: raise"
                " TASK_FEATURE_LENGTHS."
            )
        shortest, longest = min(self.curriculum.blocks), max(self.curriculum.blocks)
        needed = math.ceil(task.min_length / block_size)
        if shortest < needed:
            raise ConfigError(
                f"The shortest length of the curriculum is {shortest} blocks of {block_size} tokens, "
                f"but the task needs {task.min_length} tokens, {needed} blocks."
            )
        if longest > blocks and type(self) is IndexedFeed:
            raise ConfigError(
                f"The curriculum goes to {longest} blocks, but the rows hold {blocks}: raise "
                "TASK_FEATURE_LENGTHS, or set STATE_PASSING to 'aged'."
            )

    def rng(self, step, stream):
        """The draws of a step, a stream for each purpose."""
        return np.random.default_rng([self.seed, step, stream])

    def next(self, step):
        blocks = self.curriculum.draw(self.rng(step, 0))
        return self.fresh(step, blocks), blocks

    def fresh(self, step, blocks):
        """A batch of whole documents of so many blocks."""
        return self.rows(step * self.batch_size, blocks)

    def rows(self, first, blocks):
        """The documents from index `first` on: this host's part of a global batch."""
        index, count = self.shard
        rows = self.batch_size // count
        start = first + index * rows
        length = self.length if blocks == self.blocks else blocks * self.block_size
        return self.task.batch(range(start, start + rows), length)

    def observe(self, blocks, value):
        return self.curriculum.observe(blocks, value)

    def get_state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.get_state()}

    def set_state(self, state):
        self.curriculum.set_state(state["curriculum"])


class AgedFeed(IndexedFeed):
    """Rows that end documents longer than the gradient reaches: the aged-state pool.

    The pool has `groups` groups of a batch each. Every `refresh_period` steps one group is made
    anew: fresh documents, all of one length, are read up to their last `blocks` blocks under the
    current weights without gradient, and their states are kept. A step on a group trains the rest.
    """

    def __init__(self, *args, model, groups=8, refresh_period=8, place=lambda batch: batch, **kwargs):
        super().__init__(*args, **kwargs)
        if groups < 1 or refresh_period < 1:
            raise ConfigError("The aged-state pool needs groups and refresh_period of at least 1.")
        aged = sum(b > self.blocks for b in set(self.curriculum.blocks))
        if groups < aged:
            raise ConfigError(
                f"The curriculum has {aged} lengths beyond the {self.blocks} blocks of a row, but "
                f"the aged-state pool only {groups} groups: raise pool_groups to at least {aged}."
            )
        self.model, self.refresh_period, self.place = model, refresh_period, place
        self.streamer = Streamer(model.module)
        self.lengths, self.firsts = [0] * groups, [0] * groups  # blocks and first index of each
        self.made = 0  # groups ever made
        self._put = jax.jit(_put_group, donate_argnums=0, static_argnums=2)

    @property
    def pool_size(self) -> int:
        """States in the pool."""
        return len(self.lengths) * self.batch_size

    def next(self, step):
        blocks = self.curriculum.draw(self.rng(step, 0))
        if blocks > self.blocks:
            groups = [g for g, length in enumerate(self.lengths) if length == blocks]
            groups = groups or [g for g, length in enumerate(self.lengths) if length]
            if groups:
                return self._group(int(self.rng(step, 1).choice(groups)))
            blocks = self.blocks
        batch = self.fresh(step, blocks)
        rows = len(batch["decoder_input_tokens"])
        return {**batch, "lane": np.full(rows, -1, np.int32)}, blocks

    def prepare(self, step, params, lanes):
        """Makes a group anew where one is due."""
        unlocked = [b for b in self.curriculum.blocks[: self.curriculum.stage + 1] if b > self.blocks]
        missing = [b for b in unlocked if b not in self.lengths]
        if not unlocked or (step % self.refresh_period and not missing):
            return lanes
        blocks = missing[-1] if missing else int(self.rng(step, 2).choice(unlocked))
        group = self.made % len(self.lengths)
        # The indices of pool documents never meet those of the fresh ones.
        self.lengths[group], self.firsts[group] = blocks, 2**40 + self.made * self.batch_size
        self.made += 1
        prefix = self.rows(self.firsts[group], blocks)["decoder_input_tokens"]
        prefix = prefix[:, : (blocks - self.blocks) * self.block_size]
        params = self.model.merged(params)
        state = self.streamer.initial_state(params, self.batch_size)
        _, state = self.streamer.read(params, state, self.place(prefix), aligned=True)
        where = jax.tree.map(lambda x: x.sharding, lanes)  # and there they stay
        return jax.device_put(self._put(lanes, state, group), where)

    def _group(self, group):
        blocks = self.lengths[group]
        rows = self.rows(self.firsts[group], blocks)
        start = (blocks - self.blocks) * self.block_size
        batch = {k: v[:, start:] for k, v in rows.items() if k.startswith("decoder_")}
        index, count = self.shard
        size = self.batch_size // count
        if "answer_start" in rows:
            batch["answer_start"] = rows["answer_start"] - start
        batch["lane"] = (group * self.batch_size + index * size + np.arange(size)).astype(np.int32)
        return batch, blocks

    def get_state(self):
        state = super().get_state()
        return {**state, "lengths": self.lengths, "firsts": self.firsts, "made": self.made}

    def set_state(self, state):
        super().set_state(state)
        self.lengths, self.firsts = list(state["lengths"]), list(state["firsts"])
        self.made = int(state["made"])


def _put_group(pool, state, group):
    size = state.batch_size
    put = lambda a, b, axis: jax.lax.dynamic_update_slice_in_dim(a, b, group * size, axis)
    return pool.map_examples(put, state)


def check_bos(bos_id: int | None, name: str) -> int:
    """`bos_id`, or ConfigError where the vocabulary of the task `name` has none."""
    if bos_id is None:
        raise ConfigError(
            f"The vocabulary of {name} has no token that begins a text: open it with bos_id=..., the id"
            " of a token to take."
        )
    return bos_id


def make_feed(
    task, mode, model, batch_size, length, curriculum, seed, shard, place, pool_groups, pool_refresh,
    lane_documents, packed=None,
):  # fmt: skip
    """The feed of a task under a state-passing mode; `length` tokens are one training row.

    `packed` fills rows of documents with several of them; None: unless lanes carry states.

    Raises:
      ConfigError: the task, the mode and the lengths do not go together.
    """
    size = model.config.block_size
    if mode not in passing.MODES:
        raise ConfigError(
            f"STATE_PASSING is {mode!r}; choose one of {', '.join(passing.MODES)}."
        )
    if length < size:
        raise ConfigError(
            f"The row length {length} of TASK_FEATURE_LENGTHS is shorter than a block of {size} tokens:"
            f" use at least {size} or change DecoderConfig.block_size."
        )
    if length % size and (mode in ("continuous", "aged") or curriculum is not None):
        raise ConfigError(
            f"The row length {length} of TASK_FEATURE_LENGTHS must be a multiple of the block size "
            f"{size} where states are carried from row to row or a curriculum counts blocks: use"
            f" {length // size * size}, or change DecoderConfig.block_size."
        )
    kind = kind_of(task)
    indexed = kind is Kind.MADE
    if kind is Kind.SEQIO:
        if mode not in ("none", "random") or curriculum is not None:
            raise ConfigError(
                f"SeqIO's task {task.name} has rows, not documents: set STATE_PASSING to 'none' or "
                "'random', and no curriculum."
            )
        return SeqioFeed(task, batch_size, length, seed, shard, bool(packed))
    if indexed and mode != "continuous":
        common = (task, batch_size, size, -(-length // size), curriculum, seed, shard, length)
        if mode != "aged":
            return IndexedFeed(*common)
        return AgedFeed(
            *common, model=model, groups=pool_groups, refresh_period=pool_refresh, place=place
        )
    if mode == "aged" or curriculum is not None:
        what = "The aged-state pool" if mode == "aged" else "A curriculum"
        raise ConfigError(
            f"{what} needs a task whose examples are made by index, such as 'passkey_words', and "
            "state passing other than 'continuous'."
        )
    documents = task
    if indexed:
        if lane_documents.length < task.min_length:
            raise ConfigError(
                f"LaneDocuments.length is {lane_documents.length}, but the task needs documents of "
                f"at least {task.min_length} tokens."
            )
        documents = IndexedDocuments(task, lane_documents.length, lane_documents.count)
    rows = PackedRows if packed or (packed is None and mode != "continuous") else ContinuousLanes
    vocabulary = vocabulary_of(task) or ByteVocabulary()
    bos_id = check_bos(vocabulary.bos_id, "the task")
    lanes = rows(documents, batch_size, length, seed, *shard, bos_id=bos_id, pad_id=vocabulary.pad_id)
    return LaneFeed(lanes)
