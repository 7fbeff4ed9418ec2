"""Bounds on rounding hold for sums in any order, and are not far above what happens."""

import numpy as np
import pytest
import rounding
from modules.helpers import config


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_orders_of_a_sum(count, dtype):
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(200):
        terms = rng.standard_normal(count).astype(dtype)
        forth, back = (np.cumsum(x)[-1] for x in (terms, terms[::-1]))
        largest = max(np.abs(np.cumsum(x)).max() for x in (terms, terms[::-1]))
        gaps.append(abs(forth - back) / rounding.bound(count, largest, dtype))
    assert 0.01 < max(gaps) < 1


def test_a_decoder_adds_more_the_deeper_and_the_longer():
    small = rounding.of_decoder(config(), 8)
    assert small < rounding.of_decoder(config(), 12) < 2 * small
    assert small < rounding.of_decoder(config(num_layers=3), 8) < 2 * small
