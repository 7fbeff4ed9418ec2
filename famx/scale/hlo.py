"""Parser for optimised HLO text: computations, instructions, shapes and trip counts of loops."""

import dataclasses
import functools
import math
import re

from famx.models.cross_entropy import CHUNKS

_BYTES = {"pred": 1, "token": 0, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_NAME = re.compile(r"%?([\w.\-]+)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array shape.

    Attributes:
      dtype: element type as HLO names it, such as "bf16".
      dims: size of each dimension.
      layout: dimensions from minor to major; None for the default layout.
      tile: tile sizes of the most minor dimensions, which are padded to multiples of them.
      space: memory space: 0 is main memory (HBM), others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] | None = None
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes that the array takes in memory, including padding to whole tiles."""
        dims = list(self.dims)
        for index, tile in zip(self.layout or (), reversed(self.tile)):
            dims[index] = -(-dims[index] // tile) * tile
        return math.ceil(math.prod(dims) * _width(self.dtype))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction, `name = shape opcode(operands), attributes`.

    Attributes:
      name, opcode, attributes: as in the text.
      arrays: arrays of the shape; tuples are flattened.
      operands: names of the operands. A constant has its value here, a parameter its number.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern`, searched in the attributes; None if it does not match."""
        match = re.search(pattern, self.attributes)
        return match and match[1]

    def called(self, kind: str) -> str | None:
        """Name of the computation given as attribute `kind`: calls, body, condition or to_apply."""
        return self.attribute(rf"\b{kind}=%?([\w.\-]+)")


@dataclasses.dataclass
class Computation:
    """A computation.

    Attributes:
      name: its name.
      instructions: `{name: instruction}` in execution order.
      root: the instruction whose value the computation returns.
    """

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each value: `{name: [instruction]}`."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, by number."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.operands[0]))


