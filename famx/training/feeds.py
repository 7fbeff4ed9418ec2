"""Feeds: sources of the batches of training steps.

A feed has `next(step) -> Rows`, `observe(blocks, value)` for a curriculum, `prepare(rows, params, kept)
-> kept` for states that are made before the step, and `get_state`/`set_state` for exact resumption.
`next` and `observe` are called in the order of the steps and use only numpy, so a thread can call them
before the steps begin (`famx.training.ahead`); `prepare` needs the parameters of its step.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, ContinuousLanes, IndexedDocuments, PackedRows
from famx.data.tasks import vocabulary_of
from famx.decoding import Streamer
from famx.models import DecoderModel
from famx.training.curriculum import Curriculum
from famx.training.source import Source

# Indices of documents made by index: those of a stage, and in it those that fill the aged-state pool, are
# disjoint from all others.
_STAGE, _POOL = 2**41, 2**40


class Refresh(NamedTuple):
    """A group of the aged-state pool that is made before a step.

    Attributes:
      group: index of the group.
      prefix: what its states have read, this host's rows: tokens int32 `[rows, L]`, or features.
    """

    group: int
    prefix: Any


class Rows(NamedTuple):
    """The rows of a step.

    Attributes:
      batch: this host's rows.
      blocks: length of the documents in blocks; None if the task's rows are not made by index.
      longest: longest length that the curriculum has unlocked, in blocks; None without a curriculum.
      refresh: see `Feed.prepare`; None: nothing to prepare.
      skipped: number of bad documents that were left out so far.
      last_skipped: why the last of them was.
    """

    batch: dict[str, np.ndarray]
    blocks: int | None = None
    longest: int | None = None
    refresh: Refresh | None = None
    skipped: int = 0
    last_skipped: str = ""

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The arrays that a step uses."""
        return {name: x for name, x in self.batch.items() if name != "answer"}


class Feed:
    """Base class of the feeds; has no curriculum and prepares no states."""

    def next(self, step: int) -> Rows:
        """This host's rows of the step; called once for each step, in order."""
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint, to resume exactly here: a copy, as JSON values."""
        raise NotImplementedError

    def set_state(self, state) -> None:
        """Resumes from a state that `get_state` returned."""
        raise NotImplementedError

    def observe(self, blocks: int | None, value: float) -> None:
        """Takes the metric of a batch of `blocks` into account."""

    def prepare(self, rows: Rows, params, kept):
        """`kept`, the carried states of the training state, updated with the states that `rows` needs."""
        del rows, params
        return kept

    def examples(self) -> Iterator[Rows]:
        """Rows of each shape that is to come, in the order in which they come; none if not known."""
        return iter(())

    def share(self, other: "Feed") -> None:
        """Uses the compiled programs of the feed of another stage where they are the same."""


class LaneFeed(Feed):
    """Documents read by lanes: continuous ones, or packed rows."""

    def __init__(self, lanes: ContinuousLanes):
        self.lanes = lanes

    def next(self, step):
        batch = next(self.lanes)
        return Rows(batch, skipped=self.lanes.skipped, last_skipped=self.lanes.last_skipped)

    def get_state(self):
        return self.lanes.get_state()

    def set_state(self, state):
        try:
            self.lanes.set_state(state)
        except ValueError as error:
            raise ConfigError(str(error)) from error


class DatasetFeed(Feed):
    """Batches of a `tf.data.Dataset`; its position is the number of batches taken.

    Args:
      make: makes the dataset, without end and in a seeded order. It is called for every start, since a
        dataset that shuffles has another order whenever it is read again.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self.set_state({"batches": 0})

    def next(self, step):
        self._taken += 1
        return Rows(next(self._batches))

    def get_state(self):
        return {"batches": self._taken}

    def set_state(self, state):
        """Skips the batches that were already taken."""
        self._taken = int(state["batches"])
        self._batches = self._make().skip(self._taken).as_numpy_iterator()


