"""Learning-rate schedules against closed forms."""

import math

import gin
import jax
import numpy as np
import pytest
import rounding
from hypothesis import given
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.training import schedules

RATE = 3e-3


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_constant():
    np.testing.assert_allclose(values(schedules.constant_rate(RATE), [0, 1, 10**6]), RATE)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant_rate(RATE, warmup_steps=4),
        schedules.warmup_cosine(RATE, steps=100, warmup_steps=4),
        schedules.warmup_rsqrt(RATE, warmup_steps=4),
        schedules.warmup_stable_decay(RATE, steps=100, decay_steps=10, warmup_steps=4),
    ],
)
def test_warmup_is_a_line_that_never_is_zero(schedule):
    want = [RATE * k / 5 for k in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(values(schedule, range(5)), want, rtol=1e-6)
    assert jax.jit(schedule)(np.int32(2)) == pytest.approx(want[2], rel=1e-6)


def test_cosine():
    schedule = schedules.warmup_cosine(RATE, steps=110, warmup_steps=10, floor=1e-3)
    want = [RATE, 1e-3 + 2e-3 * 0.5 * (1 + math.cos(math.pi / 4)), 2e-3, 1e-3, 1e-3]
    np.testing.assert_allclose(values(schedule, [10, 35, 60, 110, 500]), want, rtol=1e-5)


def test_rsqrt():
    schedule = schedules.warmup_rsqrt(RATE, warmup_steps=100)
    np.testing.assert_allclose(
        values(schedule, [100, 400, 10_000]), [RATE, RATE / 2, RATE / 10], rtol=1e-6
    )


def test_stable_then_a_line_to_the_floor():
    schedule = schedules.warmup_stable_decay(RATE, steps=100, decay_steps=20, floor=1e-3)
    want = [RATE, RATE, RATE, 2e-3, 1e-3, 1e-3]
    np.testing.assert_allclose(values(schedule, [0, 50, 80, 90, 100, 1000]), want, rtol=1e-5)


@given(warmup=st.integers(0, 50), decay=st.integers(1, 50), floor=st.floats(0, RATE))
def test_decays_stay_between_floor_and_rate(warmup, decay, floor):
    total = warmup + decay + 5
    for schedule in (
        schedules.warmup_cosine(RATE, total, warmup, floor),
        schedules.warmup_stable_decay(RATE, total, decay, warmup, floor),
    ):
        after = np.asarray(schedule(np.arange(110)))[warmup : total + 2]
        near = rounding.bound(5, RATE)  # a cosine or a quotient, scaled and moved
        assert (np.diff(after) <= near).all()
        assert after.min() >= floor - near and after.max() <= RATE + near
        assert after[0] == pytest.approx(RATE, rel=1e-5)
        assert after[-1] == pytest.approx(floor, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: schedules.constant_rate(0.0), "learning_rate must be a number above 0, not 0.0"),
        (lambda: schedules.constant_rate(1.0, -1), "warmup_steps must be a whole number of at least 0,"),
        (lambda: schedules.warmup_cosine(1.0, 10, 10), "larger than warmup_steps"),
        (lambda: schedules.warmup_cosine(1.0, 10, floor=2.0), "floor must be at most learning_rate"),
        (lambda: schedules.warmup_rsqrt(1.0, 0), "at least 1"),
        (lambda: schedules.warmup_stable_decay(1.0, 10, 11), "decay_steps must be at most steps -"),
    ],
)
def test_bad_settings(build, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build()


def test_by_name_in_gin():
    for name in ("constant_rate", "warmup_cosine", "warmup_rsqrt", "warmup_stable_decay"):
        assert gin.get_configurable(name)
