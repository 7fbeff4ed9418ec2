"""Dispatch of attention to a backend."""

import functools

import jax
import jax.numpy as jnp

from famx.modules.attention import blockwise, cudnn, dense, tokamax
from famx.modules.attention.common import attend_parts
from famx.modules.attention.over_mesh import BATCH_AXIS, over_mesh
from famx.modules.backends import WIDTHS, resolve_backend
from famx.modules.config import DecoderConfig


def _splash(*args):
    from famx.modules.attention import splash  # JAX's Pallas kernels for TPUs are slow to import

    return splash.attention(*args)


_KERNELS = {"splash": _splash, "cudnn": cudnn.attention, "tokamax": tokamax.attention}


def token_attention(
    q, keys, values, memory_keys, memory_values, first_block, config: DecoderConfig,
    batch_axis: str = BATCH_AXIS,
):  # fmt: skip
    """Attention output of `C` blocks of tokens.

    Args:
      q: rotated queries `[B, C, S, H, Dh]`; they and the keys may be wider (`column_dimensions`).
      keys, values: `[B, M + C, S, K, Dh]`, the `M` blocks before the first query block included.
      memory_keys, memory_values: columns of the memory before each block `[B, C, N, K, Dh]`.
      first_block: index in its sequence of each example's first query block, int32 `[B]`; blocks
        before the start of the sequence are masked.
      config: sizes, mask and backend; `auto` picks a backend for the mesh's devices
        (`jax.set_mesh`), or for this process's devices if no mesh is set.
      batch_axis: logical name of the axis `B`, by which kernels are partitioned over a mesh.

    Returns:
      `[B, C, S, H, Dh]`.
    """
    args = q, keys, values, memory_keys, memory_values, first_block
    backend = _backend(config)
    if backend in _KERNELS:
        return _of_one_width(functools.partial(_KERNELS[backend], config), args, batch_axis)
    function = blockwise.attention if backend == "blockwise" else dense.attention
    return function(config, *args)


def attend_all(q, parts, config: DecoderConfig, batch_axis: str = BATCH_AXIS):
    """Attention of queries to all columns, in one softmax: of a memory to itself and to a block.

    Args:
      q: rotated queries `[B, N, H, Dh]`.
      parts: pairs of keys and values `[B, X, K, Dh]`.
      config: scale, softcap and backend.
      batch_axis: logical name of the axis `B`.

    Returns:
      `[B, N, H, Dh]`.
    """
    if _backend(config) == "cudnn":
        keys, values = (jnp.concatenate(x, axis=1)[:, None] for x in zip(*parts, strict=True))
        attend = functools.partial(cudnn.attend_all, config)
        return _of_one_width(attend, (q[:, None], keys, values), batch_axis)[:, 0]
    heads_first = [(k.swapaxes(1, 2), v.swapaxes(1, 2), None) for k, v in parts]
    return attend_parts(q, heads_first, config)[0]


def _of_one_width(kernel, args, batch_axis):
    """`over_mesh` of a kernel whose queries, keys and values are equally wide: zeros fill them up."""
    q, _, values, *_ = args
    if q.shape[-1] == values.shape[-1]:
        return over_mesh(kernel, args, batch_axis)
    width = q.shape[-1] + -q.shape[-1] % WIDTHS
    fill = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    args = tuple(x if x.ndim == 1 else fill(x) for x in args)
    return over_mesh(kernel, args, batch_axis)[..., : values.shape[-1]]


def _backend(config):
    return _fitting(config) if config.attention_backend == "auto" else config.attention_backend


def _fitting(config):
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return resolve_backend(config, mesh.abstract_device, mesh.size)
    backend = resolve_backend(config, jax.devices()[0], jax.device_count())
    # Without a mesh it is undefined how several devices would share a kernel.
    return "xla" if backend in _KERNELS and jax.device_count() > 1 else backend