class SeqioFeed(DatasetFeed):
    """Rows of a SeqIO task or mixture; needs seqio, which the task's own module has imported."""

    def __init__(self, source: Source):
        from famx.data.seqio import begin_id, training_rows

        task, packed = source.task, bool(source.packed)
        bos_id = check_bos(begin_id(task.output_features["targets"].vocabulary), task.name)

        def make():
            rows = training_rows(
                task, source.length, source.order_seed, source.shard, packed, bos_id
            )
            return rows.batch(source.batch_size // source.shard[1], drop_remainder=True)

        super().__init__(make)


class IndexedFeed(Feed):
    """Rows of a task that makes each by its index; step `s` has the indices `s * B` to `s * B + B - 1`.

    These are counted from the first index of the stage.

    Args:
      source: its task has `batch(indices, length)`, such as `PasskeyTask`. A curriculum draws the
        lengths of the rows, and is copied; without one every row has the source's length.

    Raises:
      ConfigError: the rows are too short for the task, or for the curriculum.
    """

    _longer_documents = False  # whether documents may be longer than a row

    def __init__(self, source: Source):
        self.source, task, size = source, source.task, source.block_size
        self.blocks = -(-source.length // size)
        if source.packed:
            raise ConfigError(
                "Data.packed joins documents to rows, but the task makes whole rows by index: leave it"
                " out, or take a task of documents."
            )
        if source.curriculum is None and source.length < task.min_length:
            raise ConfigError(
                f"The rows hold {source.length} tokens, but the task needs {task.min_length}: raise"
                " TASK_FEATURE_LENGTHS."
            )
        curriculum = source.curriculum or Curriculum((self.blocks,))
        self.curriculum = dataclasses.replace(curriculum)  # a copy: the feed changes its progress
        shortest, longest = min(curriculum.blocks), max(curriculum.blocks)
        needed = math.ceil(task.min_length / size)
        if shortest < needed:
            raise ConfigError(
                f"The shortest length of the curriculum is {shortest} blocks of {size} tokens, "
                f"but the task needs {task.min_length} tokens, {needed} blocks."
            )
        if longest > self.blocks and not self._longer_documents:
            raise ConfigError(
                f"The curriculum goes to {longest} blocks, but the rows hold {self.blocks}: raise "
                "TASK_FEATURE_LENGTHS, or set STATE_PASSING to 'aged'."
            )

    @property
    def longest(self) -> int | None:
        """Longest unlocked length in blocks; None without a curriculum."""
        return None if self.source.curriculum is None else self.curriculum.newest_blocks

    def rng(self, step, stream):
        """Random generator of a step, with one stream per purpose."""
        return np.random.default_rng([self.source.random_seed, step, stream])

    def next(self, step):
        blocks = self.curriculum.draw(self.rng(step, 0))
        return Rows(self.fresh(step, blocks), blocks, self.longest)

    def fresh(self, step, blocks):
        """A batch of new documents of `blocks` blocks, each read from its start."""
        return self.rows(step * self.source.batch_size, blocks)

    def rows(self, first, blocks):
        """This host's rows of the global batch of documents that starts at index `first`."""
        source, (index, count) = self.source, self.source.shard
        rows = source.batch_size // count
        start = source.stage * _STAGE + first + index * rows
        length = source.length if blocks == self.blocks else blocks * source.block_size
        return source.task.batch(range(start, start + rows), length)

    def examples(self):
        lengths, newest = self.curriculum.blocks, self.curriculum.stage
        to_come = (*lengths[newest:], *lengths[:newest])
        for blocks in dict.fromkeys(min(blocks, self.blocks) for blocks in to_come):
            yield Rows(self.fresh(0, blocks), blocks)

    def observe(self, blocks, value):
        self.curriculum.observe(blocks, value)

    def get_state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.get_state()}

    def set_state(self, state):
        self.curriculum.set_state(state["curriculum"])


class AgedFeed(IndexedFeed):
    """Last rows of documents that are longer than a row, with states from the aged-state pool.

    The pool has `groups` groups of one batch each. Every `refresh_period` steps one group is replaced:
    new documents, all of one length, are read up to their last row with the current weights and without
    gradient, and their states are kept. A step on a group trains on the last rows of its documents.

    Args:
      source: see `IndexedFeed`; its curriculum may draw documents longer than a row.
      model: model that reads the documents.
      groups, refresh_period: see above.
      place: function that puts this host's rows on the devices.

    Raises:
      ConfigError: the curriculum has more lengths beyond a row than the pool has groups, or no others.
    """

    _longer_documents = True

    def __init__(
        self, source: Source, model: DecoderModel, groups: int, refresh_period: int, place=lambda x: x
    ):
        super().__init__(source)
        if min(self.curriculum.blocks) > self.blocks:
            raise ConfigError(
                f"No length of the curriculum {self.curriculum.blocks} fits a row of {self.blocks}"
                " blocks. From aged states alone, no gradient reaches the reading of a document's first"
                f" blocks: begin with a length of at most {self.blocks}, or make rows longer."
            )
        aged = sum(b > self.blocks for b in set(self.curriculum.blocks))
        if groups < aged:
            raise ConfigError(
                f"The curriculum has {aged} lengths beyond the {self.blocks} blocks of a row, but "
                f"the aged-state pool only {groups} groups: raise Aged.groups to at least {aged}."
            )
        self.model, self.refresh_period, self.place = model, refresh_period, place
        self.streamer = Streamer(model.module)
        self.lengths, self.firsts = [0] * groups, [0] * groups  # of each group: blocks, first index
        self.made = 0  # number of groups made so far
        self._put = jax.jit(_put_group, donate_argnums=0, static_argnums=2)

    @property
    def pool_size(self) -> int:
        """Number of states in the pool."""
        return len(self.lengths) * self.source.batch_size

    def next(self, step):
        refresh = self._refresh(step)
        blocks = self.curriculum.draw(self.rng(step, 0))
        if blocks > self.blocks:
            groups = [g for g, length in enumerate(self.lengths) if length == blocks]
            groups = groups or [g for g, length in enumerate(self.lengths) if length]
            if groups:
                batch, blocks = self._group(int(self.rng(step, 1).choice(groups)))
                return Rows(batch, blocks, self.longest, refresh)
            blocks = self.blocks
        return Rows(self.fresh(step, blocks), blocks, self.longest, refresh)

    def fresh(self, step, blocks):
        batch = super().fresh(step, blocks)
        return {**batch, "lane": np.full(len(batch["decoder_target_tokens"]), -1, np.int32)}

    def _refresh(self, step) -> Refresh | None:
        """Chooses the group that is replaced before the step and makes its tokens; None: no group."""
        unlocked = [b for b in self.curriculum.blocks[: self.curriculum.stage + 1] if b > self.blocks]
        missing = [b for b in unlocked if b not in self.lengths]
        if not unlocked or (step % self.refresh_period and not missing):
            return None
        blocks = missing[-1] if missing else int(self.rng(step, 2).choice(unlocked))
        group = self.made % len(self.lengths)
        self.lengths[group], self.firsts[group] = blocks, _POOL + self.made * self.source.batch_size
        self.made += 1
        read = self.model.inputs(self.rows(self.firsts[group], blocks))
        length = (blocks - self.blocks) * self.source.block_size
        return Refresh(group, jax.tree.map(lambda x: x[:, :length], read))

    def prepare(self, rows, params, kept):
        """Reads the documents of the group that is replaced, if any."""
        if rows.refresh is None:
            return kept
        pool, (group, prefix) = kept["lanes"], rows.refresh
        params = self.model.merged(params)
        state = self.streamer.initial_state(params, self.source.batch_size)
        _, state = self.streamer.read(params, state, self.place(prefix), aligned=True)
        shardings = jax.tree.map(lambda x: x.sharding, pool)  # the pool must stay placed as it is
        return {**kept, "lanes": jax.device_put(self._put(pool, state, group), shardings)}

    def share(self, other):
        if isinstance(other, AgedFeed) and other.model.module == self.model.module:
            self.streamer = other.streamer

    def _group(self, group):
        source, blocks = self.source, self.lengths[group]
        rows = self.rows(self.firsts[group], blocks)
        start = (blocks - self.blocks) * source.block_size
        batch = {k: v[:, start:] for k, v in rows.items() if k.startswith("decoder_")}
        index, count = source.shard
        size = source.batch_size // count
        if "answer_start" in rows:
            batch["answer_start"] = rows["answer_start"] - start
        batch["lane"] = (group * source.batch_size + index * size + np.arange(size)).astype(np.int32)
        return batch, blocks

    def get_state(self):
        lengths, firsts = list(self.lengths), list(self.firsts)
        return {**super().get_state(), "lengths": lengths, "firsts": firsts, "made": self.made}

    def set_state(self, state):
        super().set_state(state)
        self.lengths, self.firsts = list(state["lengths"]), list(state["firsts"])
        self.made = int(state["made"])


def _put_group(pool, state, group):
    size = state.batch_size
    put = lambda a, b, axis: jax.lax.dynamic_update_slice_in_dim(a, b, group * size, axis)
    return pool.map_examples(put, state)


# ---------------------------------------------------------------- the feed of a source


def fresh_feed(source: Source) -> Feed:
    """The feed of examples that begin before the first token: packed rows of documents, or rows by index.

    Raises:
      ConfigError: the task, the curriculum and the lengths do not fit.
    """
    source.check_rows(whole_blocks=False)
    if source.is_seqio:
        if source.curriculum is not None:
            raise _no_documents(source.task)
        return SeqioFeed(source)
    if source.indexed:
        return IndexedFeed(source)
    if source.curriculum is not None:
        raise _not_indexed("A curriculum")
    return _lanes(source, source.task, packed=source.packed is not False)


def lane_feed(source: Source, document_length: int, num_documents: int) -> Feed:
    """The feed whose rows continue documents: continuous lanes.

    Args:
      source: task and rows; a task by index is cut into documents.
      document_length: number of tokens of such a document.
      num_documents: number of such documents.

    Raises:
      ConfigError: the task, the curriculum and the lengths do not fit.
    """
    source.check_rows(whole_blocks=True)
    if source.is_seqio:
        raise _no_documents(source.task)
    if source.curriculum is not None:
        raise _not_indexed("A curriculum")
    documents = source.task
    if source.indexed:
        if document_length < source.task.min_length:
            raise ConfigError(
                f"Lanes.document_length is {document_length}, but the task needs documents of "
                f"at least {source.task.min_length} tokens."
            )
        documents = IndexedDocuments(source.task, document_length, num_documents)
    return _lanes(source, documents, packed=bool(source.packed))


def aged_feed(source: Source, model: DecoderModel, groups: int, refresh_period: int, place) -> AgedFeed:
    """The feed of the aged-state pool, see `AgedFeed`.

    Raises:
      ConfigError: the task, the curriculum and the lengths do not fit.
    """
    source.check_rows(whole_blocks=True)
    if source.is_seqio:
        raise _no_documents(source.task)
    if not source.indexed:
        raise _not_indexed("The aged-state pool")
    return AgedFeed(source, model, groups, refresh_period, place)


def _lanes(source: Source, documents, packed: bool) -> LaneFeed:
    vocabulary = vocabulary_of(source.task) or ByteVocabulary()
    lanes = (PackedRows if packed else ContinuousLanes)(
        documents, source.batch_size, source.length, source.order_seed, *source.shard,
        bos_id=check_bos(vocabulary.bos_id, "the task"), pad_id=vocabulary.pad_id,
        skip_bad=source.skip_bad,
    )  # fmt: skip
    return LaneFeed(lanes)


def check_bos(bos_id: int | None, name: str) -> int:
    """`bos_id`; ConfigError if it is None, that is if the vocabulary of the task `name` has none."""
    if bos_id is None:
        raise ConfigError(
            f"The vocabulary of {name} has no token that begins a text: open it with bos_id=..., the id"
            " of a token to take."
        )
    return bos_id


def _no_documents(task) -> ConfigError:
    return ConfigError(
        f"SeqIO's task {task.name} has rows, not documents: set STATE_PASSING to 'none' or "
        "'random', and no curriculum."
    )


def _not_indexed(what: str) -> ConfigError:
    return ConfigError(
        f"{what} needs a task whose examples are made by index, such as 'passkey_words', and "
        "state passing other than 'continuous'."
    )
