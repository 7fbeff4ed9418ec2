"""What a compiled program executes on one device, loop by loop, read off its optimised HLO.

XLA's own analysis takes the body of a loop once; here everything counts as often as it runs.

Operations: 2 for each multiplication of a matrix product, whether it was left a `dot` or became a
`convolution`; multiplications with the zeros of padding and dilation, which only place operands, do
not count. Custom kernels count with the estimate that they carry.

Bytes of the main memory: what each instruction reads and writes there. What the compiler placed on
the chip is free; a fusion reads its parameters once; of an array that is only sliced, or is updated
in place, the slice counts.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator

from famx.scale.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
DCN = "network "  # in front of the kinds of collectives between slices
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "domain"),
    *("copy-done", "slice-done", "async-done", "async-update", "rng-get-and-update-state"),
}
_FREE_CALLS = {
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"),
    *("AsyncCollectiveStart", "AsyncCollectiveDone", "SPMDFullToShardShape", "SPMDShardToFullShape"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation as it stands in the program.

    Attributes:
      kind: of `COLLECTIVES`; with `DCN` in front, between slices.
      groups: ids of the partitions that talk to each other; of a permutation, its (from, to) pairs;
        between slices, as many numbers as there are slices.
      bytes: of the array before the operation on one device, or after it if that is larger.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int

    @property
    def size(self) -> int:
        """Partitions of a group."""
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that a device sends where each ring of the group is used both ways at once."""
        n, kind = self.size, self.kind.removeprefix(DCN)
        if kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return self.bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)


@dataclasses.dataclass
class Region:
    """A loop's body, or the program, without the loops inside it.

    Attributes:
      name: what the program calls it.
      trips: how often it runs each time that the region around it runs; None: unknown, counted once.
      work: (operations, bytes) of each instruction, in the order in which they run.
      moved: bytes that copies beside the computation read and write.
      collectives: how many of each.
      products: operations by the name of what they belong to.
      traffic: main memory traffic by instruction.
      kernels: custom kernels without an estimate, whose operations are missing.
      inner: loops in it.
    """

    name: str
    trips: int | None = 1
    work: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    moved: float = 0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    products: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    traffic: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: set[str] = dataclasses.field(default_factory=set)
    inner: list["Region"] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """Operations of one run, inner loops apart."""
        return sum(flops for flops, _ in self.work)

    @property
    def bytes(self) -> float:
        """Main memory traffic of one run, inner loops apart."""
        return sum(count for _, count in self.work) + self.moved

    def walk(self, runs: int = 1, path: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple, "Region"]]:
        """`(how often it runs, names from the outside in, region)`, this one and all inside."""
        runs, path = runs * (self.trips if self.trips is not None else 1), (*path, self.name)
        yield runs, path, self
        for region in self.inner:
            yield from region.walk(runs, path)

    def total(self, name: str) -> float:
        """Of `flops` or `bytes`, over all loops, as often as they run."""
        return sum(runs * getattr(region, name) for runs, _, region in self.walk())

    def all_collectives(self) -> collections.Counter:
        """How often each collective runs, over all loops."""
        found = collections.Counter()
        for runs, _, region in self.walk():
            for collective, count in region.collectives.items():
                found[collective] += runs * count
        return found


def count(module: Module, kernels: Callable = lambda instruction, operands: None) -> Region:
    """What one run of the program executes.

    `kernels(instruction, arrays of its operands)` tells the operations of a custom kernel; None: it
    does not know it.
    """
    return _Walk(module, kernels).region(module.entry, "program", 1)


