"""What a program is traced for, and gathering of weights that are sharded over the devices of a batch.

Without gathering the compiler may move activations instead, in every product and every step of a loop.
Without a mesh (`jax.set_mesh`) and rules (`nn.logical_axis_rules`) it has no effect.
"""

import functools
import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def one_device() -> bool:
    """Whether the program that is traced has no mesh, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def platform() -> str:
    """Platform that the program which is traced is compiled for: the mesh's, if there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def mesh_axes(names: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Axes of the current mesh over which the current rules shard each axis of an array.

    Args:
      names: logical axes of the array; the first rule that names a mesh axis uses it.
      shape: shape of the array; an axis that its mesh axes do not divide is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sharded = []
    for entry, size in zip(nn.logical_to_mesh_axes(names), shape, strict=True):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        axes = tuple(a for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)
        divides = size % math.prod(mesh.shape[a] for a in axes) == 0
        sharded.append(axes if divides else ())
    return sharded


def gathered(kernel, names: tuple[str, ...], activations: float = math.inf):
    """Gathers `kernel` over the mesh axes of the batch; its gradient is scattered in one step.

    Args:
      kernel: kernel in the compute dtype, in which it is sent.
      names: logical axes of the kernel.
      activations: number of elements that the kernel is multiplied with. If they are fewer than those of
        the kernel, as for a prompt or a single token, the kernel is not gathered. By default it is, as
        before a loop, which might gather it in every step.
    """
    if jax.sharding.get_abstract_mesh().empty or activations < kernel.size:
        return kernel
    return _gathered(kernel, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel, names):
    return _constrained(kernel, _next_to_batch(kernel, names))


def _backward(names, _, grad):
    # Constrained as a whole and then sharded, which is one scatter. Constrained to the shard at once, the
    # compiler may gather activations instead.
    grad = _constrained(grad, _next_to_batch(grad, names))
    return (_constrained(grad, mesh_axes(names, grad.shape)),)


_gathered.defvjp(lambda kernel, names: (_gathered(kernel, names), None), _backward)


def _next_to_batch(kernel, names):
    """Mesh axes of the kernel that an array with a batch axis leaves free."""
    return mesh_axes(("batch", *names), (0, *kernel.shape))[1:]


def _constrained(kernel, axes):
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*axes))
