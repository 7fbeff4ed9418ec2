"""Writing token by token equals reading prompt and output at once; sampling draws what it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import MEMORIES
from modules.helpers import VOCAB, assert_close, config, precision, random_params, random_tokens, read
from scipy import stats

from famx.decoding import Sampling, Streamer, generate
from famx.decoding.generation import choose, restrict
from famx.memories import Fam
from famx.modules import Decoder, Memory

S = 4
DOUBLE = dict(dtype="float64", param_dtype="float64")
VARIANTS = {
    "M 0": dict(memory_segments=0, **DOUBLE),
    "M 1, GQA, gated": dict(
        num_heads=4, num_kv_heads=2, head_dim=4, memory=Fam(2, update="gated"), **DOUBLE
    ),
    "M 3, N 0": dict(memory_segments=3, memory=Memory(), **DOUBLE),
    "M 2, MQA, window mask": dict(memory_segments=2, num_kv_heads=1, window_mask=True, **DOUBLE),
    "float32": {},
    **{name: dict(memory=memory, **DOUBLE) for name, memory in MEMORIES.items()},
}


@functools.cache
def streamer(name="float32") -> Streamer:
    return Streamer(Decoder(config(**VARIANTS[name])))


def setting(name="float32"):
    c = config(**VARIANTS[name])
    # Flatter logits than random parameters give, so that sampling has something to choose from.
    params = random_params(c)
    return c, {**params, "embedding": params["embedding"] / 2}


def write(name, lengths, sampling, **kwargs):
    """What follows random prompts of these lengths: `(prompts, Generation on the host)`."""
    c, params = setting(name)
    prompts = random_tokens(len(lengths), max(lengths))
    with precision(c):
        reader = streamer(name)
        state = reader.initial_state(params, len(lengths))
        logits, state = reader.read(params, state, prompts, np.asarray(lengths))
        out = reader.generate(params, logits, state, sampling, **kwargs)
        return prompts, jax.device_get(out)


def at_once(name, prompts, lengths, out):
    """Prompts and outputs read at once, a row for each output: `[(logits [L, V], state)]`."""
    c, params = setting(name)
    samples = len(out.tokens) // len(prompts)
    texts = [
        np.concatenate([prompts[i // samples][: lengths[i // samples]], out.tokens[i][:n]])
        for i, n in enumerate(out.lengths)
    ]
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    valid = np.arange(tokens.shape[1]) < np.array([[len(text)] for text in texts])
    logits, state = jax.device_get(read(c, params, tokens, valid=valid))
    return [(logits[i, : len(text)], of_row(state, i)) for i, text in enumerate(texts)]


def of_row(state, row):
    return state.map_examples(lambda a, axis: np.take(a, [row], axis=axis))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", VARIANTS)
def test_hundreds_of_tokens_equal_the_parallel_forward_pass(name):
    """Prompts of different lengths: each example is at its own place in its block."""
    lengths = [1, S - 1, S, 2 * S + 1, 3 * S + 3]
    prompts, out = write(name, lengths, Sampling(200))
    assert out.lengths.tolist() == [200] * 5
    tolerance = 1e-9 if name != "float32" else 1e-3
    for row, (logits, state) in enumerate(at_once(name, prompts, lengths, out)):
        foretold = logits[-201:-1]
        if name != "float32":  # float32 may differ where two tokens are equally likely
            np.testing.assert_array_equal(foretold.argmax(-1), out.tokens[row])
        log_p = foretold - np.log(np.exp(foretold).sum(-1, keepdims=True))
        expected = np.take_along_axis(log_p, out.tokens[row][:, None], axis=1).sum()
        np.testing.assert_allclose(out.log_likelihood[row], expected, rtol=1e-4)
        assert_close(out.logits[row], logits[-1], tolerance)
        assert_close(of_row(out.state, row), state, tolerance)


def test_sampled_examples_go_on_exactly_from_what_they_wrote():
    sampling = Sampling(50, temperature=1.5, stop_tokens=(3, 7))
    lengths = [2, 5, 9]
    prompts, out = write("M 0", lengths, sampling, samples=3)
    assert len(set(map(bytes, out.tokens))) > 6 and len(set(out.lengths)) > 2
    for row, (logits, state) in enumerate(at_once("M 0", prompts, lengths, out)):
        assert_close(out.logits[row], logits[-1], 1e-9)
        assert_close(of_row(out.state, row), state, 1e-9)
        end = out.lengths[row]
        assert not np.isin(out.tokens[row][: end - 1], (3, 7)).any()
        assert end == 50 or out.tokens[row][end - 1] in (3, 7)
        assert not out.tokens[row][end:].any()


def test_an_example_does_not_depend_on_its_neighbours():
    sampling = Sampling(30, temperature=1.0, stop_tokens=(5,))
    together = write("M 0", [2, 5, 9], sampling, seeds=[11, 22, 33])[1]
    c, params = setting("M 0")
    prompts = random_tokens(3, 9)
    with precision(c):
        reader = streamer("M 0")
        for row, (length, seed) in enumerate(zip([2, 5, 9], [11, 22, 33])):
            state = reader.initial_state(params, 1)
            prompt = prompts[row : row + 1]
            logits, state = reader.read(params, state, prompt, np.array([length]))
            alone = jax.device_get(reader.generate(params, logits, state, sampling, seeds=[seed]))
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_other_seeds_draw_other_tokens_and_greedy_needs_none():
    sampling = Sampling(30, temperature=1.0)
    first, again, other = (write("M 0", [4], sampling, seeds=[s])[1].tokens for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    greedy = [write("M 0", [4], Sampling(30), seeds=[s])[1].tokens for s in (1, 2)]
    assert (greedy[0] == greedy[1]).all()


def test_room_limits_each_example():
    c, params = setting("M 0")
    with precision(c):
        reader = streamer("M 0")
        logits, state = reader.read(params, reader.initial_state(params, 3), random_tokens(3, 6))
        run = jax.jit(lambda p, l, s, r: generate(reader.module, p, l, s, Sampling(9), room=r))
        out = jax.device_get(run(params, logits, state, np.array([0, 4, 99])))
    assert out.lengths.tolist() == [0, 4, 9]
    assert out.state.position.tolist() == [6, 10, 15]
    assert not out.tokens[0].any() and out.log_likelihood[0] == 0


def test_nothing_is_compiled_again():
    c, params = setting()
    reader = Streamer(Decoder(c))
    for length in (3, 4, 11):
        logits, state = reader.read(params, reader.initial_state(params, 2), random_tokens(2, length))
        for seed in (0, 1):
            out = reader.generate(params, logits, state, Sampling(20, 1.0), seeds=[seed, 5])
            logits, state = out.logits, out.state
    assert reader._write._cache_size() == 1


def test_the_state_is_given_away():
    c, params = setting()
    reader = streamer()
    logits, state = reader.read(params, reader.initial_state(params, 2), random_tokens(2, 3))
    reader.generate(params, logits, state, Sampling(2))
    assert state.memory.is_deleted()


# Sampling.


def allowed(logits, top_k, top_p):
    """Ids that may be drawn from one row, found by a plain loop."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    kept, total = [], 0.0
    for i, probability in zip(order, p):
        if kept and total >= top_p:
            break
        kept.append(i)
        total += probability
    return sorted(kept)


