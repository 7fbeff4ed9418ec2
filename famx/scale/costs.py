"""Operations, memory traffic and collectives of a compiled program, from its optimised HLO.

All counts are those of one device. Unlike XLA's own cost analysis, which counts a loop body once, every
instruction counts as often as it runs.

Operations: 2 per multiplication of a matrix product, whether the compiler left it a `dot` or turned it
into a `convolution`. Multiplications by the zeros of padding and dilation are excluded, because the
compiler inserts them only to place operands. Custom kernels count with the estimate they carry.

Main memory traffic: what each instruction reads from and writes to main memory. Arrays that the compiler
placed on the chip are free. A fusion reads each parameter once. Where an array is only sliced or updated
in place, only the slice counts.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator

from famx.scale.collectives import COLLECTIVES, Collective, between_slices, collective
from famx.scale.hlo import Array, Computation, Instruction, Module

_FREE = {  # opcodes without memory traffic
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "domain"),
    *("copy-done", "slice-done", "async-done", "async-update", "rng-get-and-update-state"),
}
_FREE_CALLS = {  # targets of custom calls without memory traffic
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"),
    *("AsyncCollectiveStart", "AsyncCollectiveDone", "SPMDFullToShardShape", "SPMDShardToFullShape"),
}


@dataclasses.dataclass
class Region:
    """The body of a loop, or the whole program, excluding the loops inside it.

    Attributes:
      name: name of the loop in the program.
      trips: number of runs per run of the enclosing region; None if unknown, which counts as one.
      work: (operations, bytes) of each instruction, in execution order.
      moved: bytes read and written by asynchronous copies, which overlap with the computation.
      collectives: number of runs of each collective.
      beside: each collective that a GPU starts and waits for later, with the work in between.
      products: operations by source operation.
      traffic: main memory traffic by instruction.
      kernels: number of kernels and copies that a GPU executes. A call of a library counts as one
        kernel, whatever it launches.
      uncounted: custom kernels whose operations are unknown and therefore not counted.
      inner: the loops inside this region.
    """

    name: str
    trips: int | None = 1
    work: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    moved: float = 0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    beside: list[tuple[Collective, list[tuple[float, float]]]] = dataclasses.field(default_factory=list)
    products: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    traffic: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: int = 0
    uncounted: set[str] = dataclasses.field(default_factory=set)
    inner: list["Region"] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """Operations of one run, without inner loops."""
        return sum(flops for flops, _ in self.work)

    @property
    def bytes(self) -> float:
        """Main memory traffic of one run, without inner loops."""
        return sum(count for _, count in self.work) + self.moved

    def walk(self, runs: int = 1, path: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple, "Region"]]:
        """Yields `(number of runs, names from the outside in, region)` for this region and all inside."""
        runs, path = runs * (self.trips if self.trips is not None else 1), (*path, self.name)
        yield runs, path, self
        for region in self.inner:
            yield from region.walk(runs, path)

    def total(self, name: str) -> float:
        """Total of `name`, "flops", "bytes" or "kernels", over all runs of all loops."""
        return sum(runs * getattr(region, name) for runs, _, region in self.walk())

    def all_collectives(self) -> collections.Counter:
        """Number of runs of each collective over all loops."""
        totals = collections.Counter()
        for runs, _, region in self.walk():
            for exchange, count in region.collectives.items():
                totals[exchange] += runs * count
        return totals


def count(module: Module, kernels: Callable = lambda instruction, operands: None) -> Region:
    """Counts what one run of a program executes.

    Args:
      module: the parsed program.
      kernels: function of a custom call and the arrays of its operands that returns its number of
        operations, or None for an unknown kernel.

    Returns:
      The whole program as a region.
    """
    return _Walk(module, kernels).region(module.entry, "program", 1)


class _Walk:
    """Walks the computations of a module and adds up costs by region."""

    def __init__(self, module: Module, kernels: Callable):
        self.module, self.kernels = module, kernels
        # Work beside each collective that has started and not ended, by the name of its start.
        self.running: dict[str, list[tuple[float, float]]] = {}

    def region(self, computation: str, name: str, trips: int | None) -> Region:
        region = Region(name, trips)
        outside, self.running = self.running, {}
        self._add(region, self.module.computations[computation], set())
        self.running = outside
        self._beside((region.total("flops"), region.total("bytes")))
        return region

    def _beside(self, work: tuple[float, float]) -> None:
        """Adds work beside the running collectives, an equal part to each, since they share the links."""
        flops, moved = (amount / max(len(self.running), 1) for amount in work)
        for others in self.running.values():
            if any(work):
                others.append((flops, moved))

    def _add(self, region: Region, computation: Computation, seen: set, fused: bool = False) -> None:
        for instruction in computation.instructions.values():
            self._instruction(region, computation, instruction, seen, fused)

    def _instruction(self, region, computation, instruction: Instruction, seen, fused) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            region.inner.append(self._loop(computation, instruction))
            return
        if opcode == "conditional":
            region.inner.append(self._costliest_branch(instruction))
            return
        if opcode == "call" or (opcode == "async-start" and not fused):
            called = instruction.called("calls") or instruction.called("to_apply")
            self._add(region, self.module.computations[called], seen)
            return
        if opcode == "send" and (network_collective := between_slices(computation, instruction)):
            region.collectives[network_collective] += 1
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = instruction.attribute(r"channel_id=(\d+)")
            # A collective fused with concurrent computation appears as several instructions, which
            # share a channel: count it once. Outside of fusions, different ones may share a channel.
            if not fused or channel is None or (kind, channel) not in seen:
                seen.add((kind, channel))
                exchange = collective(instruction, kind)
                alone = exchange.groups and exchange.size == 1  # a sum over an axis of one device
                region.collectives.update({} if alone else {exchange: 1})
            if fused:
                return
            if opcode.endswith("-start"):
                self.running[instruction.name] = []
                region.beside.append((collective(instruction, kind), self.running[instruction.name]))
        elif opcode.endswith("-done") and instruction.operands:
            self.running.pop(instruction.operands[0], None)
        flops = self._flops(region, computation, instruction)
        if opcode == "fusion":
            inside = self.module.computations[instruction.called("calls")]
            flops += self._fused(region, inside, seen)
        if fused:
            region.work.append((flops, 0.0))
            return
        region.kernels += _is_kernel(instruction)
        moved = self._bytes(computation, instruction)
        region.traffic[opcode + " " + _label(instruction)] += moved
        if opcode in ("copy-start", "slice-start"):
            region.moved += moved
        else:
            region.work.append((flops, moved))
            if kind not in COLLECTIVES:
                self._beside((flops, moved))

    def _fused(self, region, computation, seen) -> float:
        """Operations inside a fusion. Its collectives, products and kernels are added to the region."""
        fusion = Region("fusion")
        self._add(fusion, computation, seen, fused=True)
        region.collectives += fusion.collectives
        region.products += fusion.products
        region.uncounted |= fusion.uncounted
        return fusion.flops

    def _loop(self, computation, instruction: Instruction) -> Region:
        trips = self.module.trip_count(instruction, computation)
        body = self.region(instruction.called("body"), _label(instruction), trips)
        if not instruction.attribute(r'"(known_trip_count)"'):  # otherwise a GPU skips the condition
            condition = self.module.computations[instruction.called("condition")]
            body.kernels += sum(map(_is_kernel, condition.instructions.values()))
        return body

    def _costliest_branch(self, instruction: Instruction) -> Region:
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
        if _is_free(instruction):
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
            in_main_memory = operands[0][0].space == 0
            return result + (instruction.arrays[0].bytes if in_main_memory else 0)
        if opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
            return _bytes(update) + (update[0].bytes if instruction.arrays[0].space == 0 else 0)
        if opcode in ("send", "recv"):  # the result of a send repeats its operand
            return sum(map(_bytes, operands)) if opcode == "send" else result
        if opcode.endswith("-start"):  # the result repeats the operands
            return sum(map(_bytes, operands)) + max(result - sum(map(_bytes, operands)), 0)
        return result + sum(map(_bytes, operands))

    def _fusion_bytes(self, instruction, operands) -> float:
        inside = self.module.computations[instruction.called("calls")]
        if any(i.opcode in COLLECTIVES for i in inside.instructions.values()):
            # The parts of a collective pass its arrays along; count them at the start only.
            start = any(_target(i) == "AsyncCollectiveStart" for i in inside.instructions.values())
            done = any(_target(i) == "AsyncCollectiveDone" for i in inside.instructions.values())
            return _bytes(instruction.arrays[:2]) if start else 0 if done else self._concurrent(inside)
        written = _written(inside)
        total = sum(
            _bytes_read(self.module, inside, parameter, arrays[0])
            for parameter, arrays in zip(inside.parameters, operands)
            if len(arrays) == 1 and arrays[0].space == 0
        )
        return total + sum(
            written[root].bytes if root in written else array.bytes
            for root, array in zip(_roots(inside), instruction.arrays)
            if array.space == 0
        )

    def _concurrent(self, inside) -> float:
        """Bytes of a computation fused with a part of a collective, without the collective's arrays."""
        passed_along = set()
        for i in inside.instructions.values():
            if i.opcode in COLLECTIVES:
                passed_along |= {i.name, *i.operands}
        parameters = [p for p in inside.parameters if p.name not in passed_along]
        roots = [inside.instructions[name] for name in _roots(inside)]
        results = [r for r in roots if r.opcode != "parameter" and r.name not in passed_along]
        used = [p for p in parameters if any(u.opcode != "tuple" for u in inside.users[p.name])]
        return sum(_bytes(i.arrays) for i in used + results)


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
    """Values of a field of a convolution's window, one per spatial axis."""
    match = re.search(rf"\b{name}=(\S+)", window)
    return match[1].split("x") if match else [default] * count


