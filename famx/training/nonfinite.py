"""The first operation of a function that makes a value which is not finite.

The function is traced, and its operations are run one by one. The steps of loops are compiled, and only
those opened up that make such a value. An operation is an origin if its result has a NaN, or an infinity
of a sign, that none of its operands has. Many origins are harmless, such as scores of masked tokens; so
from the results that are not finite one goes back along the operands, and takes the earliest origin on
the way.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

_KINDS = {"nan": np.isnan, "inf": np.isposinf, "-inf": np.isneginf}
_CALLS = {
    "jit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
# Operations that only say where arrays are, or how they are compiled.
_IDENTITIES = frozenset({"sharding_constraint", "reshard", "optimization_barrier", "name", "mesh_cast"})


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that an operation is in.

    Attributes:
      names: names of the modules and methods around the loop, outermost first.
      index: index of the step, from 0; in a backward pass that of the forward step.
      length: number of steps; None if it is not known beforehand.
    """

    names: tuple[str, ...]
    index: int
    length: int | None


@dataclasses.dataclass(frozen=True)
class Origin:
    """An operation that makes a value which is not finite.

    Attributes:
      operation: name of the operation, as jax has it.
      names: names of the modules and methods that it is in, outermost first.
      backward: whether it belongs to the backward pass.
      loops: the loops that it is in, outermost first.
      kind: "nan", "inf" or "-inf".
      index: index of the first such value in the result.
      largest: largest absolute value of the operands that is finite.
    """

    operation: str
    names: tuple[str, ...]
    backward: bool
    loops: tuple[Loop, ...]
    kind: str
    index: tuple[int, ...]
    largest: float


def first_nonfinite(function: Callable[..., Any], *args: Any) -> Origin | None:
    """The earliest operation of `function(*args)` that makes a result not finite; None: all are finite.

    Where an argument is to blame it is an operation "argument", whose names are its path.
    """
    traced = jax.make_jaxpr(function)(*args)
    values = []
    for path, x in jax.tree_util.tree_leaves_with_path(args):
        values.append(_Value(x))
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        values[-1].mark("argument", Place(name), (), 0)
    run = _Run()
    results = run.closed(traced, values, Place())
    reached = sorted(_reached(value.node for value in results if value.node), key=lambda x: x.order)
    causes = [node for node in reached if node.new and node.operation != "literal"]
    return causes[0].origin() if causes else (reached[0].origin() if reached else None)


# ---------------------------------------------------------------- values


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation is.

    Attributes:
      stack: jax's stack of names, outermost first, joined by slashes.
      loops: as of `Origin`.
    """

    stack: str = ""
    loops: tuple[Loop, ...] = ()

    def within(self, stack: Any) -> "Place":
        """The place of an operation with this stack of its own."""
        return dataclasses.replace(self, stack="/".join(filter(None, [self.stack, str(stack)])))

    def step(self, index: int, length: int | None) -> "Place":
        """The place in a step of a loop that is here."""
        return dataclasses.replace(self, loops=(*self.loops, Loop(self.names, index, length)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stack, without those of jax's transformations."""
        plain = re.sub(r"\b(?:jvp|transpose|vmap|rematted_computation|checkpoint)\(|\)", "", self.stack)
        return tuple(filter(None, plain.split("/")))

    @property
    def backward(self) -> bool:
        """Whether it belongs to a backward pass."""
        return "transpose(" in self.stack


@dataclasses.dataclass
class _Node:
    """A value that is not finite, and the operation that made it; `new`: whether that is an origin."""

    operation: str
    place: Place
    kinds: frozenset[str]
    parents: tuple["_Node", ...]
    order: int
    new: bool
    kind: str
    index: tuple[int, ...]
    largest: float

    def origin(self) -> Origin:
        place = self.place
        return Origin(
            self.operation, place.names, place.backward, place.loops, self.kind, self.index, self.largest
        )


@dataclasses.dataclass
class _Value:
    """An array, and its node if it is not finite."""

    array: Any
    node: _Node | None = None

    def mark(self, operation: str, place: Place, operands: Sequence["_Value"], order: int) -> None:
        """Sets `node`, given what the value was made of."""
        kinds = frozenset(_found(self.array) if _is_real(self.array) else ())
        if not kinds:
            return
        parents = tuple(x.node for x in operands if x.node is not None)
        fresh = [k for k in _KINDS if k in kinds and not any(k in parent.kinds for parent in parents)]
        kind = fresh[0] if fresh else next(k for k in _KINDS if k in kinds)
        index, largest = (), math.nan
        if fresh:
            array = np.asarray(self.array)
            index = np.unravel_index(int(np.argmax(_KINDS[kind](array))), array.shape)
            largest = max((_largest(x.array) for x in operands), default=math.nan)
        self.node = _Node(
            operation, place, kinds, parents, order, bool(fresh), kind, tuple(map(int, index)), largest
        )


def _found(x: Any) -> list[str]:
    """The kinds of values in `x` that are not finite."""
    x = np.asarray(x)
    x = x.real if np.iscomplexobj(x) else x
    if np.isfinite(x).all():
        return []
    return [kind for kind, found in _KINDS.items() if found(x).any()]


def _largest(x: Any) -> float:
    if not _is_real(x) or not np.size(x):
        return 0.0
    x = np.asarray(x)
    return float(np.max(np.where(np.isfinite(x), np.abs(x), 0)))


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else np.result_type(x), jnp.inexact)


