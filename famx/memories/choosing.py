"""Scores by which memories choose between rows."""

import jax
import jax.numpy as jnp


def rounded(scores):
    """The scores to the nearest 1/1024, times 1024, without gradient.

    Rows of equal tokens have equal scores. Without this the rounding of a program would decide between
    them, and text read in other pieces would end in another memory.
    """
    return jnp.round(jax.lax.stop_gradient(scores) * 1024)
