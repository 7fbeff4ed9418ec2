"""Products of activations and weights, each in the form that its device computes fast."""

import math

import jax
import jax.numpy as jnp

from famx.modules.weights import platform


def product(x, kernel, axes: int, dtype=None):
    """`tensordot` of the last `axes` axes of `x` with the first of `kernel`, as one of two matrices.

    With several token axes, the CPU compiler chooses a slow layout for the gradient. On GPUs a product of
    a single row is computed twice: of one alone XLA makes a sum that first copies the kernel.

    Args:
      x: array `[..., *inner]`.
      kernel: array `[*inner, *outer]`, of `axes` inner axes.
      axes: number of axes that are summed over.
      dtype: dtype of the result `[..., *outer]`; None: that of both arrays.
    """
    inner, outer = kernel.shape[:axes], kernel.shape[axes:]
    rows = x.reshape(-1, math.prod(inner))
    kernel = kernel.reshape(rows.shape[1], -1)
    if rows.shape[0] == 1 and platform() == "gpu":
        twice = jax.lax.optimization_barrier(jnp.concatenate([rows, rows]))
        y = matrix_product(twice, kernel, dtype)[:1]
    else:
        y = matrix_product(rows, kernel, dtype)
    return y.reshape(x.shape[: x.ndim - axes] + outer)


def matrix_product(x, y, dtype=None):
    """`x @ y` of two matrices, in `dtype`; None: their own.

    CPUs that multiply bfloat16 matrices fast do so into a float32 result, which is rounded here, also in
    the gradients: for a bfloat16 result XLA copies both matrices to float32. A single row has no such
    kernel. There is no forward-mode derivative.
    """
    if dtype is None and _rounds(x, y):
        return _rounded(x, y)
    return jnp.matmul(x, y, preferred_element_type=dtype)


def _rounds(x, y) -> bool:
    return x.dtype == y.dtype == jnp.bfloat16 and x.shape[0] > 1 and platform() == "cpu"


def _contracted(x, y, axis_x: int, axis_y: int):
    dimensions = (((axis_x,), (axis_y,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _rounded(x, y):
    return _contracted(x, y, 1, 0)


def _gradients(matrices, gradient):
    x, y = matrices
    return _contracted(gradient, y, 1, 1), _contracted(x, gradient, 0, 0)


_rounded.defvjp(lambda x, y: (_rounded(x, y), (x, y)), _gradients)
