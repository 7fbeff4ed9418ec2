"""Cross-entropy over a large vocabulary: few logits at once, one exchange of the output matrix.

On a mesh each device takes the logits of its own tokens, from an output matrix that is gathered
before the loop over chunks; its gradient is exchanged after the loop, once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from famx.modules import Decoder
from famx.modules.weights import mesh_axes

_MATRICES = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab")}  # matrices that give logits


def cross_entropy(module: Decoder, params, hidden, targets, weights, z_loss: float, chunk: int | None):
    """Weighted sum of the losses, and whether each arg-max is the target.

    Args:
      module: the decoder whose `logits` are scored.
      params: its parameters.
      hidden: what `read` returned, `[B, L, D]`.
      targets: int32 `[B, L]`.
      weights: float32 `[B, L]`.
      z_loss: coefficient of the squared log-partition.
      chunk: tokens of the whole batch whose logits exist at once, forward and backward; None: all.

    Returns:
      A scalar (float32 at least), and bool `[B, L]`.
    """
    params = {name: leaf for name, leaf in params.items() if name != "layers"}
    rows, columns = mesh_axes(("batch", "length"), targets.shape) if _on_mesh() else ((), ())
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in (*rows, *columns))
    size = None if chunk is None else max(1, chunk // devices)
    if devices == 1:
        return _in_chunks(module, params, hidden, targets, weights, z_loss, size)

    manual = {*rows, *columns}
    sharded = {
        name: tuple(
            tuple(a for a in axes if a in manual) for axes in mesh_axes(names, params[name].shape)
        )
        for name, names in _MATRICES.items()
        if name in params
    }

    def local(params, hidden, targets, weights):
        matrices = {
            name: _gathered(params[name], axes, module.config.dtype) for name, axes in sharded.items()
        }
        total, right = _in_chunks(module, {**params, **matrices}, hidden, targets, weights, z_loss, size)
        return total[None], right

    specs = jax.tree.map(lambda _: PartitionSpec(), params)
    specs |= {name: PartitionSpec(*axes) for name, axes in sharded.items()}
    tokens = PartitionSpec(rows, columns)
    totals, right = jax.shard_map(
        local,
        in_specs=(specs, PartitionSpec(rows, columns, None), tokens, tokens),
        out_specs=(PartitionSpec((*rows, *columns)), tokens),
        axis_names=manual,
        check_vma=False,
    )(params, hidden, targets, weights)
    return jnp.sum(totals), right


def _on_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(matrix, axes, dtype):
    """The matrix of which this device has a shard, gathered in the compute dtype.

    The result has the dtype of the shard, in which the gradients of chunks and devices are summed.
    """
    stored_dtype, matrix = matrix.dtype, matrix.astype(dtype)
    for axis, names in enumerate(axes):
        if names:
            matrix = jax.lax.all_gather(matrix, names, axis=axis, tiled=True)
    return matrix.astype(stored_dtype)


def _gathered_backward(axes, dtype, _, grad):
    for axis, names in enumerate(axes):
        if names:
            grad = jax.lax.psum_scatter(grad, names, scatter_dimension=axis, tiled=True)
    return (grad,)


_gathered.defvjp(lambda matrix, axes, dtype: (_gathered(matrix, axes, dtype), None), _gathered_backward)


def _in_chunks(module, params, hidden, targets, weights, z_loss, chunk):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def score(hidden, targets, weights):
        logits = module.apply({"params": params}, hidden, method="logits").astype(wide)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = log_z - picked + z_loss * jnp.square(log_z)
        return jnp.sum(loss * weights), jnp.argmax(logits, axis=-1) == targets

    examples, length = targets.shape
    if chunk is None or chunk >= targets.size:
        return score(hidden, targets, weights)
    # Every chunk has tokens of all examples.
    chunks = -(-length // max(1, chunk // examples))
    size = -(-length // chunks)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(examples, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    def step(total, xs):
        loss, right = score(*xs)
        return total + loss, right

    total, right = jax.lax.scan(
        jax.checkpoint(step), jnp.zeros((), wide), (split(hidden), split(targets), split(weights))
    )
    return total, right.swapaxes(0, 1).reshape(examples, -1)[:, :length]
