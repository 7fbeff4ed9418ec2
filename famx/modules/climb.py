"""A scan of little work over many layers, such as that of a prompt, with gradients made in parallel."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core as jex

from famx.modules.jaxprs import by_kind, join, part


def scan_layers(layers: nn.Module, function, carry, xs):
    """Scans `function(layer, carry, x) -> (carry, y)` over layers whose parameters are stacked.

    Equal to `lax.scan`, gradients included. The loops carry nothing but the carry, and then its
    gradient; the gradients of the parameters are made for all layers at once, for which the backward
    pass computes each layer twice. That is for little work in many layers, such as that of a prompt, on
    one device: all layers' weights are used at once.

    Args:
      layers: a bound layer with all its parameters, with the layers in front.
      function: called with a layer that is bound to its parameters.
      carry: initial carry, real numbers.
      xs: arrays with the layers in front.

    Returns:
      The last carry, and the stacked `y`.
    """
    module, variables = layers.unbind()
    params = nn.unbox(variables["params"])

    def step(carry, x):
        params, x = x
        return module.apply({"params": params}, carry, x, method=function)

    xs = params, xs
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(
        carry, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    )
    jaxpr = traced.jaxpr
    jaxpr = part(jaxpr, [*jaxpr.constvars, *jaxpr.invars], jaxpr.outvars, jaxpr.eqns)
    body = _Step(jaxpr, jax.tree.structure(shapes))
    real, plain = by_kind(jax.tree.leaves(xs))
    leaves, tree = jax.tree.flatten(carry)
    last, ys = _scan(body, leaves, real, plain, traced.consts)
    return jax.tree.unflatten(tree, last), ys


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A traced step, which includes the interceptors that were active while it was traced."""

    jaxpr: jex.Jaxpr
    outputs: Any

    def __call__(self, consts, carry, real, plain):
        function = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, ()))
        flat = function(*consts, *carry, *join(real, plain))
        carry, y = jax.tree.unflatten(self.outputs, flat)
        return jax.tree.leaves(carry), y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(step, carry, real, plain, consts):
    return jax.lax.scan(lambda carry, x: step(consts, carry, *x), carry, (real, plain))


def _scan_forward(step, carry, real, plain, consts):
    def keep(carry, x):
        after, y = step(consts, carry, *x)
        return after, (carry, y)

    last, (carries, ys) = jax.lax.scan(keep, carry, (real, plain))
    return (last, ys), (carries, real, plain, consts)


def _scan_backward(step, residuals, gradients):
    *of_layers, consts = residuals
    last, ys = gradients

    def linear(carry, real, plain):
        return jax.vjp(lambda carry, real: step(consts, carry, real, plain), carry, real)[1]

    pullbacks = jax.vmap(linear)(*of_layers)

    def back(carry, x):
        pullback, y = x
        return pullback((carry, y))[0], carry

    first, carries = jax.lax.scan(back, last, (pullbacks, ys), reverse=True)
    real = jax.vmap(lambda pullback, carry, y: pullback((carry, y))[1])(pullbacks, carries, ys)
    return first, real, None, None


_scan.defvjp(_scan_forward, _scan_backward)
