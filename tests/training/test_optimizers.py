"""Optimisers: what they clip, decay and remember."""

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from famx.base.errors import ConfigError
from famx.training import optimizers, schedules

ALL = [optimizers.adamw, optimizers.adafactor, optimizers.lion]


def make_params():
    return {
        "embedding": jnp.ones((5, 4)),
        "memory": jnp.ones((2, 4)),
        "layers": {
            "attention": {"query": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}},
            "norm": {"scale": jnp.ones((3, 4))},
        },
        "head": jnp.ones((4, 5)),
    }


def step(optimizer, params, grads):
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


def test_mask_spares_tables_norms_biases_and_the_prompt():
    mask = optimizers.decay_mask(make_params())
    assert mask == {
        "embedding": False,
        "memory": False,
        "layers": {
            "attention": {"query": {"kernel": True, "bias": False}},
            "norm": {"scale": False},
        },
        "head": True,
    }
    assert optimizers.decay_mask({"w": jnp.ones(3)}) == {"w": False}
    assert optimizers.decay_mask({"Embed_0": jnp.ones((2, 2))}) == {"Embed_0": False}


@pytest.mark.parametrize("make", ALL)
def test_decay_alone_shrinks_only_masked_weights(make):
    params = make_params()
    updates = step(make(0.1, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    want = jax.tree.map(lambda p, m: p * (-0.05 if m else 0), params, optimizers.decay_mask(params))
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, w, atol=1e-7), updates, want)


@pytest.mark.parametrize("make", ALL)
def test_parts_have_rates_and_decays_of_their_own(make):
    Part = optimizers.Part
    params = make_params()
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    plain = step(make(0.1, weight_decay=0.5), params, grads)
    parts = {"memory": Part(10.0), "norms": Part(decay=0.25), "layers/.*kernel": Part(0.5, 0.0)}
    found = step(make(0.1, weight_decay=0.5, parts=parts), params, grads)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    close(found["memory"], 10 * plain["memory"])
    close(found["embedding"], plain["embedding"])
    close(found["head"], plain["head"])
    close(found["layers"]["norm"]["scale"], plain["layers"]["norm"]["scale"] - 0.1 * 0.25)
    kernel, bias = (found["layers"]["attention"]["query"][name] for name in ("kernel", "bias"))
    close(kernel, 0.5 * (plain["layers"]["attention"]["query"]["kernel"] + 0.1 * 0.5))
    close(bias, plain["layers"]["attention"]["query"]["bias"])


@pytest.mark.parametrize("make", ALL)
def test_parts_add_no_state_that_a_checkpoint_would_hold(make):
    params, parts = make_params(), {"memory": optimizers.Part(2.0, 0.1)}
    plain, with_parts = (make(0.1, parts=p).init(params) for p in ({}, parts))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(plain)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(with_parts)
    )


@pytest.mark.parametrize("make", ALL)
def test_what_is_of_parameters_in_a_state_with_parts_is_found(make):
    """As every run does, to shard the state and to hold the adapters' part of it."""
    params, parts = make_params(), {"memory": optimizers.Part(2.0, 0.1)}
    plain, with_parts = (
        optax.tree_utils.tree_map_params(one, lambda x: x.shape, one.init(params))
        for one in (make(0.1), make(0.1, parts=parts))
    )
    assert jax.tree.leaves(with_parts) == jax.tree.leaves(plain)


def test_what_is_measured_does_not_decay():
    params = {"layers": {"memory": {"rms": jnp.ones(3), "bias": jnp.ones((3, 2))}}}
    optimizer = optimizers.adamw(0.1, weight_decay=0.5, parts={"memory": optimizers.Part(decay=0.5)})
    updates = step(optimizer, params, jax.tree.map(jnp.zeros_like, params))["layers"]["memory"]
    np.testing.assert_array_equal(updates["rms"], 0)
    np.testing.assert_allclose(updates["bias"], -0.05, rtol=1e-5)


def test_a_part_that_nothing_is_in_is_refused():
    with pytest.raises(ConfigError, match="part 'lora' has no parameter that learns; .*embedding"):
        optimizers.adamw(0.1, parts={"lora": optimizers.Part(2.0)}).init({"embedding": jnp.ones(3)})
    for bad, sentence in ((dict(rate=0.0), "above 0, not 0.0"), (dict(decay=-1.0), "at least 0 or None")):
        with pytest.raises(ConfigError, match=rf"Part\.(rate|decay) must be a number .*{sentence}"):
            optimizers.Part(**bad)


@pytest.mark.parametrize("make", ALL)
def test_learns_and_follows_the_schedule(make):
    target = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    optimizer = make(schedules.warmup_stable_decay(0.1, steps=200, decay_steps=150))
    loss = lambda p: jnp.mean((p["w"] - target) ** 2)  # noqa: E731

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optimizer.init(params)), None, length=200)[0][0]

    assert loss(run({"w": jnp.zeros((2, 2))})) < 1e-2


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_clipping_bounds_the_global_norm(scale):
    seen = []
    spy = optax.stateless(lambda updates, params: seen.append(updates) or updates)
    grads = {"a": jnp.full(4, 3.0 * scale), "b": jnp.full((2, 2), 4.0 * scale)}
    step(optimizers._clipped(2.0, spy), grads, grads)
    assert optax.tree.norm(seen[0]) == pytest.approx(2.0, rel=1e-5)
    step(optimizers._clipped(None, spy), grads, grads)
    assert optax.tree.norm(seen[1]) == pytest.approx(10.0 * scale, rel=1e-5)


def test_adamw_is_clipped_before_its_moments():
    params = {"w": jnp.zeros((2, 2))}
    grads = {"w": jnp.full((2, 2), 100.0)}
    optimizer = optimizers.adamw(0.1, b1=0.9, clip_norm=1.0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.1 * 0.5, rtol=1e-5)


def test_adafactor_against_the_recurrence():
    beta1, beta2, rate = 0.9, 0.3, 0.01
    optimizer = optimizers.adafactor(rate, beta1, beta2, clip_norm=None)
    params = {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    v, m = np.zeros(3), np.zeros(3)
    for t, g in enumerate(np.random.default_rng(0).normal(size=(4, 3)), start=1):
        updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        decay = min(1 - t**-0.8, beta2)
        v = decay * v + (1 - decay) * g**2
        u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt(np.mean(u**2)))
        m = beta1 * m + (1 - beta1) * u
        np.testing.assert_allclose(updates["w"], -rate * m, rtol=1e-4)


def test_adafactor_factors_wide_matrices():
    params = {"w": jnp.zeros((256, 128)), "b": jnp.zeros(256), "narrow": jnp.zeros((256, 8))}
    factored = optimizers.adafactor(0.1, beta1=None).init(params)
    assert optax.tree.get(factored, "v_row")["w"].size + optax.tree.get(factored, "v_col")[
        "w"
    ].size == 256 + 128
    assert optax.tree.get(factored, "v")["narrow"].shape == (256, 8)


def test_adafactor_relative_to_parameter_scale():
    params = {"w": jnp.full((2, 2), 8.0)}
    grads = {"w": jnp.ones((2, 2))}
    plain = step(optimizers.adafactor(0.1), params, grads)
    relative = step(optimizers.adafactor(0.1, multiply_by_parameter_scale=True), params, grads)
    np.testing.assert_allclose(relative["w"], 8 * plain["w"], rtol=1e-5)


def test_by_name_in_gin():
    for name in ("adamw", "adafactor", "lion", "decay_mask"):
        assert gin.get_configurable(name)
