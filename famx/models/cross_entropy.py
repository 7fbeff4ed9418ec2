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

# Name of the loop over chunks in compiled programs; famx.scale reads their number from it.
CHUNKS = "at_most_{}_chunks"
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
    params = {name: leaf for name, leaf in params.items() if name in (*_MATRICES, "final_norm")}
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


# ---------------------------------------------------------------- one device


def _in_chunks(module, params, hidden, targets, weights, z_loss, chunk):
    """`cross_entropy` of one device; only tokens with a weight cost anything.

    Tokens with a weight come first, and the loop ends with the last chunk that has one.
    """
    tokens, width = targets.size, hidden.shape[-1]
    size = min(chunk or tokens, tokens)
    order = jnp.argsort(weights.reshape(-1) == 0, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -tokens % size), constant_values=tokens).reshape(-1, size)
    chunks = -(-jnp.sum(weights != 0, dtype=jnp.int32) // size)
    rows = targets.reshape(-1), weights.reshape(-1), order, chunks
    total, right = _sum((module, z_loss), params, hidden.reshape(-1, width), rows)
    return total, right.reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss, params, hidden, rows):
    """Sum of the losses, and whether the arg-max of each weighted token is its target, bool `[tokens]`.

    Args:
      loss: the decoder and the coefficient of the squared log-partition.
      params: parameters of the decoder's `logits`.
      hidden: `[tokens, D]`.
      rows: targets and weights `[tokens]`; indices of the tokens of each chunk `[chunks, size]`, of which
        those out of bounds stand for no token; and the number of chunks that count.
    """
    targets, weights, order, chunks = rows

    def step(number, sums):
        total, right = sums
        index = order[number]
        logits = _logits(loss[0], params, _take(hidden, index))
        value, hit, _ = _score(loss[1], logits, _take(targets, index), _take(weights, index))
        return total + value, right.at[index].set(hit, mode="drop")

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    with jax.named_scope(CHUNKS.format(len(order))):
        return jax.lax.fori_loop(0, chunks, step, (zero, jnp.zeros(targets.shape, bool)))


def _sum_forward(loss, params, hidden, rows):
    """`_sum`, and its gradients in the same loop, so that logits are computed once and none is kept.

    Nothing is computed for parameters that do not learn, nor for `hidden` if it depends on none that do.
    """
    learn = jax.tree.map(lambda x: x.perturbed, (params, hidden))
    params, hidden, rows = jax.tree.map(lambda x: x.value, (params, hidden, rows))
    targets, weights, order, chunks = rows
    module, z_loss = loss
    cast = lambda x: x.astype(module.config.dtype) if x.ndim > 1 else x
    matrices = jax.tree.map(cast, params)  # once, not in every chunk

    def step(number, sums):
        total, right, of_params, of_hidden = sums
        index = order[number]
        inputs = matrices, _take(hidden, index)
        logits, pullback = jax.vjp(
            lambda some: _logits(module, *_filled(some, inputs)), _only(inputs, learn)
        )
        value, hit, gradient = _score(z_loss, logits, _take(targets, index), _take(weights, index))
        ((more, of_rows),) = pullback(gradient.astype(logits.dtype))
        of_params = jax.tree.map(lambda total, x: total + x.astype(total.dtype), of_params, more)
        put = lambda total, x: total.at[index].set(x, mode="drop")
        return total + value, put(right, hit), of_params, jax.tree.map(put, of_hidden, of_rows)

    wide = lambda dtype: jnp.promote_types(dtype, jnp.float32)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), params)
    start = jnp.zeros((), wide(hidden.dtype)), jnp.zeros(targets.shape, bool)
    with jax.named_scope(CHUNKS.format(len(order))):
        total, right, *gradients = jax.lax.fori_loop(
            0, chunks, step, (*start, *_only((zeros, 0 * hidden), learn))
        )
    like = _only((params, hidden), learn)
    return (total, right), jax.tree.map(lambda x, like: x.astype(like.dtype), tuple(gradients), like)


def _sum_backward(loss, gradients, grad):
    scaled = jax.tree.map(lambda x: (x * grad[0]).astype(x.dtype), gradients)
    return *scaled, None


_sum.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _only(tree, learn):
    """The leaves that learn; None in place of the others."""
    return jax.tree.map(lambda x, learns: x if learns else None, tree, learn)


def _filled(some, tree):
    """`some`, with the leaves of `tree` in place of None."""
    return jax.tree.map(lambda x, y: y if x is None else x, some, tree, is_leaf=lambda x: x is None)


def _logits(module, params, hidden):
    return module.apply({"params": params}, hidden, method="logits")


def _score(z_loss: float, logits, targets, weights):
    """Sum of weighted losses, whether each arg-max is the target, and the gradient of the logits.

    Args:
      logits: `[size, V]`; `targets` and `weights`: `[size]`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    losses = log_z - picked + z_loss * jnp.square(log_z)
    # Compared with column numbers, the target costs no scatter into an array of logits.
    is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
    probabilities = jnp.exp(logits - log_z[:, None])
    gradient = probabilities * (1 + 2 * z_loss * log_z[:, None]) - is_target
    hits = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(losses * weights), hits, gradient * weights[:, None]


def _take(array, index):
    """Rows of an array; those out of bounds are zero, so that they have no weight."""
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)
