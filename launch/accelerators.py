"""Names of TPU slices, as Google Cloud gives them, and the grids of chips behind the names."""

import dataclasses
import math
import re

from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest

_CUBE = 64  # chips: larger slices of three dimensions are made of cubes of 4 x 4 x 4
_SMALL = (8, 16, 32, 64)  # cores of the slices below a cube


@dataclasses.dataclass(frozen=True)
class _Family:
    """A generation of TPU.

    Attributes:
      sizes: that an accelerator's name can end in: cores where a chip has two, otherwise chips.
      cores: of a chip that the name counts.
      dimensions: of a slice.
      compiler: what famx.compile calls the family; '': it does not compile for it.
      runtime: version of the software on the workers.
    """

    sizes: tuple[int, ...]
    cores: int
    dimensions: int
    compiler: str
    runtime: str = "tpu-ubuntu2204-base"


def _cubes(most: int) -> tuple[int, ...]:
    return (*_SMALL, *range(2 * _CUBE, most + 1, 2 * _CUBE))


_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)
FAMILIES = {
    "v2": _Family((8, 32, 128, 256, 512), 2, 2, ""),
    "v3": _Family((8, 32, 64, 128, 256, 512, 1024, 2048), 2, 2, ""),
    "v4": _Family(_cubes(8192), 2, 3, "v4"),
    "v5litepod": _Family(_FLAT, 1, 2, "v5e", "v2-alpha-tpuv5-lite"),
    "v5p": _Family(_cubes(12288), 2, 3, "v5p", "v2-alpha-tpuv5"),
    "v6e": _Family(_FLAT, 1, 2, "v6e", "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU: its family, and its grid of chips as it is given if nobody asks for another."""

    family: str
    grid: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.grid)

    @property
    def topology(self) -> str:
        """The name by which famx.compile knows the slice, such as v5p:4x4x4; '': it does not."""
        name = FAMILIES[self.family].compiler
        return f"{name}:{'x'.join(map(str, self.grid))}" if name else ""

    @property
    def runtime(self) -> str:
        """Version of the software on the workers."""
        return FAMILIES[self.family].runtime


def parse(accelerator: str) -> Slice:
    """The slice that is called so.

    >>> parse("v5p-128")
    Slice(family='v5p', grid=(4, 4, 4))
    >>> parse("v5litepod-32").topology
    'v5e:4x8'

    Raises ConfigError if there is none.
    """
    name, _, size = accelerator.partition("-")
    family = FAMILIES.get(name)
    if family is None:
        near = nearest(name, FAMILIES) or f" It begins with one of {', '.join(FAMILIES)}."
        raise ConfigError(f"There is no accelerator {accelerator!r}.{near}")
    if not re.fullmatch(r"[0-9]{1,5}", size) or int(size) not in family.sizes:
        known = ", ".join(map(str, family.sizes))
        if family.dimensions == 3:
            known = f"{', '.join(map(str, _SMALL))} and multiples of {2 * _CUBE} to {family.sizes[-1]}"
        raise ConfigError(f"There is no accelerator {accelerator!r}: sizes of {name} are {known}.")
    chips = int(size) // family.cores
    return Slice(name, _flat(chips) if family.dimensions == 2 else _cubic(chips))


def _flat(chips: int) -> tuple[int, int]:
    """The squarest grid of a power of two."""
    first = 1 << (chips.bit_length() - 1) // 2
    return first, chips // first


def _cubic(chips: int) -> tuple[int, int, int]:
    """The smallest slices as they are; above, the cubes in as compact a box as there is."""
    if chips < _CUBE:
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    count = chips // _CUBE
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    boxes = [(a, b, count // (a * b)) for a in divisors for b in divisors if count % (a * b) == 0]
    longest, middle, shortest = min(tuple(sorted(box, reverse=True)) for box in boxes)
    return 4 * shortest, 4 * middle, 4 * longest
