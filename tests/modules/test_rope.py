"""Rotary positions: exact at any position, and what an offset does."""

import jax
import numpy as np
import oracle
import pytest
import rounding
from helpers import assert_close, config, difference, initial, random_params, random_tokens, read
from hypothesis import given
from hypothesis import strategies as st

from famx.memories import Fam
from famx.modules import RopeScaling, rope

HEAD_DIM = 8
FREQUENCY = rope.frequencies(HEAD_DIM, 10_000.0)
TOKEN = rope.fixed_point(FREQUENCY)


@jax.jit
def scores(q, k, q_position, k_position):
    turn = lambda x, p: rope.rotate(x, rope.angles(p, TOKEN))
    return turn(q, q_position)[:, 0] @ turn(k, k_position)[:, 0].T


def random_heads(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 5, 1, HEAD_DIM)).astype(np.float32)


@given(st.integers(0, 2**30), st.integers(-4096, 4096))
def test_a_score_depends_on_the_distance_alone(position, distance):
    q, k = random_heads()
    at = lambda p: np.full((5,), p, np.int32)
    here = scores(q, k, at(position), at(position + distance))
    size = (np.abs(q[:, 0]) @ np.abs(k[:, 0]).T).max()
    near = rounding.bound(HEAD_DIM + 4, np.pi * size)  # an angle of up to pi, then the product
    np.testing.assert_allclose(here, scores(q, k, at(0), at(distance)), atol=near)
    turn = lambda x, p: oracle.rotate(x[:, 0].astype(np.float64), p, FREQUENCY)
    near += abs(distance) * np.pi * 2.0**-32 * size  # frequencies are rounded to 2^-33 turns
    np.testing.assert_allclose(here, turn(q, 0) @ turn(k, distance).T, atol=near)


@pytest.mark.parametrize("position", [0, 1, -64, 4096, 100_000])
def test_angles_are_those_of_float64(position):
    angle = rope.angles(np.array([position], np.int32), TOKEN)[0]
    assert angle.dtype == np.float32
    exact = position * FREQUENCY
    allowed = 1e-6 + abs(position) * np.pi * 2.0**-32  # frequencies are rounded to 2^-33 turns
    assert np.abs(np.exp(1j * np.asarray(angle, np.float64)) - np.exp(1j * exact)).max() <= allowed
    assert np.abs(angle).max() <= np.pi * (1 + 1e-6)


def test_a_fraction_lies_between_two_positions():
    fraction = np.array([0.0, 0.25, 0.5, 0.75])
    beyond = rope.fixed_point(fraction[:, None] * FREQUENCY)
    angle = rope.angles(np.full((3, 4), 7, np.int32), TOKEN, beyond)
    assert angle.shape == (3, 4, HEAD_DIM // 2)
    exact = np.exp(1j * (7 + fraction)[:, None] * FREQUENCY)
    np.testing.assert_allclose(np.exp(1j * np.asarray(angle[1])), exact, atol=1e-6)


def test_rotation_keeps_norms_and_dtype():
    x = random_heads()
    angle = rope.angles(np.arange(5, dtype=np.int32) * 1000, TOKEN)
    for dtype in ("float32", "bfloat16"):
        turned = rope.rotate(jax.numpy.asarray(x, dtype), angle)
        assert turned.dtype == dtype and turned.shape == x.shape
        norms = np.linalg.norm(np.asarray(turned, np.float32), axis=-1)
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=tolerance)
    assert np.abs(np.asarray(rope.rotate(x, angle)) - x)[:, 1:].max() > 0.1


@pytest.mark.parametrize("scaling", [
    None, RopeScaling(4.0), RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 256)
])  # fmt: skip
def test_scaled_frequencies(scaling):
    c = config(head_dim=32, rope_base=5000.0, rope_scaling=scaling)
    got = rope.frequencies(32, 5000.0, scaling)
    np.testing.assert_allclose(got, oracle.frequencies(c), rtol=1e-12)
    plain = 5000.0 ** (-np.arange(16) / 16)
    if scaling is None:
        np.testing.assert_allclose(got, plain, rtol=1e-12)
    elif scaling.original_length is None:
        np.testing.assert_allclose(got, plain / 4, rtol=1e-12)
    else:  # the fastest pair is kept, the slowest is slowed down in full, between it is smooth
        assert got[0] == plain[0] and np.isclose(got[-1], plain[-1] / scaling.factor)
        ratio = got / plain
        assert (np.diff(ratio) <= 0).all() and ((ratio < 1) & (ratio > 1 / scaling.factor)).any()


# Random position offsets.


def change_by_offset(positions, offset):
    c = config(memory=Fam(2, positions=positions))
    params, tokens = random_params(c), random_tokens(2, 17)
    state = initial(c, params, 2)
    plain, _ = read(c, params, tokens, state)
    state = state.replace(offset=np.array([offset, 0], np.int32))
    moved, after = read(c, params, tokens, state)
    np.testing.assert_array_equal(after.offset, [offset, 0])
    assert_close(moved[1], plain[1], 0)  # the other example stays
    return difference(moved[0], plain[0])


@pytest.mark.parametrize("positions", ["last", "float"])
@pytest.mark.parametrize("offset", [1, 62_831])
def test_an_offset_changes_nothing_where_positions_are_relative(positions, offset):
    assert change_by_offset(positions, offset) < 1e-4


def test_an_offset_acts_where_the_memory_stands_at_zero():
    assert change_by_offset("zero", 62_831) > 1e-2
