"""Context parallelism: how many shards are read side by side changes no number, nor any gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, config, initial, jit, random_params, random_tokens, read
from memories_table import REMEMBERING, SIDE_BY_SIDE
from test_order import ALL

from famx.memories import Rmt
from famx.modules import Decoder, Memory

WIDE = dict(dtype="float64", param_dtype="float64")


@functools.cache
def reader(c, shards, aligned):
    """Jitted `(hidden, state)` and gradients of a loss that reads every one of them."""

    def run(params, tokens, state, valid):
        def loss(params, memory):
            given = state.replace(memory=memory)
            hidden, end = Decoder(c).apply(
                {"params": params}, tokens, given, valid, aligned, method="read", context_shards=shards
            )
            if valid is not None:
                hidden = jnp.where(valid[..., None], hidden, 0)
            ends = [jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(end.memory)]
            total = sum(ends) + jnp.sum(end.keys * end.values)
            return total + jnp.sum(jnp.sin(hidden)), (hidden, end)

        return jax.grad(loss, (0, 1), has_aux=True)(params, state.memory)

    return jit(c, run)


def check(c, shards, blocks, before=0, lengths=None):
    """Reads `blocks` blocks after `before` tokens; of each example only `lengths` are valid."""
    params, tokens = random_params(c), random_tokens(3, before + blocks * c.block_size)
    state = initial(c, params, 3)
    if before:
        state = read(c, params, tokens[:, :before])[1]
    tokens, aligned = tokens[:, before:], before % c.block_size == 0
    if not aligned:
        tokens = tokens[:, : -c.block_size]  # they reach into one block more
    valid = lengths and np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    results = [reader(c, n, aligned)(params, tokens, state, valid) for n in (1, shards)]
    assert_close(*results, 1e-10)


OTHERS = [name for name in ALL if name not in REMEMBERING]


@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", [*OTHERS, *SIDE_BY_SIDE])
def test_shards_equal_the_whole(name):
    c = {"blocks_per_chunk": None, **ALL[name]}
    if c["blocks_per_chunk"] == 1:
        c["blocks_per_chunk"] = 2
    check(config(**WIDE, **c), shards=2, blocks=4, before=8)


@pytest.mark.slow
def test_more_segments_than_a_shard_has_blocks():
    check(config(**WIDE, memory_segments=3), shards=4, blocks=4, before=4)
    check(config(**WIDE, memory_segments=3, memory=Memory()), shards=2, blocks=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_examples_at_different_places(name):
    wide = dict(WIDE, memory=SIDE_BY_SIDE[name])
    check(config(**wide, memory_segments=2), 4, blocks=8, lengths=[32, 9, 21], before=0)
    check(config(**wide, memory_segments=1), 2, blocks=4, lengths=[12, 1, 6], before=6)


def test_blocks_that_shards_do_not_divide():
    c = config()
    with pytest.raises(ValueError, match="3 blocks that are read at once cannot be cut into 2 shards"):
        jax.eval_shape(
            lambda p, t: Decoder(c).apply({"params": p}, t, method="read", context_shards=2),
            random_params(c), random_tokens(1, 12),
        )  # fmt: skip


def test_a_memory_of_the_whole_depth_is_refused():
    c = config(memory=Rmt(2))
    with pytest.raises(ValueError, match="'rmt' is made at the top of the stack"):
        jax.eval_shape(
            lambda p, t: Decoder(c).apply({"params": p}, t, method="read", context_shards=2),
            random_params(c), random_tokens(1, 16),
        )  # fmt: skip
