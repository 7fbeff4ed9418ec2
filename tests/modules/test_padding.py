"""Invariant 5: neither amount nor content of padding changes anything real."""

import numpy as np
import pytest
from helpers import (
    assert_close,
    config,
    initial,
    random_params,
    random_tokens,
    read,
)
from memories_table import MEMORIES

from famx.memories import Fam
from famx.modules import Memory

CONFIGS = {
    "paper": dict(memory_segments=2),
    "block-outer": dict(blocks_per_chunk=1, memory_segments=0, attention_backend="blockwise"),
    "bswa, two blocks": dict(blocks_per_chunk=2, memory=Memory(), attention_backend="xla"),
    "gated, window mask": dict(memory=Fam(2, update="gated"), window_mask=True, blocks_per_chunk=3),
    **{name: dict(memory=memory, blocks_per_chunk=2) for name, memory in MEMORIES.items()},
}
PLACES = {"start": None, "inside a block": 6, "block boundary": 8}


def padded(tokens, length, seed):
    """`tokens` with other random padding up to `length`, and the mask."""
    out = random_tokens(tokens.shape[0], length, seed)
    out[:, : tokens.shape[1]] = tokens
    return out, np.broadcast_to(np.arange(length) < tokens.shape[1], out.shape)


@pytest.mark.sampled(27)
@pytest.mark.parametrize(
    "name,place",
    [
        *((name, "inside a block") for name in CONFIGS),
        ("paper", "start"),
        ("block-outer", "start"),
        ("bswa, two blocks", "block boundary"),
    ],
)
def test_padding_changes_nothing(name, place):
    c = config(dtype="float64", **CONFIGS[name])
    params, tokens, count = random_params(c), random_tokens(2, 7), PLACES[place]
    state = None
    if count is not None:
        before = random_tokens(2, 8, seed=1)
        state = read(c, params, before, None, np.broadcast_to(np.arange(8) < count, (2, 8)))[1]
    logits, after = read(c, params, tokens, state)
    results = []
    for length, seed in ((13, 2), (13, 3), (7, 4)):
        more, valid = padded(tokens, length, seed)
        got, got_after = read(c, params, more, state, valid)
        results.append((got[:, :7], got_after))
        assert_close(results[-1], (logits, after), 1e-10)
        assert np.isfinite(got).all()
    assert_close(results[0], results[1], 0)  # the content: bit for bit


@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", ["paper", "bswa, two blocks", *MEMORIES])
@pytest.mark.parametrize("count", [0, 3, 4])
def test_a_single_token_that_is_not_valid_is_no_token(name, count):
    c = config(**CONFIGS[name])
    params = random_params(c)
    valid = np.broadcast_to(np.arange(8) < count, (2, 8))
    state = read(c, params, random_tokens(2, 8), None, valid)[1]
    _, after = read(c, params, random_tokens(2, 1), state, np.zeros((2, 1), bool))
    assert_close(after, state, 0)


def test_reading_padding_alone_leaves_the_start():
    c = config(blocks_per_chunk=1)
    params = random_params(c)
    _, after = read(c, params, random_tokens(2, 9), None, np.zeros((2, 9), bool))
    assert_close(after, initial(c, params, 2), 0)
