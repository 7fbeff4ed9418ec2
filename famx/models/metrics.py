"""Metrics as small pytrees that add up: over microbatches, steps, hosts."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A weighted mean: float32 scalars `total` and `count`."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values, weights=1.0) -> "Mean":
        """The mean of `values` with `weights`, broadcastable to each other."""
        values = jnp.asarray(values, jnp.float32)
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), values.shape)
        return cls(jnp.sum(values * weights), jnp.sum(weights))

    @classmethod
    def empty(cls) -> "Mean":
        """The mean of nothing, to merge others into."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def merge(self, other: "Mean") -> "Mean":
        """The mean over the values of both."""
        return type(self)(self.total + other.total, self.count + other.count)

    def reduce(self) -> "Mean":
        """Sums over the leading axis, such as that of microbatches."""
        return type(self)(jnp.sum(self.total, 0), jnp.sum(self.count, 0))

    def compute(self):
        """The mean; 0 where the weights sum to 0."""
        return self.total / jnp.where(self.count == 0, 1, self.count)