class _Walk:
    def __init__(self, module: Module, kernels: Callable):
        self.module, self.kernels = module, kernels

    def region(self, computation: str, name: str, trips: int | None) -> Region:
        region = Region(name, trips)
        self._add(region, self.module.computations[computation], set())
        return region

    def _add(self, region: Region, computation: Computation, seen: set, fused: bool = False) -> None:
        for instruction in computation.instructions.values():
            self._instruction(region, computation, instruction, seen, fused)

    def _instruction(self, region, computation, instruction: Instruction, seen, fused) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self.module.trip_count(instruction, computation)
            region.inner.append(self.region(instruction.called("body"), _label(instruction), trips))
            return
        if opcode == "conditional":
            region.inner.append(self._dearest(instruction))
            return
        if opcode == "call" or (opcode == "async-start" and not fused):
            called = instruction.called("calls") or instruction.called("to_apply")
            self._add(region, self.module.computations[called], seen)
            return
        if opcode == "send" and (found := between_slices(computation, instruction)):
            region.collectives[found] += 1
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = instruction.attribute(r"channel_id=(\d+)")
            # Fused with the computation beside it, one operation stands there in several parts.
            if channel is None or channel not in seen:
                seen.add(channel)
                region.collectives[collective(instruction, kind)] += 1
            if fused:
                return
        flops = self._flops(region, computation, instruction)
        if opcode == "fusion":
            inside = self.module.computations[instruction.called("calls")]
            flops += self._fused(region, inside, seen)
        if fused:
            region.work.append((flops, 0.0))
            return
        moved = self._bytes(computation, instruction)
        region.traffic[opcode + " " + _label(instruction)] += moved
        if opcode in ("copy-start", "slice-start"):
            region.moved += moved
        else:
            region.work.append((flops, moved))

    def _fused(self, region, computation, seen) -> float:
        """Operations inside a fusion; its collectives go to the region."""
        own = Region("fusion")
        self._add(own, computation, seen, fused=True)
        region.collectives += own.collectives
        region.products += own.products
        region.kernels |= own.kernels
        return own.flops

    def _dearest(self, instruction: Instruction) -> Region:
        names = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        names = names.split(",") if names else [
            instruction.called("true_computation"), instruction.called("false_computation")
        ]  # fmt: skip
        branches = [self.region(n.strip().lstrip("%"), _label(instruction), 1) for n in names]
        return max(branches, key=lambda branch: (branch.total("flops"), branch.total("bytes")))

    # Operations.

    def _flops(self, region, computation, instruction) -> float:
        if instruction.opcode == "dot":
            flops = _dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            flops = _convolution_flops(computation, instruction)
        elif instruction.opcode == "custom-call":
            operands = [a for name in instruction.operands for a in _arrays_of(computation, name)]
            flops = self.kernels(instruction, operands)
            if flops is None:
                flops = _call_flops(region, computation, instruction)
        else:
            return 0.0
        if flops:
            region.products[_label(instruction)] += flops
        return flops

    # Bytes.

    def _bytes(self, computation, instruction) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        if opcode == "custom-call" and _target(instruction) in _FREE_CALLS:
            return 0
        operands = [_arrays_of(computation, name) for name in instruction.operands]
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        result = _bytes(instruction.arrays)
        if opcode == "copy-start":
            return _bytes(instruction.arrays[:2])
        if opcode == "slice-start":
            return _slice_start(instruction, operands)
        if opcode in ("slice", "dynamic-slice", "gather"):
            read = operands[0][0].space == 0
            return result + (instruction.arrays[0].bytes if read else 0)
        if opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
            return _bytes(update) + (update[0].bytes if instruction.arrays[0].space == 0 else 0)
        if opcode in ("send", "recv"):  # the result of a send is what it sends
            return sum(map(_bytes, operands)) if opcode == "send" else result
        if opcode.endswith("-start"):  # operands stand in the result too
            return sum(map(_bytes, operands)) + max(result - sum(map(_bytes, operands)), 0)
        return result + sum(map(_bytes, operands))

    def _fusion_bytes(self, instruction, operands) -> float:
        inside = self.module.computations[instruction.called("calls")]
        if any(i.opcode in COLLECTIVES for i in inside.instructions.values()):
            # The parts of one operation hand its arrays on; its own bytes are read and written once.
            start = any(_target(i) == "AsyncCollectiveStart" for i in inside.instructions.values())
            done = any(_target(i) == "AsyncCollectiveDone" for i in inside.instructions.values())
            return _bytes(instruction.arrays[:2]) if start else 0 if done else self._beside(inside)
        written = _written(inside)
        total = sum(
            _read(inside, parameter, arrays[0], written)
            for parameter, arrays in zip(inside.parameters, operands)
            if len(arrays) == 1 and arrays[0].space == 0
        )
        return total + sum(
            written[root].bytes if root in written else array.bytes
            for root, array in zip(_roots(inside), instruction.arrays)
            if array.space == 0
        )

    def _beside(self, inside) -> float:
        """Of a computation that runs with a part of a collective: all but what the collective holds."""
        held = set()
        for i in inside.instructions.values():
            if i.opcode in COLLECTIVES:
                held |= {i.name, *i.operands}
        kept = [p for p in inside.parameters if p.name not in held]
        roots = [inside.instructions[name] for name in _roots(inside)]
        made = [r for r in roots if r.opcode != "parameter" and r.name not in held]
        used = [p for p in kept if any(u.opcode != "tuple" for u in inside.users[p.name])]
        return sum(_bytes(i.arrays) for i in used + made)