@settings(max_examples=50)
@given(
    st.lists(st.integers(-8, 8), min_size=7, max_size=7),
    st.none() | st.integers(1, 10),
    st.sampled_from([0.05, 0.3, 0.62, 0.9, 1.0]),
)
def test_only_the_likeliest_tokens_stay(logits, top_k, top_p):
    row = np.array(logits, np.float64) / 3
    got = restrict(jnp.asarray(row, jnp.float32)[None], top_k, top_p)[0]
    assert np.flatnonzero(np.isfinite(got)).tolist() == allowed(row, top_k, top_p)
    kept = np.isfinite(got)
    np.testing.assert_allclose(got[kept], row[kept], rtol=1e-6)


def test_draws_follow_the_restricted_distribution():
    row = np.log(np.array([0.4, 0.1, 0.3, 0.15, 0.05]))
    sampling = Sampling(1, temperature=2.0, top_k=4, top_p=0.9)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, 5))
    draw = jax.jit(lambda logits, keys: choose(logits, sampling, keys))
    drawn = np.bincount(np.asarray(draw(logits, keys)), minlength=5)
    expected = np.exp(row / 2)
    expected[[i for i in range(5) if i not in allowed(row / 2, 4, 0.9)]] = 0
    expected = expected / expected.sum() * count
    assert drawn[expected == 0].sum() == 0
    assert stats.chisquare(drawn[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(max_new_tokens=0), "Sampling.max_new_tokens must be a whole number of at least 1"),
        (dict(temperature=-1.0), "Sampling.temperature must be a number of at least 0"),
        (dict(top_k=0), "Sampling.top_k must be a whole number of at least 1 or None"),
        (dict(top_p=0.0), "Sampling.top_p must be a number above 0 and at most 1, not 0"),
        (dict(top_p=1.5), "Sampling.top_p must be a number above 0 and at most 1, not 1"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**changes)


def test_positions_end():
    c, params = setting()
    state = streamer().initial_state(params, 1)
    old = state.replace(position=state.position + (2**31 - 10))
    with pytest.raises(ValueError, match="and positions end at 2,147,483,647: begin from a new state"):
        streamer().generate(params, jnp.zeros((1, VOCAB)), old, Sampling(10))


def test_sampling_needs_keys_and_at_least_one_sample():
    c, params = setting()
    reader = streamer()
    logits, state = jnp.zeros((1, VOCAB)), reader.initial_state(params, 1)
    with pytest.raises(ValueError, match="needs a random key for each example"):
        generate(reader.module, params, logits, state, Sampling(2, temperature=1.0))
    with pytest.raises(ValueError, match="at least one sample per prompt, not 0"):
        reader.generate(params, logits, state, Sampling(2), samples=0)
