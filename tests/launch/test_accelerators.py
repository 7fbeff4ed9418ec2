"""Slices by their names: the grids that Google Cloud's documentation gives for them."""

import doctest

import pytest

from famx.base.errors import ConfigError
from launch import accelerators

DOCUMENTED = {
    "v2-8": (2, 2), "v3-32": (4, 4), "v3-1024": (16, 32),
    "v4-8": (2, 2, 1), "v4-32": (2, 2, 4), "v4-128": (4, 4, 4), "v4-1536": (8, 8, 12),
    "v4-4096": (8, 16, 16),
    "v5litepod-1": (1, 1), "v5litepod-8": (2, 4), "v5litepod-32": (4, 8), "v5litepod-256": (16, 16),
    "v5p-16": (2, 2, 2), "v5p-64": (2, 4, 4), "v5p-256": (4, 4, 8), "v5p-384": (4, 4, 12),
    "v5p-1024": (8, 8, 8), "v5p-1280": (4, 8, 20), "v5p-2304": (8, 12, 12), "v5p-5120": (8, 16, 20),
    "v5p-6912": (12, 12, 24), "v5p-12288": (16, 16, 24),
    "v6e-4": (2, 2), "v6e-64": (8, 8), "v6e-128": (8, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_slice_has_the_documented_grid(name):
    assert accelerators.parse(name).grid == DOCUMENTED[name]


@pytest.mark.parametrize("name", accelerators.FAMILIES)
def test_every_size_has_a_grid_of_as_many_chips(name):
    family = accelerators.FAMILIES[name]
    for size in family.sizes:
        found = accelerators.parse(f"{name}-{size}")
        assert found.chips * family.cores == size and len(found.grid) == family.dimensions
        assert bool(found.topology) == (name not in ("v2", "v3"))


@pytest.mark.parametrize("name", ["v4-24", "v5p-96", "v5p-100", "v5p-12416"])
def test_sizes_that_cannot_be_had_are_told_from_those_that_can(name):
    with pytest.raises(ConfigError, match=r"are 8, 16, 32, 64 and multiples of 128 up to \d+\.$"):
        accelerators.parse(name)


def test_the_examples():
    assert doctest.testmod(accelerators).attempted == 2 and not doctest.testmod(accelerators).failed
