"""Dispatch of attention to a backend."""

import functools

import jax

from famx.modules.attention import blockwise, cudnn, dense, splash
from famx.modules.attention.over_mesh import BATCH_AXIS, over_mesh
from famx.modules.backends import resolve_backend
from famx.modules.config import DecoderConfig

_KERNELS = {"splash": splash.attention, "cudnn": cudnn.attention}


def token_attention(
    q, keys, values, memory_keys, memory_values, first_block, config: DecoderConfig,
    batch_axis: str = BATCH_AXIS,
):  # fmt: skip
    """Attention output of `C` blocks of tokens.

    Args:
      q: rotated queries `[B, C, S, H, Dh]`.
      keys, values: `[B, M + C, S, K, Dh]`, the `M` blocks before the first query block included.
      memory_keys, memory_values: columns of the memory before each block `[B, C, N, K, Dh]`.
      first_block: index in its sequence of each example's first query block, int32 `[B]`; blocks
        before the start of the sequence are masked.
      config: sizes, mask and backend; `auto` picks a backend for the mesh's platform
        (`jax.set_mesh`), or for this process's devices if no mesh is set.
      batch_axis: logical name of the axis `B`, by which kernels are partitioned over a mesh.

    Returns:
      `[B, C, S, H, Dh]`.
    """
    args = q, keys, values, memory_keys, memory_values, first_block
    backend = config.attention_backend
    if backend == "auto":
        backend = _fitting(config)
    if backend in _KERNELS:
        return over_mesh(functools.partial(_KERNELS[backend], config), args, batch_axis)
    function = blockwise.attention if backend == "blockwise" else dense.attention
    return function(config, *args)


def _fitting(config):
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return resolve_backend(config, mesh.abstract_device.platform, mesh.size)
    backend = resolve_backend(config, jax.default_backend(), jax.device_count())
    # Without a mesh it is undefined how several devices would share a kernel.
    return "xla" if backend in _KERNELS and jax.device_count() > 1 else backend
