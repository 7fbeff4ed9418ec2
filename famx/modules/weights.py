"""Weights that are cut over the devices that share the batch, made whole where they are used.

Left alone, the compiler may move activations instead, in every product and every step of a loop.
Outside of a mesh (`jax.set_mesh`) and of rules (`nn.logical_axis_rules`) nothing here does anything.
"""

import functools
import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def mesh_axes(names: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The axes of the current mesh that each axis of an array is cut over, by the current rules.

    Args:
      names: logical axes; a mesh axis goes to the first rule that takes it.
      shape: of the array; an axis that its mesh axes do not divide is whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = []
    for entry, size in zip(nn.logical_to_mesh_axes(names), shape, strict=True):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        axes = tuple(a for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)
        divides = size % math.prod(mesh.shape[a] for a in axes) == 0
        found.append(axes if divides else ())
    return found


def gathered(kernel, names: tuple[str, ...], activations: int):
    """`kernel`, whole along what cuts the batch; its gradient is summed and cut again in one exchange.

    Args:
      kernel: in the compute dtype, which is what travels.
      names: logical axes.
      activations: elements that the kernel is multiplied with. Where they are fewer than the kernel's
        own, as for the prompt or a token that is written, it is left as it is.
    """
    if jax.sharding.get_abstract_mesh().empty or activations < kernel.size:
        return kernel
    return _gathered(kernel, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel, names):
    return _constrained(kernel, _beside_a_batch(kernel, names))


def _backward(names, _, grad):
    # Summed as a whole and then cut, which is one scatter. Asked for the part alone, the compiler may
    # gather activations instead.
    grad = _constrained(grad, _beside_a_batch(grad, names))
    return (_constrained(grad, mesh_axes(names, grad.shape)),)


_gathered.defvjp(lambda kernel, names: (_gathered(kernel, names), None), _backward)


def _beside_a_batch(kernel, names):
    """Nothing else is cut over the batch's axes there."""
    return mesh_axes(("batch", *names), (0, *kernel.shape))[1:]


def _constrained(kernel, axes):
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*axes))
