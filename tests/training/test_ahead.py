"""Batches that are made on a thread: the same ones, at the right time, and what goes wrong there."""

import json
import threading

import numpy as np
import pytest
from test_feeds import feed_of
from test_loop import history, run, saved, saved_data
from tiny import BLOCK, assert_identical, make_tokens, passkey

from famx.training import ahead, loop
from famx.training.ahead import BATCHES_AHEAD, METRICS_DELAY, OBSERVED_DELAY, BatchesAhead
from famx.training.curriculum import Curriculum
from famx.training.feeds import Feed, Rows
from famx.training.run import Every
from famx.training.state_passing import Aged

LAST = 9


def feeds():
    """Two equal feeds of each kind."""
    documents = [make_tokens(size, seed=size) for size in (50, 33, 41, 16)]
    curriculum = Curriculum((4, 5), unlock=0.0)
    return {
        "lanes": [feed_of(documents, "continuous") for _ in "ab"],
        "packed": [feed_of(documents) for _ in "ab"],
        "rows": [feed_of(passkey(), curriculum=curriculum, length=5 * BLOCK) for _ in "ab"],
        "aged": [feed_of(passkey(), "aged", Curriculum((4, 6), unlock=0.0)) for _ in "ab"],
    }


@pytest.mark.parametrize("kind", ["lanes", "packed", "rows", "aged"])
def test_batches_and_states_are_those_of_the_feed(kind):
    plain, other = feeds()[kind]
    made = BatchesAhead(other, LAST)
    for step in range(BATCHES_AHEAD):
        made.ask(step)
    for step in range(LAST):
        made.ask(step + BATCHES_AHEAD, (4, 1.0) if step == 3 else None)
        if step == 3 + BATCHES_AHEAD:
            plain.observe(4, 1.0)
        assert made.state() == plain.get_state() == json.loads(json.dumps(plain.get_state()))
        expected, rows = plain.next(step), made.take()
        assert_identical(rows.batch, expected.batch)
        assert (rows.blocks, rows.longest) == (expected.blocks, expected.longest)
        assert (rows.refresh is None) == (expected.refresh is None)
    assert made.state() == plain.get_state()  # after the last step too, though no batch follows
    made.close()
    made.close()


class Slow(Feed):
    """Counts its batches; batch 4 fails."""

    def __init__(self):
        self.made, self.thread = 0, None

    def next(self, step):
        self.thread = threading.current_thread()
        if step == 4:
            raise OSError("the disk is gone")
        self.made += 1
        return Rows({"step": np.array([step])})

    def get_state(self):
        return self.made


def test_what_goes_wrong_on_the_thread_surfaces_at_its_batch():
    feed = Slow()
    made = BatchesAhead(feed, LAST)
    for step in range(6):
        made.ask(step)
    assert [int(made.take().batch["step"][0]) for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            made.take()
    assert feed.made == 4 and feed.thread is not threading.current_thread()
    made.close()
    assert not feed.thread.is_alive()


def test_a_thread_that_waits_ends_with_the_run():
    feed = Slow()
    made = BatchesAhead(feed, LAST)
    made.ask(0)
    made.take()  # and now it waits for a request
    assert feed.thread.is_alive()
    made.close()
    assert not feed.thread.is_alive()


def test_a_batch_is_drawn_a_fixed_number_of_steps_after_what_it_depends_on(monkeypatch, tmp_path):
    """The batch of step s is asked for with the metrics of step s - 1 - OBSERVED_DELAY."""
    asked = []
    ask = BatchesAhead.ask
    monkeypatch.setattr(
        BatchesAhead, "ask",
        lambda self, step, observed=None: (asked.append((step, observed)), ask(self, step, observed)),
    )  # fmt: skip
    steps = 8
    run(tmp_path, steps=steps, every=Every(log=100, checkpoint=100))
    assert [step for step, _ in asked] == list(range(steps + BATCHES_AHEAD))
    assert [observed is None for _, observed in asked] == [s <= OBSERVED_DELAY for s, _ in asked]
    assert OBSERVED_DELAY == METRICS_DELAY + BATCHES_AHEAD == 4
    assert loop.METRICS_DELAY == ahead.METRICS_DELAY


# A curriculum that unlocks by what was seen, in a pool: the hardest case of resuming.
SETTINGS = dict(
    mode="aged",
    state_passing=Aged(groups=2, refresh_period=3),
    curriculum=Curriculum((4, 5, 7), unlock=0.0, metric="accuracy", smoothing=0.5, newest=0.6),
    steps=13,
)


@pytest.mark.slow
def test_a_run_that_stops_at_every_step_is_the_same_run(tmp_path):
    every = Every(log=5, checkpoint=4)
    run(tmp_path / "whole", **SETTINGS, every=every)
    assert saved_data(tmp_path / "whole", 13)["feed"]["curriculum"]["stage"] == 2
    for steps in range(1, 14):
        run(tmp_path / "parts", **{**SETTINGS, "steps": steps}, every=every)
    assert_identical(saved(tmp_path / "parts", 13), saved(tmp_path / "whole", 13))
    lines = [line for line in history(tmp_path / "parts") if line["step"] in (5, 10, 13)]
    values = lambda lines: [(line["step"], line["blocks"]) for line in lines]
    assert values(lines) == values(history(tmp_path / "whole"))
    whole, parts = (saved_data(tmp_path / name, 13) for name in ("whole", "parts"))
    assert whole["feed"] == parts["feed"] and whole["skipped"] == parts["skipped"]
