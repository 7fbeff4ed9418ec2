"""Training under t5x: the losses of our engine, and checkpoints that either continues from."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from driving import TASK, dataset, run_ours, run_t5x  # skips without t5x
from flax.traverse_util import flatten_dict
from tiny import assert_identical, make_model

from famx.lora import Lora
from famx.modules import Memory
from famx.training.state_passing import Random
from famx.training.trainable import Trainable

pytestmark = [pytest.mark.slow, pytest.mark.t5x]
RANDOM = {"state_passing": Random(1.0, start_step=3)}


def saved(model_dir, step):
    return ocp.PyTreeCheckpointer().restore(model_dir / f"checkpoint_{step}" / "state")


def assert_same_losses(ours, theirs, steps):
    np.testing.assert_allclose([theirs[i] for i in steps], [ours[i] for i in steps], rtol=2e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_twenty_losses_are_those_of_our_engine(tmp_path, optimizer):
    ours = run_ours(tmp_path / "ours", 20, optimizer=optimizer)
    theirs = run_t5x(tmp_path / "t5x", 20, optimizer=optimizer).losses
    assert_same_losses(ours, theirs, range(1, 21))
    a, b = saved(tmp_path / "ours", 20), saved(tmp_path / "t5x", 20)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-2, 1e-3), a["target"], b["target"])
    assert jax.tree.structure(a["state"]) == jax.tree.structure(b["state"])
    dtypes = lambda tree: jax.tree.map(lambda x: np.asarray(x).dtype, tree)
    assert dtypes(a["state"]) == dtypes(b["state"])


def test_either_engine_goes_on_from_the_others_checkpoint(tmp_path):
    ours = run_ours(tmp_path / "all", 60, **RANDOM)
    mixed = run_ours(tmp_path / "mixed", 20, **RANDOM)
    before = saved(tmp_path / "mixed", 20)
    theirs = run_t5x(tmp_path / "mixed", 40, **RANDOM)
    assert sorted(theirs.losses) == list(range(21, 41))
    assert_same_losses(ours, theirs.losses, range(21, 41))
    memory = theirs.state.flax_mutables["state_passing"]
    assert memory["steps"] == 40 and before["flax_mutables"]["state_passing"]["steps"] == 20
    mixed = run_ours(tmp_path / "mixed", 60, **RANDOM)
    assert_same_losses(ours, mixed, range(41, 61))
    a, b = saved(tmp_path / "all", 60), saved(tmp_path / "mixed", 60)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-2, 2e-3), a, b)


def test_adapters_learn_from_a_checkpoint_and_nothing_else_changes(tmp_path):
    base = str(tmp_path / "base")
    run_ours(base, 2, model=make_model(memory=Memory()))
    settings = dict(model=make_model(lora=Lora(rank=2)), trainable=Trainable("lora"))
    ours = run_ours(tmp_path / "ours", 8, initial_checkpoint_path=base, **settings)
    theirs = run_t5x(tmp_path / "t5x", 4, initial=base, **settings)
    assert_same_losses(ours, theirs.losses, range(1, 5))
    first, tree = saved(tmp_path / "base", 2), saved(tmp_path / "t5x", 4)
    assert jax.tree.structure(tree) == jax.tree.structure(saved(tmp_path / "ours", 8))
    first, last = (flatten_dict(tree["target"], sep="/") for tree in (first, tree))
    for path, leaf in last.items():
        if path in first:
            assert leaf.tobytes() == first[path].tobytes(), path
        else:
            assert path == "memory/prompt" or path.endswith(("lora_a", "lora_b")), path
            assert np.any(leaf != 0), path
    theirs = run_t5x(tmp_path / "t5x", 6, initial=base, **settings)
    assert sorted(theirs.losses) == [5, 6]  # from its own checkpoint, not from the base's
    again = run_ours(tmp_path / "t5x", 8, initial_checkpoint_path=base, **settings)
    assert_same_losses(ours, theirs.losses | again, range(5, 9))


def test_a_run_goes_on_bit_for_bit_also_from_its_first_checkpoint(tmp_path):
    data = dataset(mixture_or_task_name=TASK, use_cached=False)
    whole = run_t5x(tmp_path / "whole", 4, data=data)
    first = (tmp_path / "whole" / "checkpoint_0" / "dataset" / "metadata").read_text()
    assert first == json.dumps({"feed": {"curriculum": {"stage": 0, "level": 0.0}}, "pending": []})
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint_4")
    again = run_t5x(tmp_path / "cut", 4, data=data)
    assert again.losses == whole.losses
    assert_identical(saved(tmp_path / "cut", 4), saved(tmp_path / "whole", 4))
