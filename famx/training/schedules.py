"""Learning-rate schedules: functions of gin settings that return an optax schedule (step -> rate).

Each starts with a linear warm-up from 0 over `warmup_steps` (none by default). At step `s` of the
warm-up the rate is `learning_rate * (s + 1) / (warmup_steps + 1)`, so that step 0 learns too.
"""

from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import optax

from famx.base.describe import remembers
from famx.base.errors import ConfigError
from famx.base.gin_checks import flag_of
from famx.base.ranges import Amount, NonNegative, Positive, Rate
from famx.base.values import checked

_Rate = Callable[[jax.Array], jax.Array]


@gin.configurable
@checked
@remembers
def constant_rate(learning_rate: Rate, warmup_steps: NonNegative = 0) -> optax.Schedule:
    """`learning_rate` at every step after the warm-up."""
    return _warmed_up(learning_rate, warmup_steps, lambda step: jnp.ones_like(step))


@gin.configurable
@checked
@remembers
def warmup_cosine(
    learning_rate: Rate, steps: Positive, warmup_steps: NonNegative = 0, floor: Amount = 0.0
) -> optax.Schedule:
    """Half a cosine from `learning_rate` at the end of the warm-up to `floor` at `steps`.

    `floor` is a rate, not a fraction; it holds from `steps` on.

    Examples:
      >>> rate = warmup_cosine(1e-3, steps=100, warmup_steps=10)
      >>> [round(float(rate(step)), 6) for step in (10, 55, 100)]
      [0.001, 0.0005, 0.0]
    """
    _check("warmup_cosine", learning_rate, warmup_steps, steps, floor)
    low = floor / learning_rate

    def rate(step):
        progress = jnp.clip((step - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        return low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return _warmed_up(learning_rate, warmup_steps, rate)


@gin.configurable
@checked
@remembers
def warmup_rsqrt(learning_rate: Rate, warmup_steps: Positive) -> optax.Schedule:
    """`learning_rate * sqrt(warmup_steps / step)` after the warm-up, which takes at least one step."""
    return _warmed_up(
        learning_rate,
        warmup_steps,
        lambda step: jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps)),
    )


@gin.configurable
@checked
@remembers
def warmup_stable_decay(
    learning_rate: Rate,
    steps: Positive,
    decay_steps: Positive,
    warmup_steps: NonNegative = 0,
    floor: Amount = 0.0,
) -> optax.Schedule:
    """`learning_rate`, then linear decay to `floor` over the last `decay_steps` of the run."""
    _check("warmup_stable_decay", learning_rate, warmup_steps, steps, floor, decay_steps)
    low = floor / learning_rate

    def rate(step):
        left = jnp.clip((steps - step) / decay_steps, 0.0, 1.0)
        return low + (1 - low) * left

    return _warmed_up(learning_rate, warmup_steps, rate)


def _warmed_up(learning_rate: float, warmup_steps: int, rate: _Rate) -> optax.Schedule:
    def schedule(count):
        step = jnp.asarray(count, jnp.float32)
        warmth = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
        return learning_rate * jnp.where(step < warmup_steps, warmth, rate(step))

    return schedule


def _check(
    name: str, learning_rate: float, warmup_steps: int, steps: int, floor: float, decay_steps: int = 0
) -> None:
    """Raises ConfigError unless warm-up and decay fit into the steps, with flags for which they do."""
    flag = lambda setting, value: f"{flag_of(f'{name}.{setting}')}={value}"
    shorter = [flag("warmup_steps", steps // 10)] if steps <= warmup_steps else []
    left = steps - (steps // 10 if shorter else warmup_steps)
    if decay_steps > left:
        shorter.append(flag("decay_steps", max(1, left // 2)))
    hint = f" A run of {steps} steps can have {' '.join(shorter)}."
    if steps <= warmup_steps:
        raise ConfigError(f"steps ({steps}) must be larger than warmup_steps ({warmup_steps}).{hint}")
    if decay_steps > left:
        raise ConfigError(
            f"decay_steps must be at most steps - warmup_steps ({left}), not {decay_steps}.{hint}"
        )
    if floor > learning_rate:
        raise ConfigError(f"floor must be at most learning_rate ({learning_rate}), not {floor}.")
