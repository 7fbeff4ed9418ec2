"""A scan over blocks whose loops do only what must wait for the step before.

The plain derivative of a scan keeps every intermediate result of each step in a stack of its own, makes
the steps once more where activations are rematerialised, and adds up a gradient of the size of every
weight in each step. Here

* what a step computes without the carry, such as the rotation of its positions, is computed for all
  steps before the loop;
* what is equal in every step is kept once. In rematerialised layers the loop keeps nothing but the carry
  before each step, under the name `CARRIES` for their policies; from it all steps are linearised at once,
  in parallel, so that the backward pass need not run the loop again;
* projections of the same array are one product (`Projection.jointly`);
* the gradient of a weight is one product over all steps after the loop, of the inputs of its projection
  and the gradients of its outputs.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from famx.modules.components import JOINT, Projection, joint, joint_kernel, separate
from famx.modules.jaxprs import by_kind, depends, join, part, variables_of
from famx.modules.products import matrix_product, product
from famx.modules.weights import gathered

CARRIES = "memory_before_blocks"
# Operations that are made again in every step rather than kept for each: their results are not smaller
# than what they are made of.
_CHEAP = frozenset({"broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims"})


def scan(layer: nn.Module, method: str, carry, xs, *args, rematerialized: bool = True):
    """`lax.scan` of `layer.method(carry, x, *args) -> (carry, y)`; equal to it, gradients included.

    Args:
      layer: a bound module with all its parameters.
      method: name of the layer's method, which calls each `Projection` at most once and creates no
        variables.
      carry: initial carry.
      xs: arrays whose first axis is the steps.
      *args: arguments that are the same in every step.
      rematerialized: whether the backward pass of the layer makes its activations again. If not, the loop
        keeps what the gradients of its steps need, which it computes anyway.

    Returns:
      The last carry, and the stacked `y`.
    """
    module, variables = layer.unbind()
    # Parameters may be boxed, as `init` returns them.
    params = traverse_util.flatten_dict(nn.unbox(variables.get("params", {})))
    steps = jax.tree.leaves(xs)[0].shape[0]
    groups: list[_Group] = []

    def step(kernels, params, carry, x, args, slots):
        tap = _Tap(groups, kernels, slots)
        with nn.intercept_methods(tap):
            tree = traverse_util.unflatten_dict(params | tap.alone())
            carry, y = module.apply({"params": tree}, carry, x, *args, method=method)
        return carry, y, tap.inputs

    first = jax.tree.map(lambda x: x[0], xs)
    jax.eval_shape(lambda *rest: step({}, *rest, None), params, carry, first, args)
    kernels = {group.name: group.kernel(params) for group in groups}
    slots = {g.name: jnp.zeros(g.product.shape, g.product.dtype) for g in groups}
    for path in (path for group in groups for path in group.paths):
        del params[(*path, "kernel")]
        params.pop((*path, JOINT), None)
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(kernels, params, carry, first, args, slots)
    counts = [len(jax.tree.leaves(x)) for x in (kernels, params, carry, first, args, slots)]
    body, before = _split(traced.jaxpr, counts, jax.tree.structure(shapes), rematerialized)
    equal, each = before(traced.consts, jax.tree.leaves((params, args)), jax.tree.leaves(xs))
    slots = jax.tree.map(lambda slot: jnp.zeros((steps, *slot.shape), slot.dtype), slots)
    leaves, tree = jax.tree.flatten(carry)
    (first, *real), plain = zip(*(by_kind(x) for x in (leaves, equal, each)), strict=True)
    # JAX takes what is the same for every layer out of the scan over layers, and would keep it as wide
    # as the memory. So what tells steps apart is made to look as if it came with the carry.
    first, plain = jax.lax.optimization_barrier((first, plain))
    last, ys = _scan(body, kernels, first, *real, slots, plain)
    return jax.tree.unflatten(tree, last), ys


# ---------------------------------------------------------------- projections


@dataclasses.dataclass
class _Group:
    """Projections that are computed as one product: of one array, or a single one.

    Attributes:
      members: the modules.
      product: shape and dtype of the product.
    """

    members: tuple[Projection, ...]
    product: jax.ShapeDtypeStruct

    @property
    def paths(self):
        return [module.path for module in self.members]

    @property
    def name(self) -> str:
        return "/".join(self.members[0].path)

    def kernel(self, params):
        """The kernel in the compute dtype, gathered once and not in every step."""
        kernels, first = [params[(*path, "kernel")] for path in self.paths], self.members[0]
        if len(kernels) > 1 and (*first.path, JOINT) in params:
            return params[(*first.path, JOINT)]
        if len(kernels) > 1:
            return joint(kernels).astype(first.config.dtype)
        kernel = kernels[0].astype(first.config.dtype)
        return gathered(kernel, (*first.in_axes, *first.out_axes))


class _Tap:
    """Interceptor that puts the product of each group through its slot.

    Without `slots` it only lists the groups. A slot is an argument of zeros whose gradient is that of
    the product.

    Attributes:
      inputs: what each product is made of, by name of the group.
    """

    def __init__(self, groups, kernels, slots):
        self.groups, self.kernels, self.slots = groups, kernels, slots
        self.inputs: dict[str, Any] = {}

    def alone(self) -> dict[tuple, Any]:
        """Kernels that projections find among their parameters, by path."""
        groups = self.groups if self.slots is not None else ()
        alone = (group for group in groups if len(group.members) == 1)
        return {(*group.paths[0], "kernel"): self.kernels[group.name] for group in alone}

    def __call__(self, call, args, kwargs, context):
        module, method = context.module, context.method_name
        if not isinstance(module, Projection) or method not in ("__call__", "jointly"):
            return call(*args, **kwargs)
        x, *others = args
        members = (module, *others)
        if self.slots is None:
            return self._list(call, x, members)
        paths = [member.path for member in members]
        group = next((group for group in self.groups if group.paths == paths), None)
        if group is None:  # each is called alone
            return call(*args, **kwargs)
        assert group.name not in self.inputs, f"{group.name} is called twice"
        x = self.inputs[group.name] = x.astype(module.config.dtype)
        if not others:
            return _through(call(x), self.slots[group.name])
        y = product(x, self.kernels[group.name], 1)
        return separate(_through(y, self.slots[group.name]), members)

    def _list(self, call, x, members):
        if len(members) == 1:
            y = result = call(x)
        elif (kernel := joint_kernel(members)) is not None:
            y = product(x.astype(members[0].config.dtype), kernel, 1)
            result = separate(y, members)
        else:
            return call(x, *members[1:])
        self.groups.append(_Group(members, jax.ShapeDtypeStruct(y.shape, y.dtype)))
        return result


@jax.custom_vjp
def _through(y, slot):
    """`y`; its gradient is also that of `slot`, which is not read."""
    return y


_through.defvjp(lambda y, slot: (y, None), lambda _, grad: (grad, grad))


# ---------------------------------------------------------------- the step, split


@dataclasses.dataclass(frozen=True, eq=False)
class _Body:
    """What a step computes from its carry; interceptors that were active when it was traced are in it.

    Attributes:
      jaxpr: function of the leaves of kernels, carry, `equal`, `each` and slots.
      outputs: structure of its results: carry, `y`, inputs of the products.
      equal: shape and dtype of each leaf that is equal in every step.
      rematerialized: see `scan`.
    """

    jaxpr: jex.Jaxpr
    outputs: Any
    equal: list[jax.ShapeDtypeStruct]
    rematerialized: bool

    def __call__(self, kernels, carry, equal, each, slots):
        """`(leaves of the carry, y, inputs of the products by name)`."""
        args = *jax.tree.leaves(kernels), *carry, *equal, *each, *jax.tree.leaves(slots)
        flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, ()))(*args)
        carry, y, inputs = jax.tree.unflatten(self.outputs, flat)
        return jax.tree.leaves(carry), y, inputs


def _split(jaxpr, counts: list[int], outputs, rematerialized: bool):
    """The part of a step that waits for the carry, and a function that computes the rest beforehand.

    Args:
      jaxpr: a step.
      counts: number of its arguments that are kernels, parameters, carry, `x`, further arguments, slots.
      outputs: structure of its results.
      rematerialized: see `scan`.

    Returns:
      `_Body`, and a function of `(consts, parameters and arguments, xs)` that gives the body's `equal`
      and `each`.
    """
    invars = iter(jaxpr.invars)
    kernels, params, carry, x, args, slots = ([next(invars) for _ in range(n)] for n in counts)
    waiting, late, early = {*kernels, *carry, *slots}, [], []
    for eqn in jaxpr.eqns:
        waits = eqn.effects or any(v in waiting for v in variables_of(eqn.invars))
        (late if waits else early).append(eqn)
        waiting.update(eqn.outvars if waits else ())
    read = dict.fromkeys(v for eqn in late for v in variables_of(eqn.invars) if v not in waiting)
    read.update(dict.fromkeys(v for v in variables_of(jaxpr.outvars) if v not in waiting))
    for eqn in reversed(early):
        if eqn.primitive.name in _CHEAP and any(v in read for v in eqn.outvars):
            late.insert(0, eqn)
            for v in eqn.outvars:
                read.pop(v, None)
            read.update(dict.fromkeys(variables_of(eqn.invars)))
    varies = depends(early, x)
    equal = [v for v in read if v not in varies]
    each = [v for v in read if v in varies]
    of_step = part(jaxpr, [*kernels, *carry, *equal, *each, *slots], jaxpr.outvars, late)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equal]
    body = _Body(of_step, outputs, shapes, rematerialized)
    given = *jaxpr.constvars, *params, *args
    of_all = part(jaxpr, given, equal, [eqn for eqn in early if not varies.intersection(eqn.outvars)])
    of_each = part(jaxpr, [*given, *x], each, early)

    def before(consts, others, xs):
        others = *consts, *others
        function = lambda jaxpr: jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
        rows = jax.vmap(function(of_each), [None] * len(others) + [0] * len(xs))
        return function(of_all)(*others), rows(*others, *xs) if each else []

    return body, before


# ---------------------------------------------------------------- the loop and its gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(body: _Body, kernels, carry, equal, each, slots, plain):
    """The last carry (leaves of both kinds) and the stacked `y`; `plain`: of carry, `equal`, `each`."""
    carry, equal, each = (join(*pair) for pair in zip((carry, equal, each), plain, strict=True))

    def step(carry, xs):
        after, y, _ = body(kernels, carry, equal, *xs)
        return after, y

    return jax.lax.scan(step, carry, (each, slots))


def _forward(body, kernels, carry, equal, each, slots, plain):
    carry, equal, each = (join(*pair) for pair in zip((carry, equal, each), plain, strict=True))
    linear = _Linear(body, (kernels, equal), carry, (each, slots))
    last, ys, inputs, pullbacks = (linear.at_once if body.rematerialized else linear.step_by_step)()
    return (last, ys), (pullbacks, inputs, kernels)


class _Pullbacks:
    """The pullbacks of all steps: what each of them keeps, and what they have in common.

    A pullback takes the gradients of the carry's real leaves and of `y`. It gives those of the real
    leaves of carry, `equal` and `each`, and of the slots.
    """

    def __init__(self, tree, stacked, common):
        self.tree, self.stacked, self.common = tree, stacked, common

    def of_step(self, stacked):
        """The pullback of a step; `stacked`: the step's part of `self.stacked`."""
        return jax.tree.unflatten(self.tree, join(stacked, self.common))