def _reached(nodes: Iterable[_Node]) -> list[_Node]:
    """These nodes and all that they depend on."""
    seen, stack = {}, list(nodes)
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            stack += node.parents
    return list(seen.values())


# ---------------------------------------------------------------- running


class _Run:
    """Runs traced functions operation by operation."""

    def __init__(self):
        self._order = 0
        self._compiled: dict[int, Any] = {}

    def closed(self, traced: Any, values: Sequence[_Value], place: Place) -> list[_Value]:
        """The results of a jaxpr, closed or not."""
        if not hasattr(traced, "consts"):
            return self._open(traced, [], values, place)
        return self._open(traced.jaxpr, [_Value(x) for x in traced.consts], values, place)

    def _open(self, jaxpr, consts, values, place) -> list[_Value]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        last = _last_uses(jaxpr)

        def read(atom) -> _Value:
            if not isinstance(atom, jex.Literal):
                return known[atom]
            value = _Value(atom.val)
            value.mark("literal", place, (), self._order)
            return value

        for number, eqn in enumerate(jaxpr.eqns):
            here = place.within(eqn.source_info.name_stack)
            results = self._equation(eqn, [read(x) for x in eqn.invars], here)
            known.update(zip(eqn.outvars, results, strict=True))
            for variable in last.get(number, ()):
                known.pop(variable, None)
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn, values: list[_Value], place: Place) -> list[_Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in _IDENTITIES:
            return values
        if name in _CALLS:
            return self.closed(params[_CALLS[name]], values, place)
        if name == "cond":
            index, *operands = values
            return self.closed(params["branches"][int(index.array)], operands, place)
        if name == "while":
            return self._while(params, values, place)
        if name == "scan":
            return self._scan(params, values, place)
        with eqn.ctx.manager:
            params = eqn.primitive.get_bind_params(params)
            arrays = eqn.primitive.bind(*(x.array for x in values), **params)
        self._order += 1
        results = [_Value(x) for x in (arrays if eqn.primitive.multiple_results else [arrays])]
        for value in results:
            value.mark(name, place, values, self._order)
        return results

    def _while(self, params, values, place) -> list[_Value]:
        counts = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body = values[: counts[0]], values[counts[0] : sum(counts)]
        carry, index = values[sum(counts) :], 0
        while self.closed(params["cond_jaxpr"], [*of_test, *carry], place)[0].array:
            carry = self._step(params["body_jaxpr"], [*of_body, *carry], place.step(index, None))
            index += 1
        return carry

    def _step(self, traced, values: list[_Value], place: Place) -> list[_Value]:
        """A step of a loop, opened up if it makes a value that is not finite."""
        if id(traced) not in self._compiled:  # `traced` lives as long as the function that is run
            self._compiled[id(traced)] = jax.jit(jex.jaxpr_as_fun(traced))
        self._order += 1
        results = [_Value(x) for x in self._compiled[id(traced)](*(x.array for x in values))]
        for value in results:
            value.mark("step", place, values, self._order)
        if any(value.node and value.node.new for value in results):
            opened = self.closed(traced, values, place)
            if any(value.node for value in opened):
                return opened
        return results

    def _scan(self, params, values, place) -> list[_Value]:
        consts, carries, length = params["num_consts"], params["num_carry"], params["length"]
        same, carry = values[:consts], values[consts : consts + carries]
        xs = values[consts + carries :]
        steps = range(length)[::-1] if params["reverse"] else range(length)
        stacks: dict[int, list[_Value]] = {}
        for index in steps:
            each = [_slice(x, index) for x in xs]
            out = self._step(params["jaxpr"], [*same, *carry, *each], place.step(index, length))
            carry, stacks[index] = out[:carries], out[carries:]
        if not length:
            avals = params["jaxpr"].out_avals[carries:]
            return [*carry, *(_Value(jnp.zeros((0, *x.shape), x.dtype)) for x in avals)]
        return [*carry, *(_stack(x) for x in zip(*(stacks[i] for i in range(length)), strict=True))]


def _slice(value: _Value, index: int) -> _Value:
    """A step's part of a stacked value; not finite if the part is not."""
    part = _Value(value.array[index])
    if value.node is not None:
        part.mark("slice", value.node.place, (value,), value.node.order)
        if part.node is not None:
            part.node = value.node
    return part


def _stack(values: Sequence[_Value]) -> _Value:
    result = _Value(jnp.stack([x.array for x in values]))
    nodes = tuple(x.node for x in values if x.node is not None)
    if nodes:
        kinds = frozenset().union(*(node.kinds for node in nodes))
        first = min(nodes, key=lambda node: node.order)
        result.node = dataclasses.replace(first, kinds=kinds, parents=nodes, new=False)
    return result


@functools.lru_cache(maxsize=1024)
def _last_uses(jaxpr) -> dict[int, list]:
    """The variables that no equation after each needs any more, by number of the equation."""
    last = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, jex.Literal):
                last[atom] = number
    for atom in jaxpr.outvars:
        if not isinstance(atom, jex.Literal):
            last.pop(atom, None)
    uses: dict[int, list] = {}
    for variable, number in last.items():
        uses.setdefault(number, []).append(variable)
    return uses

