"""Collectives of a compiled program: which devices exchange how many bytes."""

import dataclasses
import math
import re

from famx.scale.hlo import Computation, Instruction

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
DCN = "network "  # prefix of the kinds of collectives between slices (data center network)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the program.

    Attributes:
      kind: one of `COLLECTIVES`, with the prefix `DCN` if it is between slices.
      groups: groups of partition ids that exchange data. For a permutation, its (source, target)
        pairs; for a collective between slices, one group with a number per slice.
      bytes: size on one device of the operand or of the result, whichever is larger.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int

    @property
    def size(self) -> int:
        """Number of partitions per group."""
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that one device sends with a ring algorithm that is optimal in bandwidth."""
        n, kind = self.size, self.kind.removeprefix(DCN)
        if kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return self.bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def collective(instruction: Instruction, kind: str) -> Collective:
    """Parses a collective instruction, or the start of an asynchronous one."""
    if kind == "collective-permute":
        pairs = instruction.attribute(r"source_target_pairs=\{((?:\{[^}]*\},?)*)\}") or ""
        groups = tuple(tuple(map(int, p.split(","))) for p in re.findall(r"\{([^}]+)\}", pairs))
    else:
        groups = _groups(instruction.attributes)
    sizes = [array.bytes for array in instruction.arrays if array.space != 2]
    n = len(instruction.operands)
    if instruction.opcode.endswith("-start") and len(sizes) >= 2 * n:  # (operands, results, ...)
        return Collective(kind, groups, max(sum(sizes[:n]), sum(sizes[n : 2 * n])))
    results = sum(sizes)
    if kind == "reduce-scatter":
        results *= max(map(len, groups), default=1)
    return Collective(kind, groups, results)


def between_slices(computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective between slices that a `send` to the host belongs to; None if it is another send.

    The hosts of a TPU exchange data between slices; the target slices are written as in `{1,2}x{0:3}`.
    """
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if kind is None:
        return None
    kind = kind.lower().replace("_", "-")
    slices = instruction.attribute(r'_xla_megascale_target="\{([^}]*)\}') or ""
    ends = [list(map(int, part.split(":"))) for part in slices.split(",") if part]
    count = sum(part[-1] - part[0] + 1 for part in ends)
    size = sum(a.bytes for a in computation.instructions[instruction.operands[0]].arrays)
    if kind not in COLLECTIVES:
        kind = "collective-permute"
    return Collective(DCN + kind, (tuple(range(count)),), size * (count if kind == "all-gather" else 1))


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Parses replica groups.

    Notations are `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` and `mesh['a'=2,'b'=2] {'a'}`.
    """
    match = re.search(r"replica_groups=\{((?:\{[^}]*\},?)*)\}", attributes)
    if match:
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([^}]+)\}", match[1]))
    match = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if match:
        numbers = lambda text: tuple(map(int, text.split(",")))
        order = numbers(match[3]) if match[3] else None
        return _cut(_ids(numbers(match[2]), order), numbers(match[1])[-1])
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", attributes)
    if match:
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])]
        inside = re.findall(r"'([^']+)'", match[2])
        names, shape = [name for name, _ in axes], tuple(size for _, size in axes)
        outer = [i for i, name in enumerate(names) if name not in inside]
        order = (*outer, *(names.index(name) for name in inside))
        return _cut(_ids(shape, order), math.prod(shape[names.index(name)] for name in inside))
    return ()


def _ids(shape, order=None) -> list[int]:
    """Ids 0, 1, ... of an array of `shape`, transposed to `order` and flattened."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    ids = [0]
    for axis in order or range(len(shape)):
        ids = [i + j * strides[axis] for i in ids for j in range(shape[axis])]
    return ids


def _cut(ids, size):
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))