jax.tree_util.register_pytree_node(
    _Pullbacks,
    lambda pullbacks: ((pullbacks.stacked, pullbacks.common), pullbacks.tree),
    lambda tree, children: _Pullbacks(tree, *children),
)


class _Linear:
    """All steps, linearised: each with the pullback of its results.

    Args:
      body: the step.
      common: kernels, and what else is equal in every step.
      carry: initial carry.
      xs: what each step has, and slots.
    """

    def __init__(self, body, common, carry, xs):
        self.body, self.common, self.carry, self.xs = body, common, carry, xs
        first = jax.tree.map(lambda x: x[0], xs)
        traced, shapes = jax.make_jaxpr(self._step, return_shape=True)(common, carry, first)
        self.function = jex.jaxpr_as_fun(traced)
        after, y, inputs, pullback = shapes
        self.results, self.pullback = jax.tree.structure((y, inputs)), jax.tree.structure(pullback)
        # What differs from step to step; the rest, such as the kernels, is kept once.
        given = len(jax.tree.leaves(common))
        varies = depends(traced.jaxpr.eqns, traced.jaxpr.invars[given:])
        self.differs = [bool(variables_of([v])) and v in varies for v in traced.jaxpr.outvars]
        count = len(after) + self.results.num_leaves
        self.differs[:count] = [True] * count

    def _step(self, common, carry, xs):
        (kernels, equal), (each, slots) = common, xs
        (carry, *other), (equal, *more), (each, *rest) = map(by_kind, (carry, equal, each))

        def real(carry, equal, each, slots):
            given = join(carry, *other), join(equal, *more), join(each, *rest)
            after, y, inputs = self.body(kernels, *given, slots)
            after, others = by_kind(after)
            return (after, y), (others, inputs)

        (after, y), pullback, (others, inputs) = jax.vjp(real, carry, equal, each, slots, has_aux=True)
        return join(after, others), y, inputs, pullback

    def at_once(self):
        """`(last carry, y, inputs of the products, _Pullbacks)`: the loop keeps only the carry."""
        (kernels, equal), common = self.common, jax.tree.leaves(self.common)

        def step(carry, xs):
            return self.body(kernels, carry, equal, *xs)[0], carry

        last, carries = jax.lax.scan(step, self.carry, self.xs)
        carries = [checkpoint_name(x, CARRIES) for x in carries]
        given = [*common, *carries, *jax.tree.leaves(self.xs)]
        axes = [None] * len(common) + [0] * (len(given) - len(common))
        out_axes = [0 if differs else None for differs in self.differs]
        rows = jax.vmap(self.function, axes, out_axes)(*given)
        return last, *self._results(rows[len(last) :])

    def step_by_step(self):
        """The same with one loop, which keeps everything: no step is computed twice."""
        common, count = jax.tree.leaves(self.common), len(self.carry)
        of_step = lambda carry, xs: self.function(*common, *carry, *jax.tree.leaves(xs))

        def step(carry, xs):
            rows = of_step(carry, xs)
            return rows[:count], [x for x, differs in zip(rows, self.differs) if differs][count:]

        last, stacked = jax.lax.scan(step, self.carry, self.xs)
        first = of_step(self.carry, jax.tree.map(lambda x: x[0], self.xs))  # for what does not differ
        stacked = iter(stacked)
        pairs = list(zip(first, self.differs, strict=True))[count:]
        return last, *self._results([next(stacked) if differs else x for x, differs in pairs])

    def _results(self, rows):
        count = self.results.num_leaves
        kept = list(zip(rows[count:], self.differs[len(self.carry) + count :], strict=True))
        pick = lambda which: [x if differs == which else None for x, differs in kept]
        y, inputs = jax.tree.unflatten(self.results, rows[:count])
        return y, inputs, _Pullbacks(self.pullback, pick(True), pick(False))


