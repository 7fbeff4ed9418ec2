"""Reading in chunks of any size equals reading at once, and compiles nothing again."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import MEMORIES
from modules.helpers import VOCAB, assert_close, config, precision, random_params, random_tokens, read

from famx.decoding import Streamer
from famx.memories import Fam
from famx.modules import Decoder, Memory

S = 4
VARIANTS = {
    "plain": {},
    "float32, M 3, N 0": dict(memory_segments=3, memory=Memory()),
    "float64, M 0": dict(memory_segments=0, dtype="float64", param_dtype="float64"),
    "float64, M 2, GQA": dict(
        memory_segments=2, num_kv_heads=2, num_heads=4, head_dim=4, dtype="float64",
        param_dtype="float64",
    ),
    "MQA, window mask, gated": dict(
        num_kv_heads=1, window_mask=True, memory=Fam(2, update="gated", normalize=True)
    ),
    "N 4, positions zero": dict(memory=Fam(4, positions="zero"), memory_segments=0),
    **{name: dict(memory=memory) for name, memory in MEMORIES.items()},
}  # fmt: skip
LENGTH = 43  # ends inside a block


@functools.cache
def streamer(name, zero_memory=False) -> Streamer:
    return Streamer(Decoder(config(**VARIANTS[name])), zero_memory)


def setting(name):
    """Config, parameters, and the tolerance of its precision."""
    c = config(**VARIANTS[name])
    return c, random_params(c), 1e-10 if c.dtype == "float64" else 2e-4


@functools.cache
def at_once(name, batch=3, length=LENGTH):
    c, params, _ = setting(name)
    return jax.device_get(read(c, params, random_tokens(batch, length)))


def in_chunks(name, sizes, batch=3):
    """Logits and state of `random_tokens` read in chunks of `sizes`, the last one taking the rest."""
    c, params, _ = setting(name)
    tokens, start, parts = random_tokens(batch, LENGTH), 0, []
    with precision(c):
        reader = streamer(name)
        state = reader.initial_state(params, batch)
        for size in [*sizes, LENGTH]:
            if start < LENGTH:
                logits, state = reader.logits(params, state, tokens[:, start : start + size])
                parts.append(logits)
                start += size
        return np.concatenate(parts, axis=1), jax.device_get(state)


@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "sizes", [[], [1] * LENGTH, [S] * 11, [3] * 15, [7] * 7, [9 * S + 1, 2], [S, 1, 33]],
    ids=lambda s: "-".join(map(str, s[:3])) or "whole",
)  # fmt: skip
def test_chunks_of_any_size_give_the_same_logits_and_state(name, sizes):
    got = in_chunks(name, sizes)
    assert_close(got, at_once(name), setting(name)[2])


@settings(max_examples=15)
@given(st.lists(st.integers(1, 2 * S + 1), max_size=12))
def test_any_chunking_gives_the_same_logits_and_state(sizes):
    assert_close(in_chunks("plain", sizes), at_once("plain"), 2e-4)


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(0, LENGTH), min_size=3, max_size=3), min_size=1, max_size=4))
def test_examples_of_different_lengths_read_on_from_where_they_stand(cuts):
    """Each example reads its own text in parts that end anywhere, padding after them."""
    c, params, tolerance = setting("plain")
    reader, tokens = streamer("plain"), random_tokens(3, LENGTH)
    logits = np.zeros((3, LENGTH, VOCAB), np.float32)
    state, done = reader.initial_state(params, 3), np.zeros(3, int)
    for ends in [*cuts, [LENGTH] * 3]:
        count = np.maximum(np.array(ends) - done, 0)
        width = int(count.max())
        if not width:
            continue
        chunk = random_tokens(3, width, seed=1)  # what stands at padding does not matter
        for row in range(3):
            chunk[row, : count[row]] = tokens[row, done[row] : done[row] + count[row]]
        part, state = reader.logits(params, state, chunk, lengths=count)
        for row in range(3):
            logits[row, done[row] : done[row] + count[row]] = part[row, : count[row]]
            assert not part[row, count[row] :].any()
        done = done + count
    assert_close((logits, jax.device_get(state)), at_once("plain"), tolerance)


def test_the_last_logits_are_those_of_each_examples_last_token():
    c, params, tolerance = setting("plain")
    reader, lengths = streamer("plain"), np.array([LENGTH, 1, 2 * S])
    tokens = random_tokens(3, LENGTH)
    last, state = reader.read(params, reader.initial_state(params, 3), tokens, lengths)
    whole = at_once("plain")[0]
    assert_close(np.asarray(last), whole[np.arange(3), lengths - 1], tolerance)
    assert state.position.tolist() == lengths.tolist()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["plain", "N 4, positions zero"])
def test_predictions_and_scores_are_those_of_the_logits(name):
    c, params, tolerance = setting(name)
    reader, tokens = streamer(name), random_tokens(3, LENGTH)
    targets = np.roll(tokens, -1, axis=1)
    logits = at_once(name)[0].astype(np.float64)
    best, _ = reader.predict(params, reader.initial_state(params, 3), tokens)
    assert isinstance(best, np.ndarray) and best.dtype == np.int32
    np.testing.assert_array_equal(best, logits.argmax(-1))
    (log_p, right), _ = reader.score(params, reader.initial_state(params, 3), tokens, targets)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_p, expected, atol=tolerance)
    np.testing.assert_array_equal(right, best == targets)


def test_zeroed_memory_is_zero_before_every_block():
    c, params, tolerance = setting("plain")
    tokens, blind = random_tokens(3, 5 * S + 2), streamer("plain", zero_memory=True)
    logits, _ = blind.logits(params, blind.initial_state(params, 3), tokens)
    with precision(c):
        state = blind.initial_state(params, 3)
        for start in range(0, tokens.shape[1], S):
            state = state.zero_memory()
            part, state = read(c, params, tokens[:, start : start + S], state)
            assert_close(logits[:, start : start + S], np.asarray(part), tolerance)
    assert np.abs(logits - at_once("plain")[0][:, : tokens.shape[1]]).max() > 1e-2


def test_nothing_is_compiled_again():
    c, params, _ = setting("plain")
    reader = Streamer(Decoder(c))

    def read_some(sizes, lengths=None):
        state = reader.initial_state(params, 2)
        for size in sizes:
            tokens = random_tokens(2, size)
            cut = None if lengths is None else np.minimum(lengths, size)
            logits, state = reader.read(params, state, tokens, cut)
        assert state.position.shape == (2,)

    read_some([1, 8 * S, 9 * S, 3, 2 * S + 1], None)
    read_some([8 * S], np.array([3, 8 * S]))
    read_some([9 * S], np.array([3, 9 * S]))
    read_some([S], np.array([S, 0]))
    jitted = (reader._read_blocks, reader._read_part, reader._initial, reader._logits)
    before = [function._cache_size() for function in jitted]
    assert before == [4, 2, 1, 1]
    for sizes in ([1] * 9, [S] * 9, [40 * S + 1], [5, 6, 7, 8, 90], [100 * S]):
        read_some(sizes)
        read_some(sizes, np.array([sizes[0], sizes[0] // 2]))
    assert [function._cache_size() for function in jitted] == before


def test_the_state_is_given_away_and_of_constant_size():
    c, params, _ = setting("plain")
    reader = streamer("plain")
    state = reader.initial_state(params, 3)
    size = state.num_bytes()
    _, later = reader.read(params, state, random_tokens(3, 30 * S + 1))
    assert state.memory.is_deleted() and later.num_bytes() == size


def test_bad_input_is_refused_with_a_sentence():
    c, params, _ = setting("plain")
    reader = streamer("plain")
    state = reader.initial_state(params, 3)
    refused = {
        "Token id 13 is not in the vocabulary: the model knows the ids 0 to 12": np.full((3, 2), 13),
        "Token id -1 is not in the vocabulary": np.full((3, 2), -1),
        "tokens have batch 2, but the state has 3": random_tokens(2, 5),
        "at least one example, but tokens has none": random_tokens(0, 5),
        "must be .batch, length., got .5,.": random_tokens(1, 5)[0],
    }
    for sentence, tokens in refused.items():
        with pytest.raises(ValueError, match=sentence):
            reader.read(params, state, tokens)
    with pytest.raises(ValueError, match="lengths must be 3 numbers from 0 to 5, got"):
        reader.read(params, state, random_tokens(3, 5), np.array([1, 2, 6]))
    for tokens, lengths in ((random_tokens(3, 0), None), (random_tokens(3, 5), np.zeros(3, int))):
        with pytest.raises(ValueError, match="nothing to read: give at least one token"):
            reader.read(params, state, tokens, lengths)
    with pytest.raises(ValueError, match="do not fill whole blocks of 4"):
        reader.read(params, state, random_tokens(3, 5), aligned=True)
    with pytest.raises(ValueError, match="at least one example, not 0"):
        reader.initial_state(params, 0)
    with pytest.raises(ValueError, match="This would be token 2,147,483,649, and positions end at"):
        old = state.replace(position=state.position + (2**31 - 4))
        reader.read(params, old, random_tokens(3, 5))


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from flax.linen import unbox
from famx.decoding import Streamer
from famx.memories import Fam
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.modules import Decoder, DecoderConfig

module = Decoder(DecoderConfig(vocab_size=13, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12,
                               block_size=4, memory=Fam(2)))
params = unbox(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
with on_mesh(make_mesh(), make_rules()):
    streamer = Streamer(module)
    state = streamer.initial_state(params, 8)
    for leaf in (state.keys, jax.tree.leaves(state.memory)[0], state.position):
        assert {shard.data.size * 4 for shard in leaf.addressable_shards} == {leaf.size}
    for _ in range(2):
        _, state = streamer.read(params, state, np.zeros((8, 4), np.int32), aligned=True)
assert streamer._read_blocks._cache_size() == 1
"""


@pytest.mark.slow
def test_on_a_mesh_the_state_is_split_from_the_start():
    flags = f"--xla_force_host_platform_device_count=4 {xla_flags.FAST}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", ON_A_MESH], check=True, env=env)
