"""Heads: what is predicted at each position.

`Decoder.logits` are those of the vocabulary: the next token or, at positions that the loss weights mark,
a class. `Values`, `DecoderConfig.values`, adds numbers: a value, or the next vector.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from famx.base.ranges import Positive
from famx.base.values import checked
from famx.modules.products import product


@checked
@dataclasses.dataclass(frozen=True)
class Values:
    """Numbers that are predicted at each position: one value, or as many as the next vector has.

    Attributes:
      width: how many.
      loss: "squared" or "absolute" differences; their mean over the `width` numbers is the loss of a
        position.
    """

    width: Positive = 1
    loss: Literal["squared", "absolute"] = "squared"

    def losses(self, values, targets):
        """The loss of each position, at least float32 `[...]`, of values and targets `[..., width]`."""
        wide = jnp.promote_types(values.dtype, jnp.float32)
        difference = values.astype(wide) - targets.astype(wide)
        of_numbers = jnp.square(difference) if self.loss == "squared" else jnp.abs(difference)
        return jnp.mean(of_numbers, axis=-1)


class ValueHead(nn.Module):
    """An affine map of normalised hidden states `[..., D]` to values `[..., width]`."""

    config: Any

    @nn.compact
    def __call__(self, x):
        c, width = self.config, self.config.values.width
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        place = nn.with_logical_partitioning
        shape = (c.embed_dim, width)
        kernel = self.param("kernel", place(init, ("embed", None)), shape, c.param_dtype)
        bias = self.param("bias", place(nn.initializers.zeros, (None,)), (width,), c.param_dtype)
        return product(x.astype(c.dtype), kernel.astype(c.dtype), 1) + bias.astype(c.dtype)
