"""TPU slice names of Google Cloud, such as v5p-128, and the chip grids that they denote."""

import dataclasses
import math
import re

from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest

_CUBE = 64  # chips: three-dimensional slices from this size on are built from 4 x 4 x 4 cubes
_SMALL = (8, 16, 32, 64)  # sizes, in cores, of the slices smaller than a cube


@dataclasses.dataclass(frozen=True)
class _Family:
    """A TPU generation.

    Attributes:
      sizes: sizes that an accelerator name may end in: cores for v2 to v5p, chips for the others.
      cores: units of such a size per chip: 2 where it counts cores, 1 where it counts chips.
      dimensions: number of dimensions of the chip grid, 2 or 3.
      host: chips of the largest slice that one host has.
      compiler: name of the family in topologies of famx.compile; '' if it cannot compile for it.
      runtime: default TPU software version of the workers.
    """

    sizes: tuple[int, ...]
    cores: int
    dimensions: int
    host: int
    compiler: str
    runtime: str = "tpu-ubuntu2204-base"


def _cubes(largest: int) -> tuple[int, ...]:
    """Sizes, in cores, of a family with a three-dimensional grid."""
    return (*_SMALL, *range(2 * _CUBE, largest + 1, 2 * _CUBE))


_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)
FAMILIES = {
    "v2": _Family((8, 32, 128, 256, 512), 2, 2, 4, ""),
    "v3": _Family((8, 32, 64, 128, 256, 512, 1024, 2048), 2, 2, 4, ""),
    "v4": _Family(_cubes(8192), 2, 3, 4, "v4"),
    "v5litepod": _Family(_FLAT, 1, 2, 8, "v5e", "v2-alpha-tpuv5-lite"),
    "v5p": _Family(_cubes(12288), 2, 3, 4, "v5p", "v2-alpha-tpuv5"),
    "v6e": _Family(_FLAT, 1, 2, 8, "v6e", "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: its family and the default grid of chips for its size."""

    family: str
    grid: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.grid)

    @property
    def of_one_host(self) -> bool:
        """Whether one host has all chips."""
        return self.chips <= FAMILIES[self.family].host

    @property
    def topology(self) -> str:
        """Topology name for famx.compile, such as v5p:4x4x4; '' if it cannot compile for the family."""
        name = FAMILIES[self.family].compiler
        return f"{name}:{'x'.join(map(str, self.grid))}" if name else ""

    @property
    def runtime(self) -> str:
        """Default TPU software version of the workers."""
        return FAMILIES[self.family].runtime


def parse(accelerator: str) -> Slice:
    """Parses an accelerator name.

    >>> parse("v5p-128")
    Slice(family='v5p', grid=(4, 4, 4))
    >>> parse("v5litepod-32").topology
    'v5e:4x8'

    Raises:
      ConfigError: the family is unknown, or has no slice of that size.
    """
    name, _, size = accelerator.partition("-")
    family = FAMILIES.get(name)
    if family is None:
        hint = nearest(name, FAMILIES) or f" Known families are {', '.join(FAMILIES)}."
        raise ConfigError(f"Unknown accelerator {accelerator!r}.{hint}")
    if not re.fullmatch(r"[0-9]{1,5}", size) or int(size) not in family.sizes:
        known = ", ".join(map(str, family.sizes))
        if family.dimensions == 3:
            known = f"{', '.join(map(str, _SMALL))} and multiples of {2 * _CUBE} up to {family.sizes[-1]}"
        raise ConfigError(f"Unknown accelerator {accelerator!r}: sizes of {name} are {known}.")
    chips = int(size) // family.cores
    return Slice(name, _flat(chips) if family.dimensions == 2 else _cubic(chips))


def _flat(chips: int) -> tuple[int, int]:
    """The most nearly square grid; `chips` is a power of two."""
    rows = 1 << (chips.bit_length() - 1) // 2
    return rows, chips // rows


def _cubic(chips: int) -> tuple[int, int, int]:
    """Documented grids for slices smaller than a cube, otherwise the most compact box of cubes."""
    if chips < _CUBE:
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    count = chips // _CUBE
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    boxes = [(a, b, count // (a * b)) for a in divisors for b in divisors if count % (a * b) == 0]
    longest, middle, shortest = min(tuple(sorted(box, reverse=True)) for box in boxes)
    return 4 * shortest, 4 * middle, 4 * longest