@functools.cache
def _pairs(size, kernel, outputs, stride, pad, hole, dilation) -> int:
    """Number of (output, kernel element) pairs along an axis that meet an input element.

    Pairs that meet padding, or a zero inserted by the dilation `hole` of the input, are not counted.
    """
    pairs = 0
    for out in range(outputs):
        for k in range(kernel):
            place = out * stride + k * dilation - pad
            pairs += place >= 0 and place % hole == 0 and place // hole < size
    return pairs


def _call_flops(region, computation, instruction) -> float:
    """Operations of a custom call: its own estimate, or those of a library's matrix product."""
    target = _target(instruction)
    estimate = instruction.attribute(r'"cost_estimate":(\{[^}]*\})')
    if estimate:
        return float(json.loads(estimate).get("flops", 0))
    axes = instruction.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
    if target.startswith("__cublas") and axes is not None:
        left = _arrays_of(computation, instruction.operands[0])[0]
        summed = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", axes))
        return 2.0 * instruction.arrays[0].size * summed
    if target == "tpu_custom_call" or target.startswith(("__cudnn", "__onednn", "triton", "__gpu")):
        region.uncounted.add(target)
    return 0.0


# ---------------------------------------------------------------- bytes of fusions


def _roots(inside: Computation) -> list[str]:
    root = inside.root
    return list(root.operands) if root.opcode == "tuple" else [root.name]


