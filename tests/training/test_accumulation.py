"""A step over microbatches is the step over the whole batch, whatever the weights of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import run
from tiny import BLOCK, assert_close, make_model, make_run, make_tokens

from famx.base.errors import ConfigError
from famx.lora import Lora
from famx.training.state_passing import Aged, Fresh, Lanes, Random
from famx.training.step import make_initializer, make_train_step
from famx.training.trainable import Trainable

BATCH, LENGTH = 6, 3 * BLOCK
MODES = {"none": Fresh(), "random": Random(1.0), "continuous": Lanes(), "aged": Aged(groups=2)}


def batch_of(step):
    """Rows whose weights differ by far, so that a mean of means would be another number."""
    rows = make_tokens(BATCH, LENGTH + 1, seed=step)
    weights = np.random.default_rng(step).random((BATCH, LENGTH)) < np.linspace(0.05, 1, BATCH)[:, None]
    return {
        "decoder_input_tokens": rows[:, :-1],
        "decoder_target_tokens": rows[:, 1:],
        "decoder_loss_weights": weights.astype(np.float32),
    }


def train(mode, microbatches, trainable=Trainable(), steps=3, optimizer=optax.sgd(0.3)):
    ready = make_run(
        model=make_model(lora=Lora(rank=2)), optimizer=optimizer, batch_size=BATCH,
        lengths={"targets": LENGTH}, trainable=trainable, microbatches=microbatches,
        state_passing=MODES[mode],
    ).ready()  # fmt: skip
    initialize, abstract = make_initializer(ready)
    step = make_train_step(ready, abstract)
    state, history = initialize(jax.random.key(0)), []
    for i in range(steps):
        extra = {"lane": np.arange(-1, BATCH - 1, dtype=np.int32)} if mode == "aged" else {}
        if mode == "continuous":
            extra = {"reset": np.arange(BATCH) == i}
        state, metrics = step(state, {**batch_of(i), **extra})
        history.append(jax.tree.map(float, metrics))
    return state, history


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["none", "random", "continuous", "aged"])
def test_microbatches_change_no_number(mode):
    whole, parts = (train(mode, n) for n in (1, 3))
    assert_close(whole[0].params, parts[0].params, 1e-5)
    assert whole[0].kept.keys() == parts[0].kept.keys()
    assert_close(whole[0].kept, parts[0].kept, 1e-5)
    for a, b in zip(whole[1], parts[1], strict=True):
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(a[name].total, b[name].total, rtol=1e-5)
            assert a[name].count == b[name].count
        np.testing.assert_allclose(a["gradient_norm"].total, b["gradient_norm"].total, rtol=1e-4)


@pytest.mark.slow
def test_microbatches_change_no_number_of_adapters():
    whole, parts = (train("none", n, Trainable("lora"), optimizer=optax.adam(0.1))[0] for n in (1, 2))
    assert_close(whole.params, parts.params, 1e-4)


@pytest.mark.slow
def test_microbatches_need_less_memory():
    model, optimizer = make_model(embed_dim=64, mlp_dim=512, vocab_size=2000), optax.sgd(0.1)
    make = lambda n: make_run(
        model=model, optimizer=optimizer, batch_size=32, lengths={"targets": 8 * BLOCK}, microbatches=n
    ).ready()
    initialize, abstract = make_initializer(make(1))
    state = jax.eval_shape(initialize, jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct((32, 8 * BLOCK), jnp.int32)
        for name in ("decoder_input_tokens", "decoder_target_tokens")
    }
    used = []
    for n in (1, 8):
        step = make_train_step(make(n), abstract)
        used.append(step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes)
    assert used[1] < 0.3 * used[0]


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="BATCH_SIZE 4 cannot be cut into 3 microbatches"):
        run(tmp_path, microbatches=3)
