"""Rotary position embedding that stays exact at any position.

Angles are 32-bit fixed-point turns: the product of an unsigned position and an unsigned frequency
wraps around at a full turn by itself, so the angle between two tokens depends on their distance alone,
at position 10^9 as at position 0. (Float32 angles lose that beyond about 10^5.)
The frequency is rounded to 2^-33 turns per token, 3e-6 radians over 4096 tokens.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from famx.modules.config import DecoderConfig, RopeScaling

_TURN = 2.0**32


@flax.struct.dataclass
class Rotation:
    """Rotation of a layer in fixed-point turns; of all layers with an axis of layers in front.

    Attributes:
      token: turns from one position to the next, uint32 `[Dh / 2]`.
      memory: the layer's part of `Memory.turns`.
    """

    token: jax.Array | np.ndarray
    memory: Any = None


def frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Frequencies in radians per token, float64 `[Dh / 2]`."""
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency
    if scaling.original_length is None:
        return frequency / scaling.factor
    wavelength = 2 * np.pi / frequency
    low = scaling.original_length / scaling.low_frequency_factor
    high = scaling.original_length / scaling.high_frequency_factor
    smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    between = ((1 - smooth) / scaling.factor + smooth) * frequency
    slow = np.where(wavelength > low, frequency / scaling.factor, between)
    return np.where(wavelength < high, frequency, slow)


def frequencies_of(config: DecoderConfig, kind: str) -> np.ndarray:
    """Frequencies of a kind of layer, one of `ROPE_LAYERS`: radians per token, float64 `[Dh / 2]`."""
    if kind == "none":
        return np.zeros(config.head_dim // 2)
    if kind == "local":
        return frequencies(config.head_dim, config.local_rope_base)
    return frequencies(config.head_dim, config.rope_base, config.rope_scaling)


def fixed_point(radians: np.ndarray) -> np.ndarray:
    """Converts angles, float64 `[...]` in [0, 2 pi), to turns, uint32 `[...]`."""
    return np.round(radians / (2 * np.pi) * _TURN).astype(np.uint32)


def rotations(config: DecoderConfig) -> Rotation:
    """The `Rotation` of every layer, `[layers, ...]`."""
    kinds = config.rope_layers or ["global"] * config.num_layers
    layers = np.stack([frequencies_of(config, kind) for kind in kinds])
    return Rotation(fixed_point(layers), config.memory.turns(layers))


def angles(positions, token, beyond=None, dtype=jnp.float32):
    """Angles in radians, `[..., Dh / 2]`, within half a turn of zero.

    Args:
      positions: int32 `[...]`; may be negative.
      token: turns from one position to the next, uint32 `[Dh / 2]`.
      beyond: turns to add, uint32 `[..., Dh / 2]`, or None.
      dtype: dtype of the result, at least float32.
    """
    phase = positions.astype(jnp.uint32)[..., None] * token
    if beyond is not None:
        phase = phase + beyond
    return phase.astype(jnp.int32).astype(dtype) * jnp.asarray(2 * np.pi / _TURN, dtype)


def rotate(x, angle):
    """Rotates `x [..., heads, Dh]` by `angle [..., Dh / 2]` (halves paired, as in Llama)."""
    cos, sin = (f(angle)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(angle.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