def _written(inside: Computation) -> dict[str, Array]:
    """The part that is written of each root that is updated in place: `{name of the root: array}`."""
    written = {}
    for name in _roots(inside):
        instruction = inside.instructions[name]
        while instruction.opcode == "bitcast":
            instruction = inside.instructions[instruction.operands[0]]
        if instruction.opcode == "dynamic-update-slice":
            written[name] = inside.instructions[instruction.operands[1]].arrays[0]
        elif instruction.opcode == "scatter":
            written[name] = inside.instructions[instruction.operands[-1]].arrays[0]
    return written


def _bytes_read(module: Module, inside: Computation, parameter: Instruction, array: Array) -> float:
    """Bytes of a parameter that a fusion reads, of which a part may be in fusions of its own."""
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
                continue  # updated in place: the rest of the array is not touched
            elif user.opcode == "tuple":
                continue
            elif user.opcode == "fusion":
                nested = module.computations[user.called("calls")]
                for operand, of_nested in zip(user.operands, nested.parameters):
                    if operand == name:
                        total += _bytes_read(module, nested, of_nested, array)
            else:
                return array.bytes
    return min(total, array.bytes)


def _bytes(arrays) -> float:
    """Bytes of the arrays that are in main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _slice_start(instruction, operands) -> float:
    """Main memory traffic of an asynchronous slice."""
    part = instruction.arrays[len(operands[0])]
    return sum(part.bytes for array in (operands[0][0], part) if array.space == 0)


def _is_free(instruction: Instruction) -> bool:
    """Whether an instruction moves nothing."""
    opcode = instruction.opcode
    if opcode == "custom-call":
        return _target(instruction) in _FREE_CALLS
    return opcode in _FREE or opcode.endswith("-done")


def _is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction that is not fused is a kernel or a copy on a GPU."""
    return not _is_free(instruction) and instruction.opcode not in ("while", "conditional", "call")


def _arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    return computation.instructions[name].arrays


def _target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"') or ""


def _label(instruction: Instruction) -> str:
    """Name of the JAX operation that an instruction comes from, or the instruction's own."""
    return instruction.attribute(r'op_name="([^"]*)"') or instruction.name
