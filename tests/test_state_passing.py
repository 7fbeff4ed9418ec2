"""State passing: the state that an example starts from, and where gradients flow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BLOCK, assert_close, assert_identical, make_model, make_params, make_tokens

from famx.base.errors import ConfigError
from famx.models.decoder_model import random_offset
from famx.training.state_passing import Aged, Fresh, FromMemoryFile, Lanes, Random, named

# Without segments, what an example continues from is its memory alone.
MODEL = make_model(memory_segments=0, num_layers=2)
PARAMS = make_params(MODEL.module)
KEY = jax.random.key(3)
initial = jax.jit(MODEL.initial_state, static_argnums=1)
read = jax.jit(lambda state, tokens: MODEL.module.apply({"params": PARAMS}, tokens, state=state))


def of(kept):
    """What random state passing keeps, without the names that checkpoints give it."""
    return kept["flax_mutables"]["state_passing"]


def start_of(random, kept, fresh, key=KEY):
    return random.start(kept, fresh, None, key)[0]


def make_batch(tokens):
    return {"decoder_input_tokens": tokens, "decoder_target_tokens": np.roll(tokens, -1, axis=1)}


def kept_after(tokens, start_step=0, steps=1):
    """What RSP keeps after a batch that was read from the start."""
    random = Random(1.0, start_step)
    kept = random.initial(MODEL, PARAMS)
    for _ in range(steps):
        kept = random.end(kept, read(initial(PARAMS, tokens.shape[0]), tokens)[1])
    return kept


# ---------------------------------------------------------------- random position offset


def test_offsets_are_zero_half_of_the_time_and_below_a_wavelength():
    base = 100.0
    offset = np.asarray(random_offset(KEY, 20_000, base))
    assert offset.dtype == np.int32 and offset.min() == 0
    assert abs((offset == 0).mean() - 0.5) < 0.02
    assert 620 < offset.max() < 2 * np.pi * base
    assert abs(offset[offset > 0].mean() - np.pi * base) < 10
    assert (offset != np.asarray(random_offset(jax.random.key(4), 20_000, base))).any()


def test_an_offset_is_drawn_at_the_start_of_a_document_alone():
    model = make_model(random_position_offset=True)
    batch, params = make_batch(make_tokens(8, BLOCK)), make_params(model.module)
    loss = jax.jit(model.loss)
    start = jax.jit(model.initial_state, static_argnums=1)(params, 8)
    _, _, state = loss(params, batch, KEY, start)
    assert np.asarray(state.offset).max() > 0
    _, _, later = loss(params, batch, jax.random.key(9), state)
    np.testing.assert_array_equal(later.offset, state.offset)


# ---------------------------------------------------------------- random state passing


def test_nothing_is_kept_at_first():
    random = Random(1.0)
    kept, start = random.initial(MODEL, PARAMS), initial(PARAMS, 3)
    assert of(kept)["memory"].shape == (2, 2, 16) and of(kept)["memory"].dtype == jnp.float32
    assert_identical(start_of(random, kept, start), start)


@pytest.mark.parametrize("probability, start_step, passes", [(1, 0, 1), (0, 0, 0), (1, 3, 0)])
def test_probability_and_start_step(probability, start_step, passes):
    kept = kept_after(make_tokens(2, 2 * BLOCK))
    start = initial(PARAMS, 3)
    got = start_of(Random(probability, start_step), kept, start)
    memory = of(kept)["memory"][:, None] if passes else start.memory
    np.testing.assert_array_equal(got.memory, np.broadcast_to(memory, start.memory.shape))
    np.testing.assert_array_equal(got.updates, [2 * passes] * 3)


def test_start_step_is_reached():
    kept, start = kept_after(make_tokens(2, BLOCK), steps=3), initial(PARAMS, 3)
    assert int(of(kept)["steps"]) == 3
    assert int(start_of(Random(1.0, 3), kept, start).updates[0]) == 1
    assert int(start_of(Random(1.0, 4), kept, start).updates[0]) == 0


def test_one_coin_for_the_whole_batch_of_the_right_weight():
    kept, start = kept_after(make_tokens(2, BLOCK)), initial(PARAMS, 3)
    keys = jax.random.split(KEY, 1000)
    updates = jax.jit(jax.vmap(lambda key: start_of(Random(0.8), kept, start, key).updates))(keys)
    assert (updates == updates[:, :1]).all()
    assert abs(float((updates[:, 0] == 1).mean()) - 0.8) < 0.05


def test_the_memory_of_the_first_example_is_kept():
    tokens = make_tokens(3, 2 * BLOCK)
    state = read(initial(PARAMS, 3), tokens)[1]
    kept = of(Random().end(Random().initial(MODEL, PARAMS), state))
    np.testing.assert_array_equal(kept["memory"], state.memory[:, 0])
    assert (int(kept["updates"]), int(kept["steps"])) == (2, 1)


def test_reading_goes_on_with_the_ordinary_residual():
    """An example that starts from a kept memory gives what the example that made it would give next."""
    tokens, more = make_tokens(3, 2 * BLOCK), make_tokens(3, BLOCK, seed=1)
    state = read(initial(PARAMS, 3), tokens)[1]
    random = Random(1.0)
    kept = random.end(random.initial(MODEL, PARAMS), state)
    logits, passed = read(start_of(random, kept, initial(PARAMS, 3)), more)
    expected, after = read(state.take([0, 0, 0]), more)
    assert_close(logits, expected)
    assert_close(passed.memory, after.memory)
    np.testing.assert_array_equal(passed.updates, after.updates)


def test_no_gradient_through_the_kept_memory():
    batch, kept = make_batch(make_tokens(2, BLOCK)), kept_after(make_tokens(2, BLOCK))
    random = Random(1.0)

    def loss(memory, params, updates, weight):
        state = MODEL.initial_state(params, 2)
        given = random._dict({**of(kept), "memory": memory, "updates": updates})
        state = start_of(random, given, state)
        value, _, end = MODEL.loss(params, batch, None, state)
        return value + weight * jnp.sum(of(random.end(kept, end))["memory"])

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    memory, params = gradient(of(kept)["memory"], PARAMS, 1, 1.0)
    assert not np.any(memory)
    assert not np.any(params["memory"]["prompt"])  # no example started from the prompt
    assert np.any(params["embedding"])
    memory, params = gradient(of(kept)["memory"], PARAMS, 0, 1.0)
    assert not np.any(memory) and np.any(params["memory"]["prompt"])
    assert_identical(params, gradient(of(kept)["memory"], PARAMS, 0, 0.0)[1])


def test_the_memory_is_passed_from_step_to_step():
    random = Random(1.0)

    @jax.jit
    def step(kept, batch):
        start, rng = random.start(kept, MODEL.initial_state(PARAMS, 2), batch, KEY)
        loss, _, end = MODEL.loss(PARAMS, batch, rng, start)
        return loss, random.end(kept, end)

    nothing = random.initial(MODEL, PARAMS)
    first, second = make_batch(make_tokens(2, BLOCK)), make_batch(make_tokens(2, BLOCK, seed=1))
    _, kept = step(nothing, first)
    passed, kept = step(kept, second)
    assert (int(of(kept)["updates"]), int(of(kept)["steps"])) == (2, 2)
    fresh, _ = step(nothing, second)
    assert abs(float(passed) - float(fresh)) > 1e-6


def test_a_memory_may_be_any_tree_of_arrays():
    """Nothing but the batch axis of each leaf is known of a memory."""
    random, fresh = Random(1.0), initial(PARAMS, 3)
    tree = {"rows": fresh.memory, "count": (jnp.arange(6.0).reshape(2, 3),)}
    fresh = fresh.replace(memory=tree)

    @dataclasses.dataclass(frozen=True)
    class Model:
        def initial_state(self, params, batch_size):
            return fresh.take(jnp.zeros(batch_size, jnp.int32))

    kept = random.initial(Model(), PARAMS)
    assert of(kept)["memory"]["count"][0].shape == (2,)
    kept = random.end(kept, fresh.replace(updates=fresh.updates + 1))
    np.testing.assert_array_equal(of(kept)["memory"]["count"][0], [0, 3])
    got = start_of(random, kept, fresh)
    np.testing.assert_array_equal(got.memory["count"][0], [[0, 0, 0], [3, 3, 3]])
    lanes = Lanes().end({}, fresh)
    got, _ = Lanes().start(lanes, fresh, {"reset": np.array([True, False, True])}, KEY)
    assert_identical(got, fresh)
    parts = Lanes().cut(lanes, 3)
    assert parts["lanes"].memory["count"][0].shape == (3, 2, 1)
    assert_identical(Lanes().join(lanes, parts), lanes)


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_probability_out_of_range(probability):
    with pytest.raises(ValueError, match="Random.probability must be a number from 0 to 1, not"):
        Random(probability)


# ---------------------------------------------------------------- lanes and the pool


def test_resets_are_per_lane():
    start = initial(PARAMS, 3)
    lanes = read(start, make_tokens(3, 2 * BLOCK))[1]
    batch = {"reset": np.array([False, True, False])}
    got, _ = Lanes().start({"lanes": lanes}, start, batch, KEY)
    assert_identical(got.take([0, 2]), lanes.take([0, 2]))
    assert_identical(got.take([1]), start.take([1]))


def test_aged_lanes_are_taken_from_the_pool():
    pool = read(initial(PARAMS, 4), make_tokens(4, 2 * BLOCK))[1]
    start = initial(PARAMS, 3)
    got, _ = Aged().start({"lanes": pool}, start, {"lane": np.array([3, -1, 0])}, KEY)
    assert_identical(got.take([0, 2]), pool.take([3, 0]))
    assert_identical(got.take([1]), start.take([1]))


@pytest.mark.parametrize("mode", ["continuous", "aged"])
def test_gradients_stop_at_the_step_and_reach_the_prompt_after_a_reset(mode):
    past = read(initial(PARAMS, 2), make_tokens(2, BLOCK, seed=1))[1]

    def loss(params, memory, example):
        state = past.replace(memory=memory)
        start = MODEL.initial_state(params, 2)
        batch = {"reset": np.array([True, False]), "lane": np.array([-1, 1])}
        state, _ = named(mode).start({"lanes": state}, start, batch, KEY)
        return jnp.sum(jnp.square(state.memory[:, example]))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    params, memory = gradient(PARAMS, past.memory, 0)
    assert np.any(params["memory"]["prompt"]) and not np.any(memory)
    params, memory = gradient(PARAMS, past.memory, 1)
    assert not np.any(params["memory"]["prompt"]) and not np.any(memory)


def test_states_are_chosen_by_name(tmp_path):
    kinds = {"none": Fresh, "random": Random, "continuous": Lanes, "aged": Aged}
    assert all(named(name) == kind() for name, kind in kinds.items())
    path = str(tmp_path / "book.famem")
    assert named("none", path) == FromMemoryFile(path)
    with pytest.raises(ConfigError, match="named.name must be one of 'none', .*'aged', not 'lanes'"):
        named("lanes")
    with pytest.raises(ConfigError, match="needs STATE_PASSING='none', not 'aged'"):
        named("aged", path)