@dataclasses.dataclass
class Module:
    """A compiled program.

    Attributes:
      computations: `{name: computation}`.
      entry: name of the computation that the program starts with.
    """
    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """Number of iterations of a `while` instruction of `computation`; None if it is unknown.

        XLA usually annotates it. Otherwise it follows from the counter if that starts at a constant, is
        increased by a constant and is compared with a constant. The loop over the chunks of the loss,
        which ends with the last token that has a weight, has its largest number in its name.
        """
        largest = re.search(CHUNKS.format(r"(\d+)"), loop.attribute(r'op_name="([^"]*)"') or "")
        if largest:
            return int(largest[1])
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        start = computation.instructions.get(loop.operands[0])
        compare = self._comparison(condition)
        if start is None or compare is None:
            return None
        direction, index, limit = compare
        first = self._start(computation, start, index)
        if isinstance(limit, tuple):
            limit = self._start(computation, start, limit[0])
        step = self._step(body, index)
        if None in (first, limit, step) or step <= 0 or direction not in ("LT", "LE"):
            return None
        return max(-(-(limit - first + (direction == "LE")) // step), 0)

    def _comparison(self, condition: Computation):
        """The loop condition as `(direction, index of the counter in the loop state, limit)`.

        The limit is an integer, or `(index,)` if it is an element of the loop state. None if the
        condition has another form.
        """
        root = condition.root
        inside = root.called("calls") or root.called("to_apply")
        outer = root
        if inside:  # the comparison is inside a fusion or call
            root = self.computations[inside].root
        if root.opcode != "compare":
            return None

        def resolve(name):
            if inside:
                parameter = self.computations[inside].instructions[name]
                if parameter.opcode != "parameter":
                    return _constant(self.computations[inside], name)
                name = outer.operands[int(parameter.operands[0])]
            value = _constant(condition, name)
            return value if value is not None else _element(condition, name)

        left, right = (resolve(name) for name in root.operands)
        direction = root.attribute(r"direction=(\w+)")
        if isinstance(right, tuple) and not isinstance(left, tuple):
            left, right = right, left
            direction = {"GT": "LT", "GE": "LE"}.get(direction)
        return (direction, left[0], right) if isinstance(left, tuple) else None

    def _start(self, computation, start: Instruction, index: int) -> int | None:
        """Initial value of an element of the loop state, if it is a constant."""
        if start.opcode != "tuple":
            return None
        return _constant(computation, start.operands[index])

    def _step(self, body: Computation, index: int) -> int | None:
        """The constant that the loop body adds to an element of the loop state, if it does."""
        if body.root.opcode != "tuple":
            return None
        scope, name = body, body.root.operands[index]
        instruction = _through(scope, name)
        inside = instruction.called("calls") if instruction.opcode == "fusion" else None
        if inside:
            fused = self.computations[inside]
            root, operands = fused.root, instruction.operands
            if root.opcode != "add":
                return None
            parts = []
            for operand in root.operands:
                part = fused.instructions[operand]
                if part.opcode == "parameter":
                    operand = operands[int(part.operands[0])]
                    parts.append((_constant(scope, operand), _element(scope, operand)))
                else:
                    parts.append((_constant(fused, operand), None))
        elif instruction.opcode == "add":
            parts = [(_constant(scope, o), _element(scope, o)) for o in instruction.operands]
        else:
            return None
        values = [value for value, _ in parts if value is not None]
        return values[0] if (index,) in [element for _, element in parts] and values else None


def parse(text: str) -> Module:
    """Parses the text of a compiled program, as `compiled.as_text()` returns it."""
    computations, entry, current = {}, None, None
    for line in _whole_lines(text):
        if current is None:
            if line.endswith("{") and ") -> " in line and (head := _HEAD.match(line)):
                current = computations[head[1]] = Computation(head[1])
                entry = head[1] if line.startswith("ENTRY") else entry
        elif re.match(r"\}(,|\s|$)", line):
            current = None
        elif " = " in line:
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
            if current.root is None or line.lstrip().startswith("ROOT"):
                current.root = instruction
    return Module(computations, entry)


def _whole_lines(text: str) -> list[str]:
    """Lines of the text; instructions that span several lines, as kernels' attributes do, are joined."""
    lines = []
    for line in text.splitlines():
        starts = re.match(r"  (ROOT )?%?[\w.\-]+ = |%?[\w.\-]+ \(|ENTRY |HloModule|\}(,|\s|$)|$", line)
        if starts or not lines:
            lines.append(line)
        else:
            lines[-1] += " " + line
    return lines


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line.strip().removeprefix("ROOT "))
    name, _, rest = line.partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    if opcode in ("constant", "parameter"):
        operands = (inside,)
    else:
        operands = tuple(
            match[1] for part in _split(inside) if (match := _NAME.search(part.strip()))
        )
    return Instruction(name.lstrip("%"), opcode, arrays(shape), operands, rest[close + 1 :])


def arrays(shape: str) -> tuple[Array, ...]:
    """Parses a shape into its arrays; tuples are flattened."""
    return tuple(_array(*match.groups()) for match in _ARRAY.finditer(shape))


@functools.cache
def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n.strip())
    order, _, rest = (layout or "").partition(":")
    minor = tuple(map(int, order.split(","))) if order else None
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    tile = tuple(map(int, tile[1].split(","))) if tile else ()
    return Array(dtype, sizes, minor, tile, int(space[1]) if space else 0)


def _width(dtype: str) -> float:
    """Bytes per element."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the first one at or after `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"Unbalanced parentheses in the HLO line {text[:80]!r}.")


def _split(text: str) -> list[str]:
    """Splits at the commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]] if text[start:].strip() else parts


_FORWARDING = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier")


def _through(computation: Computation, name: str) -> Instruction:
    """The instruction that computes a value, with copies and conversions skipped."""
    instruction = computation.instructions[name]
    while instruction.opcode in _FORWARDING:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant; None if it is not one."""
    instruction = _through(computation, name)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0]):
        return int(instruction.operands[0])
    return None


def _element(computation: Computation, name: str) -> tuple[int] | None:
    """`(index,)` if the value is an element of the computation's tuple parameter, otherwise None."""
    instruction = _through(computation, name)
    if instruction.opcode != "get-tuple-element":
        return None
    source = computation.instructions[instruction.operands[0]]
    return (int(instruction.attribute(r"index=(\d+)")),) if source.opcode == "parameter" else None
