"""Invariant 2: how a sequence is cut changes neither logits nor any field of the state."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import (
    assert_close,
    config,
    initial,
    precision,
    random_params,
    random_tokens,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import MEMORIES

from famx.memories import Fam
from famx.modules import DecoderState, Memory

LENGTH = 19
CHUNKS = (1, 3, 4, 9)  # one token, odd, one block, more than two blocks
CONFIGS = {
    "paper, grouped heads": dict(memory_segments=2, num_heads=4, num_kv_heads=2),
    "bswa, one key head": dict(memory_segments=3, memory=Memory(), num_kv_heads=1, blocks_per_chunk=2),
    "no segments, gated": dict(
        memory_segments=0, memory=Fam(2, update="gated", positions="float"), blocks_per_chunk=1
    ),
    "window mask, scaled": dict(
        window_mask=True, memory=Fam(2, update_scale=0.5, normalize=True, positions="zero"),
        blocks_per_chunk=2, attention_backend="blockwise",
    ),
}  # fmt: skip
MORE = {
    "window mask, no segments": dict(memory_segments=0, window_mask=True),
    "no segments, bswa": dict(memory_segments=0, memory=Memory()),
    "three segments, full memory": dict(
        memory_segments=3, memory=Fam(4), num_kv_heads=1, attention_backend="xla"
    ),
    "transformer-xl, parallel": dict(
        memory_segments=2, window_mask=True, memory=Memory(), parallel_block=True, norm="layer"
    ),
    "prefix, gemma": dict(
        memory=Fam(2, start_from="prefix"), post_norms=True, qk_norm=True, attention_softcap=2.0,
        qkv_bias=True,
    ),
}  # fmt: skip
EVERY_MEMORY = {
    name: dict(memory=memory, memory_segments=number % 3, blocks_per_chunk=2)
    for number, (name, memory) in enumerate(MEMORIES.items())
}
ALL = {**CONFIGS, **MORE, **EVERY_MEMORY}


def read_in_chunks(c, params, tokens, chunks):
    """Logits and state of reading `chunks`, then what is left token by token."""
    state, logits, done = initial(c, params, tokens.shape[0]), [], 0
    sizes = list(chunks) + [1] * (tokens.shape[1] - sum(chunks))
    for size in sizes:
        out, state = read(c, params, tokens[:, done : done + size], state)
        logits.append(out)
        done += size
    return np.concatenate(logits, axis=1), state


def check(c, chunks, tolerance=1e-10):
    params, tokens = random_params(c), random_tokens(3, LENGTH)
    assert_close(read_in_chunks(c, params, tokens, chunks), read(c, params, tokens), tolerance)


@pytest.mark.sampled(28)
@pytest.mark.parametrize("name", ALL)
def test_token_by_token_equals_the_whole(name):
    check(config(dtype="float64", **ALL[name]), [])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["paper, grouped heads", "window mask, scaled"])
def test_token_by_token_equals_the_whole_in_float32(name):
    check(config(**ALL[name]), [], tolerance=5e-5)


@st.composite
def cuts(draw):
    chunks, left = [], LENGTH
    while left:
        chunks.append(draw(st.sampled_from([size for size in CHUNKS if size <= left])))
        left -= chunks[-1]
    return chunks


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(cuts())
def test_any_chunking_equals_the_whole(name, chunks):
    check(config(dtype="float64", **CONFIGS[name]), chunks)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3])
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_block_outer_equals_layer_parallel(blocks_per_chunk, backend):
    c = config(dtype="float64", memory_segments=2, attention_backend=backend)
    params, tokens = random_params(c), random_tokens(3, LENGTH)
    outer = dataclasses.replace(c, blocks_per_chunk=blocks_per_chunk)
    assert_close(read(outer, params, tokens), read(c, params, tokens), 1e-10)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("blocks_per_chunk", [None, 1])
def test_aligned_is_the_same_where_it_holds(blocks_per_chunk):
    c = config(dtype="float64", memory_segments=2, blocks_per_chunk=blocks_per_chunk)
    params, tokens = random_params(c), random_tokens(3, 16)
    whole = read(c, params, tokens)
    begin, state = read(c, params, tokens[:, :8], initial(c, params, 3), aligned=True)
    end, state = read(c, params, tokens[:, 8:], state, aligned=True)
    assert_close((np.concatenate([begin, end], axis=1), state), whole, 1e-10)


# Examples of one batch at different places.

COUNTS = np.array([0, 3, 4, 9])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name,start",
    [
        *((name, "given") for name in CONFIGS),
        ("no segments, gated", "implied"),
        ("window mask, scaled", "aligned"),
    ],
)
def test_examples_at_different_places_read_on(name, start):
    c = config(dtype="float64", **CONFIGS[name])
    params, tokens = random_params(c), random_tokens(4, 18)
    valid = np.arange(9) < COUNTS[:, None]
    state = None if start == "implied" else initial(c, params, 4)
    first, state = read(c, params, tokens[:, :9], state, valid, aligned=start == "aligned")
    np.testing.assert_array_equal(state.position, COUNTS)
    # The oracle: each example's own tokens one by one, a token that is not valid being no token.
    one = initial(c, params, 4)
    for i in range(9):
        logits, one = read(c, params, tokens[:, i : i + 1], one, valid[:, i : i + 1])
        assert_close(first[valid[:, i], i], logits[valid[:, i], 0], 1e-10)
    assert_close(state, one, 1e-10)
    if start != "given":
        return
    # From four phases on: a chunk of which each example takes another part, then tokens.
    more = np.arange(9) < np.array([9, 9, 1, 6])[:, None]
    chunk, state = read(c, params, tokens[:, 9:], state, more)
    for i in range(9):
        logits, one = read(c, params, tokens[:, 9 + i : 10 + i], one, more[:, i : i + 1])
        assert_close(chunk[more[:, i], i], logits[more[:, i], 0], 1e-10)
    assert_close(state, one, 1e-10)


# The state as a thing.


def place(c, params, batch=3):
    """A state whose examples stand at different places."""
    valid = np.arange(9) < np.array([9, 2, 5])[:batch, None]
    return read(c, params, random_tokens(batch, 9, seed=1), None, valid)[1]


def test_take_gives_the_states_of_the_examples_named():
    c = config(dtype="float64")
    params, order = random_params(c), [2, 0, 1]
    state, tokens = place(c, params), random_tokens(3, 9, seed=2)
    logits, after = read(c, params, tokens, state)
    with precision(c):
        taken, after = state.take(order), after.take(order)
        repeated = state.take([1, 1, 1, 0])
    assert_close(read(c, params, tokens[order], taken), (logits[np.array(order)], after), 1e-12)
    assert repeated.batch_size == 4
    np.testing.assert_array_equal(repeated.memory[:, 2], state.memory[:, 1])
    np.testing.assert_array_equal(repeated.position, [2, 2, 2, 9])


def test_select_resets_single_examples():
    c = config(dtype="float64")
    params = random_params(c)
    state, fresh, tokens = place(c, params), initial(c, params, 3), random_tokens(3, 9, seed=2)
    with precision(c):
        state = fresh.select(np.array([False, True, False]), state)
    logits, after = read(c, params, tokens, state)
    from_start, after_start = read(c, params, tokens)
    going_on, after_going_on = read(c, params, tokens, place(c, params))
    assert_close(logits[1], from_start[1], 1e-10)
    assert_close(logits[0], going_on[0], 1e-12)
    assert_close(logits[2], going_on[2], 1e-12)
    with precision(c):
        assert_close(after.take([1]), after_start.take([1]), 1e-10)
        assert_close(after.take([0, 2]), after_going_on.take([0, 2]), 1e-12)


def test_put_replaces_single_examples():
    c = config()
    params = random_params(c)
    state, fresh = place(c, params), initial(c, params, 2)
    state = state.put(np.array([2, 0]), fresh.replace(offset=np.array([5, 7], np.int32)))
    np.testing.assert_array_equal(state.position, [0, 2, 0])
    np.testing.assert_array_equal(state.offset, [7, 0, 5])
    assert_close(state.take([2]).replace(offset=fresh.offset[:1]), fresh.take([0]), 0)
    assert_close(state.take([1]), place(c, params).take([1]), 0)


def test_the_size_of_the_state_is_fixed():
    c = config()
    params = random_params(c)
    fresh, old = initial(c, params, 3), place(c, params)
    spec = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert spec(fresh) == spec(old)
    numbers = 2 * 3 * (2 * 8 + 2 * 2 * 4 * 2 * 4)  # layers, batch, F, keys and values
    assert fresh.num_bytes() == old.num_bytes() == 4 * (numbers + 3 * 3)


def test_slots_without_a_token_are_zero():
    c = config(memory_segments=2)
    state = place(c, random_params(c))
    keys = np.abs(np.asarray(state.keys)).sum((0, 4, 5))  # [B, M + 1, S]
    # Positions 9, 2 and 5: two full blocks and a token; two tokens; a block and a token.
    expected = [[[1] * 4, [1] * 4, [1, 0, 0, 0]], [[0] * 4, [0] * 4, [1, 1, 0, 0]]]
    np.testing.assert_array_equal(keys[:2] > 0, np.array(expected, bool))
    np.testing.assert_array_equal(keys[2] > 0, np.array([[0] * 4, [1] * 4, [1, 0, 0, 0]], bool))
    assert isinstance(state, DecoderState)


def test_a_state_of_another_batch_is_refused():
    c = config()
    params = random_params(c)
    with pytest.raises(ValueError, match="tokens have batch 2, but the state has 3"):
        read(c, params, random_tokens(2, 4), initial(c, params, 3))
