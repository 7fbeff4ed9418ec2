"""Checks that hold for every test of t5x."""

import sys

import pytest


@pytest.fixture(autouse=True)
def summary_writers_are_closed(monkeypatch):
    """A test closes the trainers that it makes, such as the one of an `InteractiveModel`.

    t5x closes the writer of one that is forgotten when Python collects it. If tf.data traces a function
    at that moment, the operation that closes it becomes part of the function, which then fails.
    """
    trainer, managers = sys.modules.get("t5x.trainer"), []
    if trainer is None:
        yield
        return
    initialize = trainer.MetricsManager.__init__

    def recorded(self, *args, **kwargs):
        managers.append(self)
        initialize(self, *args, **kwargs)

    monkeypatch.setattr(trainer.MetricsManager, "__init__", recorded)
    yield
    left = [manager._name for manager in managers if manager._writer is not None]
    for manager in managers:
        manager.close()
    assert not left, f"not closed: {left}"