def collective(instruction: Instruction, kind: str) -> Collective:
    """What a collective instruction, or its start, does."""
    if kind == "collective-permute":
        pairs = instruction.attribute(r"source_target_pairs=\{((?:\{[^}]*\},?)*)\}") or ""
        groups = tuple(tuple(map(int, p.split(","))) for p in re.findall(r"\{([^}]+)\}", pairs))
    else:
        groups = _groups(instruction.attributes)
    sizes = [array.bytes for array in instruction.arrays if array.space != 2]
    if instruction.opcode.endswith("-start"):  # (operands, results, ...)
        size = max(sizes)
    else:
        size = sum(sizes)
    if kind == "reduce-scatter":
        size = sum(sizes) * max(map(len, groups), default=1)
    return Collective(kind, groups, size)


def between_slices(computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that a TPU's hosts do with what is sent to them, such as one of `{1,2}x{0:3}`."""
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if kind is None:
        return None
    kind = kind.lower().replace("_", "-")
    slices = instruction.attribute(r'_xla_megascale_target="\{([^}]*)\}') or ""
    ends = [list(map(int, part.split(":"))) for part in slices.split(",") if part]
    count = sum(part[-1] - part[0] + 1 for part in ends)
    size = sum(a.bytes for a in _arrays_of(computation, instruction.operands[0]))
    if kind not in COLLECTIVES:
        kind = "collective-permute"
    return Collective(DCN + kind, (tuple(range(count)),), size * (count if kind == "all-gather" else 1))


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Of `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'a'}`."""
    found = re.search(r"replica_groups=\{((?:\{[^}]*\},?)*)\}", attributes)
    if found:
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([^}]+)\}", found[1]))
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if found:
        numbers = lambda text: tuple(map(int, text.split(",")))
        order = numbers(found[3]) if found[3] else None
        return _cut(_ids(numbers(found[2]), order), numbers(found[1])[-1])
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", attributes)
    if found:
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])]
        inside = re.findall(r"'([^']+)'", found[2])
        names, shape = [name for name, _ in axes], tuple(size for _, size in axes)
        outer = [i for i, name in enumerate(names) if name not in inside]
        order = (*outer, *(names.index(name) for name in inside))
        return _cut(_ids(shape, order), math.prod(shape[names.index(name)] for name in inside))
    return ()


def _ids(shape, order=None) -> list[int]:
    """0, 1, ... in an array of `shape`, its axes then put into `order`."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    ids = [0]
    for axis in order or range(len(shape)):
        ids = [i + j * strides[axis] for i in ids for j in range(shape[axis])]
    return ids


def _cut(ids, size):
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))


# ---------------------------------------------------------------- operations of matrix products


