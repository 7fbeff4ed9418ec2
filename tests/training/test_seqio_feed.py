"""Training on a SeqIO task: the rows are SeqIO's, and a run that stopped goes on with the next."""

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="seqio is not installed")

from famx.base.errors import ConfigError  # noqa: E402
from famx.data import seqio as seqio_tasks  # noqa: E402
from famx.data.probes.passkey import PasskeyTask  # noqa: E402
from famx.data.tasks import registry  # noqa: E402
from famx.training.feeds import SeqioFeed, Source, lane_feed  # noqa: E402

NAME, LENGTH = "passkey_for_the_feed", 96


@pytest.fixture(scope="module")
def task():
    seqio_tasks.register_made(NAME, PasskeyTask(header=False))
    return registry.get(NAME)


def test_rows_are_those_of_the_task_and_resume_is_exact(task):
    feed = SeqioFeed(Source(task, 4, LENGTH, 32))
    batches = [feed.next(step).batch for step in range(3)]
    ours = PasskeyTask(header=False).batch(range(4), LENGTH)
    for name, rows in batches[0].items():
        np.testing.assert_array_equal(rows, ours[name])
    state = feed.get_state()
    expected = feed.next(3).batch
    again = SeqioFeed(Source(task, 4, LENGTH, 32))
    again.set_state(state)
    for name, rows in again.next(3).batch.items():
        np.testing.assert_array_equal(rows, expected[name])


def test_rows_cannot_be_lanes(task):
    with pytest.raises(ConfigError, match="rows, not documents"):
        lane_feed(Source(task, 4, LENGTH, 32), 64, 10)