def _backward(body, residuals, gradients):
    pullbacks, inputs, kernels = residuals
    last, ys = gradients
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    zeros = [None if x is None else wide(x) for x in by_kind(body.equal)[0]]

    def step(sums, xs):
        (carry, totals), (stacked, y) = sums, xs
        carry, equal, each, slots = pullbacks.of_step(stacked)((carry, y))
        totals = jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, equal)
        return (carry, totals), (each, slots)

    # Those of leaves that are no real numbers are of a dtype without elements.
    last = [None if x.dtype == jax.dtypes.float0 else x for x in last]
    (carry, equal), (each, outputs) = jax.lax.scan(
        step, (last, zeros), (pullbacks.stacked, ys), reverse=True
    )
    equal = jax.tree.map(lambda x, like: x.astype(like.dtype), equal, by_kind(body.equal)[0])

    def of_kernel(kernel, x, dy):
        shared = (x.ndim + dy.ndim - kernel.ndim) // 2  # axes of steps, examples and tokens
        # Examples first: a mesh shards them, and of merged axes only the first can be sharded.
        rows = lambda y: y.swapaxes(0, 1).reshape(math.prod(y.shape[:shared]), -1)
        return matrix_product(rows(x).T, rows(dy)).reshape(kernel.shape).astype(kernel.dtype)

    of_kernels = jax.tree.map(of_kernel, kernels, inputs, outputs)
    return of_kernels, carry, equal, each, outputs, None


_scan.defvjp(_forward, _backward)
