"""Streaming equals reading at once, and compiles nothing again however long the text is."""

import jax
import numpy as np
import pytest
from tiny import BLOCK, assert_close, make_model, make_params, make_tokens

from famx.streaming import Streamer

MODEL = make_model(num_layers=2)
PARAMS = make_params(MODEL.module)


@pytest.fixture(scope="module")
def streamer():
    return Streamer(MODEL.module)


def test_reading_and_predicting_equal_the_whole_at_once(streamer):
    tokens = make_tokens(3, 19 * BLOCK)  # two pieces of eight blocks and three of one
    logits, state = jax.jit(MODEL.module.apply)({"params": PARAMS}, tokens)
    split = 9 * BLOCK
    got = streamer.read(PARAMS, streamer.initial_state(PARAMS, 3), tokens[:, :split])
    best, got = streamer.predict(PARAMS, got, tokens[:, split:])
    assert_close(got, state, 1e-4)
    assert isinstance(best, np.ndarray) and best.dtype == np.int32
    np.testing.assert_array_equal(best, np.argmax(logits[:, split:], axis=-1))


def test_nothing_is_compiled_again(streamer):
    def read(blocks):
        tokens = make_tokens(3, blocks * BLOCK)
        state = streamer.read(PARAMS, streamer.initial_state(PARAMS, 3), tokens)
        best, state = streamer.predict(PARAMS, state, tokens)
        assert best.shape == tokens.shape and state.position.tolist() == [2 * blocks * BLOCK] * 3

    read(9)
    jitted = (streamer._advance, streamer._predict, streamer.initial_state)
    before = [function._cache_size() for function in jitted]
    assert before == [2, 2, 1]
    for blocks in (1, 8, 10, 40):
        read(blocks)
    assert [function._cache_size() for function in jitted] == before


def test_tokens_must_fill_blocks(streamer):
    state = streamer.initial_state(PARAMS, 3)
    for call in (streamer.read, streamer.predict):
        with pytest.raises(ValueError, match="20 tokens do not fill whole blocks of 8; pad"):
            call(PARAMS, state, make_tokens(3, 20))


def test_the_chunking_of_the_model_does_not_matter():
    whole = make_model(num_layers=2, blocks_per_chunk=None, memory_segments=0)
    assert Streamer(whole.module).module.config.blocks_per_chunk == 1