def _dot_flops(computation, instruction) -> float:
    left = _arrays_of(computation, instruction.operands[0])[0]
    axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    summed = math.prod(left.dims[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * instruction.arrays[0].size * summed


def _convolution_flops(computation, instruction) -> float:
    left, right = (_arrays_of(computation, name)[0] for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    lhs, rhs, out = labels.groups()
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    spatial = sorted(c for c in lhs if c.isdigit())
    field = lambda name, default: _per_axis(window, name, default, len(spatial))
    strides, dilations, holes = field("stride", "1"), field("rhs_dilate", "1"), field("lhs_dilate", "1")
    pads = [tuple(map(int, pad.split("_"))) for pad in field("pad", "0_0")]
    pairs = 1
    for i, axis in enumerate(spatial):
        pairs *= _pairs(
            left.dims[lhs.index(axis)], right.dims[rhs.index(axis)],
            instruction.arrays[0].dims[out.index(axis)],
            int(strides[i]), pads[i][0], int(holes[i]), int(dilations[i]),
        )  # fmt: skip
    batch = instruction.arrays[0].dims[out.index("b")]
    features = instruction.arrays[0].dims[out.index("f")]
    return 2.0 * batch * features * right.dims[rhs.index("i")] * pairs


def _per_axis(window: str, name: str, default: str, count: int) -> list[str]:
    found = re.search(rf"\b{name}=(\S+)", window)
    return found[1].split("x") if found else [default] * count


@functools.cache
def _pairs(size, kernel, outputs, stride, pad, hole, dilation) -> int:
    """Pairs of an output and a kernel element that meet an input, neither padding nor a hole."""
    found = 0
    for out in range(outputs):
        for k in range(kernel):
            place = out * stride + k * dilation - pad
            found += place >= 0 and place % hole == 0 and place // hole < size
    return found


def _call_flops(region, computation, instruction) -> float:
    target = _target(instruction)
    estimate = instruction.attribute(r'"cost_estimate":(\{[^}]*\})')
    if estimate:
        return float(json.loads(estimate).get("flops", 0))
    axes = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if target.startswith("__cublas") and axes is not None:
        left = _arrays_of(computation, instruction.operands[0])[0]
        summed = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", axes))
        return 2.0 * instruction.arrays[0].size * summed
    if target == "tpu_custom_call" or target.startswith(("__cudnn", "__onednn", "triton", "__gpu")):
        region.kernels.add(target)
    return 0.0


# ---------------------------------------------------------------- bytes of fusions


def _roots(inside: Computation) -> list[str]:
    root = inside.root
    return list(root.operands) if root.opcode == "tuple" else [root.name]


def _written(inside: Computation) -> dict[str, Array]:
    """Of each root that is updated in place: the part that is written."""
    found = {}
    for name in _roots(inside):
        instruction = inside.instructions[name]
        while instruction.opcode == "bitcast":
            instruction = inside.instructions[instruction.operands[0]]
        if instruction.opcode == "dynamic-update-slice":
            found[name] = inside.instructions[instruction.operands[1]].arrays[0]
        elif instruction.opcode == "scatter":
            found[name] = inside.instructions[instruction.operands[-1]].arrays[0]
    return found


def _read(inside: Computation, parameter: Instruction, array: Array, written) -> float:
    """Bytes that the fusion reads of a parameter."""
    total = 0
    names = [parameter.name]
    while names:
        name = names.pop()
        for user in inside.users[name]:
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # in place: the rest stays as it is
            elif user.opcode == "tuple":
                continue
            else:
                return array.bytes
    return min(total, array.bytes)


def _bytes(arrays) -> float:
    """That lie in the main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _slice_start(instruction, operands) -> float:
    part = instruction.arrays[len(operands[0])]
    return sum(part.bytes for array in (operands[0][0], part) if array.space == 0)


def _arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    return computation.instructions[name].arrays


def _target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"') or ""


def _label(instruction: Instruction) -> str:
    return instruction.attribute(r'op_name="([^"]*)"') or instruction.name
