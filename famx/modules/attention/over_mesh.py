"""Kernels on a mesh: the compiler cannot partition them, so each device calls them on its own shard."""

import math

import jax
from jax.sharding import PartitionSpec as P

from famx.modules.weights import mesh_axes

BATCH_AXIS = "batch"


def over_mesh(function, args, batch_axis: str = BATCH_AXIS):
    """`function(*args)`, partitioned by batch and heads over the mesh of `jax.set_mesh`, if any.

    Args:
      function: function of `args`; takes numbers of heads from their shapes.
      args: queries `[B, C, S, H, Dh]`, then keys and values `[B, ..., K, Dh]` and vectors `[B]`.
      batch_axis: logical axis of the batch. It and "heads" are sharded by the rules of
        `nn.logical_axis_rules` if their sizes are divisible; each device has the key heads that its query
        heads read.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    if math.prod(mesh.shape[axis] for axis in free) == 1:
        return function(*args)
    q, keys = args[:2]
    batch, heads = mesh_axes((batch_axis, "heads"), (q.shape[0], q.shape[3]))
    size = lambda axes: math.prod(mesh.shape[axis] for axis in axes)
    replicate_keys = keys.shape[3] % size(heads) != 0

    def local(q, *rest):
        if replicate_keys:
            indices = _heads_read(args[0].shape[3], args[1].shape[3], heads, q.shape[3])
            rest = [x if x.ndim == 1 else jax.numpy.take(x, indices, axis=3) for x in rest]
        return function(q, *rest)

    queries = P(batch or None, None, None, heads or None, None)
    columns = P(batch or None, None, None, None if replicate_keys else heads or None, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, *(P(batch or None) if x.ndim == 1 else columns for x in args[1:])),
        out_specs=queries,
        axis_names=free,
        check_vma=False,  # kernels do not declare over which axes their results vary
    )(*args)


def _heads_read(heads, kv_heads, axes, local_heads):
    """Indices of the key heads that the `local_heads` query heads of this device read.

    One index if they share a key head; else one for each query head.
    """
    group = heads // kv_heads
    first = jax.lax.axis_index(axes) * local_heads
    if group % local_heads == 0:
        return first // group + jax.numpy.arange(1)
    return (first + jax.numpy.arange(local_heads)) // group
