"""Int8 kernels: their error and size, and that training does not change them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import COMPILE_FAST
from hypothesis import given, settings
from hypothesis import strategies as st
from modules.helpers import config, difference, random_params, random_tokens
from trees import DOUBLE, adapted, adapters_of, logits, loss_of, merged_logits

from famx.base.errors import ConfigError
from famx.lora import intercept, merged, quantize
from famx.modules import Decoder, Memory

EVERY = dict(qkv_bias=True, output_bias=True, mlp_bias=True, num_heads=4, num_kv_heads=2, head_dim=4)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_a_weight_is_off_by_half_its_channels_scale_at_most(seed, size):
    draw = np.random.default_rng(seed).standard_normal
    value = (draw((2, 5, 2, 3)) * size).astype(np.float32)
    value[1, :, 0, 1] = 0
    output = (draw((2, 2, 3, 5)) * size).astype(np.float32)
    params = {"layers": {"value": {"kernel": value}, "output": {"kernel": output}}}
    small = quantize(params, ("attention",))["layers"]
    back = merged({"layers": small})["layers"]
    for name, inputs, scales in (("value", (1,), (2, 2, 3)), ("output", (1, 2), (2, 5))):
        kernel, scale = params["layers"][name]["kernel"], np.asarray(small[name]["kernel_scale"])
        assert small[name]["kernel"].dtype == jnp.int8
        assert scale.dtype == np.float32 and scale.shape == scales and np.all(scale > 0)
        error = np.max(np.abs(kernel - back[name]["kernel"]), axis=inputs)
        assert np.all(error <= 0.5001 * scale)
        largest = np.max(np.abs(kernel), axis=inputs)
        np.testing.assert_allclose(scale[largest > 0], largest[largest > 0] / 127, rtol=1e-6)
    assert not np.any(back["value"]["kernel"][1, :, 0, 1])


def test_logits_are_near_and_biases_are_right():
    c, _, tree = adapted(memory=Memory(), **EVERY, **DOUBLE)
    tokens, small = random_tokens(2, 13), quantize(tree)
    exact, near = logits(c, tree, tokens), logits(c, small, tokens)
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    assert 1e-3 * rms(exact) < rms(near - exact) < 0.05 * rms(exact)
    assert difference(near, merged_logits(c, small, tokens)) < 1e-4


def test_without_adapters_the_context_needs_no_lora():
    c = config(**EVERY)
    params, tokens = random_params(c), random_tokens(2, 9)
    small = quantize(params)

    def apply(params):
        with intercept():
            return Decoder(c).apply({"params": params}, tokens)[0]

    near = jax.jit(apply, compiler_options=COMPILE_FAST)(small)
    assert difference(near, logits(c, merged(small), tokens, None)) < 1e-3


def test_only_kernels_of_the_targets_change():
    params = random_params(config())
    small = quantize(params, ("feed_forward",))
    assert small["layers"]["query"] == params["layers"]["query"]
    assert set(small["layers"]["mlp"]["up"]) == {"kernel", "kernel_scale"}
    assert small["embedding"] is params["embedding"]
    assert small["memory"]["prompt"] is params["memory"]["prompt"]
    assert merged(small)["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    again = quantize(small)
    assert again["layers"]["mlp"] == small["layers"]["mlp"]
    with pytest.raises(ConfigError, match="Did you mean 'feed_forward'"):
        quantize(params, ("feedforward",))


def test_scales_name_the_axes_of_what_the_kernel_gives():
    tokens = jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(Decoder(config()).init, jax.random.key(0), tokens)["params"]
    layers = jax.eval_shape(quantize, boxed)["layers"]
    assert layers["query"]["kernel_scale"].names == ("layers", "heads", "kv")
    assert layers["output"]["kernel_scale"].names == ("layers", "embed")
    assert layers["output"]["kernel"].names == ("layers", "heads", "kv", "embed")
    plain = jax.eval_shape(quantize, nn.unbox(boxed))["layers"]
    assert plain["mlp"]["down"]["kernel"].dtype == jnp.int8


def test_a_frozen_int8_base_is_the_same_after_training():
    c, params, _ = adapted(dtype="bfloat16", memory=Memory())
    small, adapters = quantize(params), adapters_of(params)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(base, adapters, state):
        loss, grads = jax.value_and_grad(loss_of(c))(adapters, base, random_tokens(2, 12))
        updates, state = optimizer.update(grads, state)
        return loss, base, optax.apply_updates(adapters, updates), state

    base, state, losses = small, optimizer.init(adapters), []
    for _ in range(5):
        loss, base, adapters, state = step(base, adapters, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for old, new in zip(jax.tree.leaves(small), jax.tree.leaves(base), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
