"""Invariant 7: reading on takes the same memory at any place, and compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import config, random_params, random_tokens, shapes

from famx.modules import Decoder

CONFIG = config(memory_segments=2, blocks_per_chunk=1)


def taken(compiled):
    """Bytes of temporaries, arguments and results."""
    a = compiled.memory_analysis()
    return a.temp_size_in_bytes, a.argument_size_in_bytes, a.output_size_in_bytes


def test_the_streaming_step_takes_the_same_everywhere_and_compiles_once():
    params = random_params(CONFIG)
    start = jax.jit(lambda p: Decoder(CONFIG).apply({"params": p}, 2, method="initial_state"))

    @functools.partial(jax.jit, donate_argnames="state")
    def step(params, tokens, state):
        return Decoder(CONFIG).apply({"params": params}, tokens, state)

    for size in (1, CONFIG.block_size):
        step.clear_cache()
        state = start(params)
        tokens = random_tokens(2, size)
        at_start = taken(step.lower(params, tokens, state).compile())
        held = state.num_bytes()
        for _ in range(12):
            _, state = step(params, tokens, state)
        assert step._cache_size() == 1
        assert state.num_bytes() == held
        np.testing.assert_array_equal(state.position, 12 * size)
        assert taken(step.lower(params, tokens, state).compile()) == at_start


def test_a_block_outer_read_takes_the_same_for_any_length():
    def temporaries(blocks):
        tokens = jax.ShapeDtypeStruct((2, blocks * CONFIG.block_size), jnp.int32)
        read = lambda p, t: Decoder(CONFIG).apply({"params": p}, t, method="read")[1]
        compiled = jax.jit(read).lower(shapes(CONFIG), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8), temporaries(32)
    extra_tokens = 2 * 24 * CONFIG.block_size
    # Beyond the ids themselves, cut into blocks, nothing grows: not even one float per token.
    assert long - short <= 4 * extra_tokens


def test_the_state_grows_with_the_window_alone():
    size = lambda **changes: _state_bytes(config(**changes))
    base = size(memory_segments=1)
    per_segment = size(memory_segments=2) - base
    assert size(memory_segments=4) - base == 3 * per_segment
    assert per_segment == 2 * 2 * 2 * 4 * 8 * 4  # layers, K and V, batch, S, K * Dh, bytes


def _state_bytes(c):
    start = lambda p: Decoder(c).apply({"params": p}, 2, method="initial_state")
    return jax.eval_shape(start, shapes(c)).num_bytes()
