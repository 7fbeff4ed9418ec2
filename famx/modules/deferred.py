"""A scan over blocks that computes the gradients of its weights once, after the loop.

The plain derivative of a scan adds a gradient of the size of every weight in each step, for the few
tokens of the memory: more memory traffic than the step itself, and communication where weights are
sharded. Here the steps keep the input of each projection and the gradient of its output, and one product
over all steps gives the gradient of the weight.
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

from famx.modules.components import Projection
from famx.modules.weights import gathered


def scan(layer: nn.Module, method: str, carry, xs, *args):
    """`lax.scan` of `layer.method(carry, x, *args) -> (carry, y)`; equal to it, gradients included.

    Args:
      layer: a bound module with all its parameters.
      method: name of the layer's method, which calls each `Projection` at most once and creates no
        variables.
      carry: initial carry.
      xs: arrays whose first axis is the steps.
      *args: arguments that are the same in every step.

    Returns:
      The last carry, and the stacked `y`.
    """
    module, variables = layer.unbind()
    # Parameters may be boxed, as `init` returns them.
    rest = traverse_util.flatten_dict(nn.unbox(variables.get("params", {})))
    steps = jax.tree.leaves(xs)[0].shape[0]
    projections: dict[tuple, tuple] = {}  # by path: module, input, output

    def step(kernels, rest, carry, x, args, slots):
        inputs: dict[tuple, Any] = {}
        params = traverse_util.unflatten_dict({**kernels, **rest})
        with nn.intercept_methods(_tap(inputs, projections, slots)):
            carry, y = module.apply({"params": params}, carry, x, *args, method=method)
        return carry, y, inputs

    first = jax.tree.map(lambda x: x[0], xs)
    jax.eval_shape(step, {}, rest, carry, first, args, None)
    kernels, slots = {}, {}
    for path, (projection, x, y) in projections.items():
        names = (*projection.in_axes, *projection.out_axes)
        kernel = rest.pop((*path, "kernel")).astype(projection.config.dtype)
        kernels[path] = gathered(kernel, names, steps * x.size)  # once, not in every step
        slots[path] = jnp.zeros(y.shape, y.dtype)
    named = lambda kernels: {(*path, "kernel"): kernel for path, kernel in kernels.items()}
    traced, shapes = jax.make_jaxpr(lambda k, *rest: step(named(k), *rest), return_shape=True)(
        kernels, rest, carry, first, args, slots
    )
    body = _Body(traced.jaxpr, jax.tree.structure(shapes))
    slots = jax.tree.map(lambda slot: jnp.zeros((steps, *slot.shape), slot.dtype), slots)
    return _scan(body, kernels, (rest, carry, xs, slots), (args, traced.consts))


@dataclasses.dataclass(frozen=True, eq=False)
class _Body:
    """A traced step, which includes the interceptors that were active while it was traced."""

    jaxpr: jex.Jaxpr
    outputs: Any

    def __call__(self, consts, *args):
        flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(self.outputs, flat)


def _loop(body: _Body, kernels, differentiated, rest):
    """The plain scan: `(carry, ys)`, and the inputs of the projections in each step."""
    (params, carry, xs, slots), (args, consts) = differentiated, rest

    def step(carry, xs):
        carry, y, inputs = body(consts, kernels, params, carry, xs[0], args, xs[1])
        return carry, (y, inputs)

    carry, (ys, inputs) = jax.lax.scan(step, carry, (xs, slots))
    return (carry, ys), inputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(body, kernels, differentiated, rest):
    return _loop(body, kernels, differentiated, rest)[0]


def _forward(body, kernels, differentiated, rest):
    loop = lambda differentiated: _loop(body, kernels, differentiated, rest)
    result, pullback, inputs = jax.vjp(loop, differentiated, has_aux=True)
    return result, (pullback, inputs, kernels)


def _backward(body, residuals, grads):
    pullback, inputs, kernels = residuals
    ((*others, outputs),) = pullback(grads)

    def of_kernel(kernel, x, dy):
        shared = (x.ndim + dy.ndim - kernel.ndim) // 2  # axes of steps, examples and tokens
        # Examples first: a mesh shards them, and of merged axes only the first can be sharded.
        rows = lambda y: y.swapaxes(0, 1).reshape(math.prod(y.shape[:shared]), -1)
        return jnp.matmul(rows(x).T, rows(dy)).reshape(kernel.shape).astype(kernel.dtype)

    of_kernels = jax.tree.map(of_kernel, kernels, inputs, outputs)
    return of_kernels, (*others, outputs), None


_scan.defvjp(_forward, _backward)


@jax.custom_vjp
def _through(y, slot):
    """`y`; its gradient is also the gradient of `slot`, whose value is not used."""
    return y


_through.defvjp(lambda y, slot: (y, None), lambda _, grad: (grad, grad))


def _tap(inputs, projections, slots):
    """An interceptor that records the input of each projection and adds a slot for its output's gradient.

    Without `slots` it only lists the projections.
    """

    def project(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, Projection) or context.method_name != "__call__":
            return call(*args, **kwargs)
        y, path = call(*args, **kwargs), module.path
        if slots is None:
            projections[path] = (module, args[0], y)
            return y
        assert path not in inputs, f"{path} is called twice"
        inputs[path] = args[0].astype(module.config.dtype)
        return _through(y, slots[path])

    return project
