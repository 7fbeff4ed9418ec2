"""Feeds: which rows a step gets, and that carried and pooled states are what reading gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    BLOCK,
    BLOCKS,
    assert_close,
    assert_identical,
    make_model,
    make_params,
    make_run,
    make_tokens,
    passkey,
)

from famx.base.errors import ConfigError
from famx.data import ContinuousLanes
from famx.training.curriculum import Curriculum
from famx.training.feeds import AgedFeed, IndexedFeed, LaneFeed
from famx.training.source import Source
from famx.training.state_passing import Aged, Lanes, named
from famx.training.step import TrainState, make_initializer, make_train_step

MODEL = make_model()
PARAMS = make_params(MODEL.module)
initial = jax.jit(MODEL.initial_state, static_argnums=1)


@jax.jit
def read(rows, count):
    """Logits of the rows, and the states after so many of their tokens, at once."""
    valid = jnp.broadcast_to(jnp.arange(rows.shape[1]) < count, rows.shape)
    return MODEL.module.apply({"params": PARAMS}, rows, valid=valid)


def feed_of(task, mode="none", curriculum=None, length=BLOCKS * BLOCK, states=None, **changes):
    source = Source(task, **{"batch_size": 2, **changes}, length=length, block_size=BLOCK,
                    curriculum=curriculum)  # fmt: skip
    modes = {"continuous": Lanes(64, 10), "aged": Aged(3, 4)}
    states = states or modes.get(mode) or named(mode)
    return states.feed(source, MODEL, lambda batch: batch)


# ---------------------------------------------------------------- continuous lanes


def test_lanes_equal_one_long_sequence_read_at_once():
    """Steps of mode 'continuous' at learning rate 0 against whole documents read at once."""
    length, sizes = 2 * BLOCK, (50, 33, 41, 16)  # some end within a piece
    documents = [make_tokens(size, seed=size) for size in sizes]
    feed = feed_of(documents, "continuous", length=length)
    assert isinstance(feed, LaneFeed)
    optimizer = optax.sgd(0.0)
    run = make_run(
        model=MODEL, optimizer=optimizer, lengths={"targets": length}, state_passing=Lanes()
    ).ready(jax.devices()[:1])
    _, abstract = make_initializer(run)
    train_step = make_train_step(run, abstract)
    params = jax.tree.map(jnp.copy, PARAMS)  # the step donates them
    nothing = jax.tree.map(jnp.zeros_like, initial(PARAMS, 2))  # every lane is reset at first
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {"lanes": nothing})
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    # Every document as one row, padded to the longest.
    rows = np.zeros((len(sizes), 64), np.int32)
    for row, document in zip(rows, documents):
        row[0], row[1 : len(document)] = 1, document[:-1]
    log_p = np.asarray(jax.nn.log_softmax(read(rows, 64)[0]))
    prefixes = {n * length: read(rows, n * length)[1] for n in (1, 2, 3)}

    place = [None, None]  # which document each lane reads, and how far it has come
    seen = []
    for step in range(9):
        rows = feed.next(step)
        batch = rows.batch
        assert rows.blocks is rows.longest is rows.refresh is None
        nats = hits = 0
        for lane in range(2):
            targets = batch["decoder_target_tokens"][lane]
            if batch["reset"][lane]:
                (index,) = [i for i, d in enumerate(documents) if (d[:8] == targets[:8]).all()]
                place[lane] = [index, 0]
                seen.append(index)
            index, start = place[lane]
            count = min(length, sizes[index] - start)
            expected = documents[index][start : start + count]
            np.testing.assert_array_equal(targets[:count], expected)
            nats -= log_p[index, np.arange(start, start + count), expected].sum()
            hits += (log_p[index, start : start + count].argmax(-1) == expected).sum()
            place[lane][1] += count
        state, metrics = train_step(state, batch)
        assert float(metrics["loss"].total) == pytest.approx(nats, rel=1e-4)
        assert float(metrics["accuracy"].total) == hits
        for lane, (index, end) in enumerate(place):
            if end < sizes[index]:  # not padded yet
                assert_close(state.kept["lanes"].take([lane]), prefixes[end].take([index]), 1e-4)
    assert sorted(seen[:4]) == [0, 1, 2, 3] and len(seen) > 5
    assert_identical(state.params, PARAMS)


def test_lane_feed_refuses_the_state_of_other_documents():
    feed = feed_of([make_tokens(40)], "continuous")
    feed.next(0)
    other = feed_of([make_tokens(40)] * 2, "continuous")
    with pytest.raises(ConfigError, match="the number of documents was 1 and is now 2"):
        other.set_state(feed.get_state())


# ---------------------------------------------------------------- rows by index


def test_indexed_feed_is_a_pure_function_of_the_step():
    curriculum = Curriculum((4, 5), unlock=0.0)
    feed, other = (feed_of(passkey(), curriculum=curriculum, length=40) for _ in "ab")
    for one in (feed, other):
        one.observe(4, 1.0)
        assert one.longest == 5
    assert curriculum.stage == 0  # each feed has a copy
    later, blocks = feed.next(7)[:2]
    for step in (3, 8, 0):
        other.next(step)
    again, same = other.next(7)[:2]
    assert blocks == same and later["decoder_target_tokens"].shape == (2, blocks * BLOCK)
    assert_identical(later, again)
    assert_identical(later, passkey().batch(range(14, 16), blocks * BLOCK))
    assert {feed.next(step)[1] for step in range(40)} == {4, 5}


def test_hosts_share_one_global_batch():
    whole = feed_of(passkey(), batch_size=4).next(3).batch
    parts = [feed_of(passkey(), batch_size=4, shard=(i, 2)).next(3).batch for i in range(2)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))


# ---------------------------------------------------------------- the aged-state pool


@dataclasses.dataclass
class Spy:
    """PassKey rows, and which indices were asked for at which length."""

    task = passkey()
    vocab, min_length = task.vocab, task.min_length

    def __post_init__(self):
        self.asked = []

    def example(self, index, length):
        return self.task.example(index, length)

    def batch(self, indices, length):
        self.asked.append((indices, length // BLOCK))
        return self.task.batch(indices, length)


def test_the_pool():
    """States are those of reading each document's beginning; rows are those documents' ends."""
    spy, size = Spy(), 2
    feed = feed_of(spy, "aged", Curriculum((4, 6, 7), unlock=0.0))
    assert isinstance(feed, AgedFeed) and feed.pool_size == 6
    pool = initial(PARAMS, feed.pool_size)
    fresh = jax.tree.map(np.asarray, pool)
    made_at, aged, drawn = [], 0, set()
    for step in range(30):
        before = (list(feed.lengths), list(feed.firsts), feed.made)
        rows = feed.next(step)
        batch, blocks = rows[:2]
        assert (rows.refresh is None) == (feed.made == before[2])
        pool = feed.prepare(rows, PARAMS, {"lanes": pool})["lanes"]
        if feed.made > before[2]:
            made_at.append(step)
            changed = [g for g in range(3) if feed.firsts[g] != before[1][g]]
            assert changed == [before[2] % 3]  # the oldest
        drawn.add(blocks)
        if blocks == 4:
            np.testing.assert_array_equal(batch["lane"], [-1] * size)
            assert spy.asked[-1] == (range(step * size, step * size + size), 4)
            assert batch["answer_start"].tolist() == [BLOCKS * BLOCK - 1] * size
        else:
            aged += 1
            group = int(batch["lane"][0]) // size
            np.testing.assert_array_equal(batch["lane"], group * size + np.arange(size))
            assert feed.lengths[group] == blocks
            first = feed.firsts[group]
            rows = spy.task.batch(range(first, first + size), blocks * BLOCK)
            cut = (blocks - BLOCKS) * BLOCK
            for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"):
                np.testing.assert_array_equal(batch[name], rows[name][:, cut:])
            np.testing.assert_array_equal(batch["answer_start"] + cut, rows["answer_start"])
            answers = batch["decoder_target_tokens"][np.arange(size), batch["answer_start"]]
            np.testing.assert_array_equal(answers, rows["answer"][:, 0])
            state = read(rows["decoder_input_tokens"][:, : 3 * BLOCK], cut)[1]
            assert_close(pool.take(batch["lane"]), state, 1e-4)
        feed.observe(blocks, 1.0)
        if step == 0:
            assert feed.made == 0  # nothing to make before a length is unlocked
            assert_identical(jax.tree.map(np.asarray, pool), fresh)
    # 6 unlocks at step 0 and 7 later: both are made at once, and then one group every 4 steps.
    assert made_at[0] == 1 and aged > 5 and drawn == {4, 6, 7}
    assert [s for s in made_at if s % 4 == 0] == list(range(4, 30, 4))
    assert len([s for s in made_at if s % 4]) <= 2 + sum(l == 7 for _, l in spy.asked)
    # Indices of the pool never meet those of fresh rows, nor each other.
    old = [r for r, _ in spy.asked if r[0] >= 2**40]
    firsts = sorted({r[0] for r in old})
    assert len(firsts) == feed.made and all(b - a >= size for a, b in zip(firsts, firsts[1:]))


def test_the_pools_position_is_saved_apart_from_later_changes():
    feed, other = (feed_of(passkey(), "aged", Curriculum((4, 6), unlock=0.0)) for _ in "ab")
    feed.observe(4, 1.0)
    assert feed.next(1).refresh.group == 0
    state = json.loads(json.dumps(feed.get_state()))
    assert state == {"curriculum": {"stage": 1, "level": 0.0}, "lengths": [6, 0, 0],
                     "firsts": [2**40, 0, 0], "made": 1}  # fmt: skip
    other.set_state(state)
    assert other.get_state() == state
    for step in range(2, 12):
        assert_identical(feed.next(step).batch, other.next(step).batch)


def test_hosts_make_their_own_rows_of_the_pool():
    def feed(shard, batch_size=4):
        curriculum = Curriculum((4, 6), newest=1.0)
        feed = feed_of(passkey(), "aged", curriculum, shard=shard, batch_size=batch_size)
        feed.curriculum.set_state({"stage": 1, "level": 0.0})
        feed.lengths, feed.firsts = [0, 6, 0], [0, 2**40 + 8, 0]
        return feed.next(1).batch  # 1: no group is replaced

    whole, parts = feed((0, 1)), [feed((i, 2)) for i in range(2)]
    assert whole["lane"].tolist() == [4, 5, 6, 7]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))


# ---------------------------------------------------------------- the curriculum


def test_the_curriculum_unlocks_by_the_newest_length_alone():
    curriculum = Curriculum((2, 4, 8), unlock=0.8, smoothing=0.5)
    assert not curriculum.observe(4, 1.0) and curriculum.level == 0.0  # locked: does not count
    assert [curriculum.observe(2, 1.0) for _ in range(3)] == [False, False, True]  # .5 .75 .875
    assert (curriculum.stage, curriculum.level) == (1, 0.0)
    assert not any(curriculum.observe(2, 1.0) for _ in range(9)) and curriculum.level == 0.0
    assert not any(curriculum.observe(4, 0.79) for _ in range(50))
    assert curriculum.observe(4, 1.0)
    assert not any(curriculum.observe(8, 1.0) for _ in range(50))  # there is no more
    assert curriculum.stage == 2


def test_the_curriculum_draws_the_newest_half_of_the_time():
    curriculum = Curriculum((2, 4, 8))
    draws = lambda: [curriculum.draw(np.random.default_rng(i)) for i in range(900)]  # noqa: E731
    assert set(draws()) == {2}
    curriculum.set_state({"stage": 2, "level": 0.5})
    counts = {b: draws().count(b) / 900 for b in (2, 4, 8)}
    assert abs(counts[8] - 0.5) < 0.06 and abs(counts[2] - 0.25) < 0.06, counts
    assert curriculum.get_state() == {"stage": 2, "level": 0.5}
    other = Curriculum((2, 4, 8))
    other.set_state(json.loads(json.dumps(curriculum.get_state())))
    assert other.observe(8, 1.0) == curriculum.observe(8, 1.0)
    assert other.get_state() == curriculum.get_state()


@pytest.mark.parametrize(
    "changes", [dict(blocks=()), dict(blocks=(0, 2)), dict(unlock=1.5), dict(newest=-1)]
)
def test_curricula_that_make_no_sense(changes):
    with pytest.raises(ValueError, match=r"Curriculum\.(blocks|unlock|newest)"):
        Curriculum(**{"blocks": (2,), **changes})


def test_rows_need_not_fill_their_last_block():
    feed = feed_of(task=passkey(), length=36)
    batch = feed.next(0).batch
    assert batch["decoder_input_tokens"].shape[1] == 36
    assert (batch["decoder_loss_weights"][:, -1] == 1).all()  # the answer is the last token


def test_blocks_of_a_task_may_be_parts_of_blocks():
    source = Source(passkey(block_size=20), batch_size=2, length=80, block_size=40)
    source.check_rows(whole_blocks=True)
    with pytest.raises(ConfigError, match="within blocks of 20 tokens, but .* have 50"):
        dataclasses.replace(source, length=100, block_size=50).check_rows(whole_blocks=True)


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(mode="agde"), "named.name must be one of .*, not 'agde'. Did you mean aged?"),
        (dict(length=4), "row length 4 .* is shorter than a block of 8 tokens: use at least 8 or"),
        (dict(length=36, mode="aged"), "row length 36 .* multiple of the block size 8 .* use 32, or"),
        (dict(length=36, mode="continuous"), "row length 36 .* use 32, or change"),
        (dict(length=36, curriculum=Curriculum((4,))), "row length 36 .* use 32, or change"),
        (dict(task=passkey(block_size=20)),
         "PasskeyTask keeps statements within blocks of 20 tokens, but those of the model have 8: set"),
        (dict(length=25), "The rows hold 25 tokens, but the task needs 26: raise TASK_FEATURE"),
        (dict(curriculum=Curriculum((4, 6))), "goes to 6 blocks, but the rows hold 4: raise"),
        (dict(curriculum=Curriculum((2, 4))), "shortest length of the curriculum is 2 blocks"),
        (dict(packed=True), "Data.packed joins documents to rows, but the task makes whole rows"),
        (dict(states=Aged(groups=2), curriculum=Curriculum((4, 5, 6, 7))),
         "has 3 lengths beyond the 4 blocks of a row, but the aged-state pool only 2 groups"),
        (dict(mode="aged", curriculum=Curriculum((5, 8))),
         r"No length of the curriculum \(5, 8\) fits a row of 4 blocks"),
        (dict(task=[make_tokens(9)], mode="aged"), "The aged-state pool needs a task .* by index"),
        (dict(task=[make_tokens(9)], curriculum=Curriculum((4,))), "A curriculum needs a task"),
        (dict(mode="continuous", curriculum=Curriculum((4,))), "A curriculum needs a task"),
        (dict(states=Lanes(16, 4)),
         "Lanes.document_length is 16, but the task needs documents of at least"),
    ],
)  # fmt: skip
def test_sentences(changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        feed_of(**{"task": passkey(), **changes})
    assert "\n" not in str(caught.value).split("\n  In call to configurable")[0]  # gin's note


def test_documents_are_read_by_lanes_under_every_other_mode():
    for mode in ("none", "random", "continuous"):
        feed = feed_of([make_tokens(40)] * 3, mode)
        assert isinstance(feed.lanes, ContinuousLanes)
        assert feed.next(0).batch["decoder_input_tokens"].shape == (2, BLOCKS * BLOCK)
    assert type(feed_of(passkey(), "random")) is IndexedFeed
    documents = feed_of(passkey(), "continuous").lanes.documents
    assert len(documents) == 10 and len(documents[0][0]) == 64
