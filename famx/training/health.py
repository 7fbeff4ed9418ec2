"""Health of a run's numbers: limits, alarms, and which checkpoints are good.

A loss, a parameter or a memory may go wrong long before a value is infinite: parameters of 1e30 still
give a finite loss, that of a model which knows nothing. So the numbers of a run are compared with limits
and with what was usual in the steps before.

A checkpoint is good if

* its parameters lie within `Health.largest_parameter`, and the optimiser's moments are finite, which is
  checked on the devices when it is saved (`check_sound`); one that is not is never written;
* the next `Health.confirm_steps` steps had a finite gradient, a finite memory, and a loss that was no
  spike (`Watch`).

The newest good checkpoint, and those on which these steps have not decided yet, are kept, whatever
`Run.checkpoints_to_keep` says (`GoodCheckpoints`).
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from flax import serialization, traverse_util

from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.base.ranges import Amount, Positive
from famx.base.values import checked
from famx.training.metrics import Sums, mean

_MEMORY = "memory_rms"  # the metric of the size of a memory, of every memory that has one
_WORST_START = 10  # multiple of the loss of knowing nothing that no model begins with


_AtLeastOne = Annotated[float, Ge(1)]


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Health:
    """Limits of the numbers of a run. An alarm is a line of the log and an event in the metrics.

    Usual is the median over the latest steps of the stage.

    Attributes:
      window: number of steps of which the usual values are the median.
      least_steps: number of steps before the first alarm.
      loss_ratio: a loss is a spike only above this multiple of the usual one,
      loss_deviations: and above the usual one by this number of standard deviations, which are estimated
        from the median deviation,
      loss_margin: and above the usual one by this number of nats.
      memory_ratio: alarm if the RMS of the memory is this multiple of the usual one, or this part of it.
      largest_parameter: a parameter beyond this absolute value ends the run at the next checkpoint.
      confirm_steps: number of steps after a checkpoint that must go well for it to be good.

    Raises:
      ConfigError: on construction, if a limit is out of range.
    """

    window: Annotated[int, Ge(2)] = 50
    least_steps: Annotated[int, Ge(2)] = 20
    loss_ratio: _AtLeastOne = 1.5
    loss_deviations: Amount = 8.0
    loss_margin: Amount = 0.5
    memory_ratio: _AtLeastOne = 10.0
    largest_parameter: _AtLeastOne = 1e6
    confirm_steps: Positive = 5

    def __post_init__(self):
        if self.least_steps > self.window:
            raise ConfigError(
                f"Health.least_steps is {self.least_steps}, but Health.window holds only {self.window}"
                " steps: lower the first or raise the second."
            )


# ---------------------------------------------------------------- alarms


class Alarm(NamedTuple):
    """Something unusual in the metrics of a step.

    Attributes:
      name: "loss_spike", "memory_alarm" or "not_finite".
      sentence: what happened, for the log.
      values: numbers for the metrics.
    """

    name: str
    sentence: str
    values: dict[str, float]


class Watch:
    """Compares the metrics of each step with those before.

    All that it knows follows from metrics that it has observed, and belongs to a checkpoint; so a resumed
    run raises the same alarms as an uninterrupted one.

    Args:
      health: the limits.
      vocab_size: number of tokens, which gives the loss of a model that knows nothing.
    """

    def __init__(self, health: Health, vocab_size: int):
        self._health, self._chance = health, math.log(vocab_size)
        self._losses: list[float] = []
        self._memory: list[float] = []
        self._raised: list[str] = []  # names of alarms that last

    def observe(self, step: int, sums: Sums) -> tuple[bool, list[Alarm]]:
        """Takes the metrics of a step into account.

        Args:
          step: number of the step, from 1.
          sums: its metrics.

        Returns:
          Whether the step went well: gradient and memory are finite, and the loss is no spike. And the
          alarms; one that lasts for several steps is raised once.
        """
        if mean(sums, "skipped"):
            sentence = f"Step {step}: the gradient was not finite, so the step changed nothing."
            return False, self._raise({"not_finite": (sentence, {"not_finite": 1.0})})
        found, well = {}, True
        loss, known = mean(sums, "loss"), sums.get("loss", (0, 0))[1] != 0
        if known and not self._usual_loss(loss):
            well = False
            usual = statistics.median(self._losses) if self._losses else self._chance
            sentence = f"Step {step}: the loss rose to {loss:.4g} from usually {usual:.4g}."
            found["loss_spike"] = sentence, {"loss_spike": loss, "usual_loss": usual}
        if _MEMORY in sums:
            rms = mean(sums, _MEMORY)
            finite = math.isfinite(rms)
            well = well and finite
            if not finite or not self._usual_memory(rms):
                usual = statistics.median(self._memory) if self._memory else 0.0
                sentence = f"Step {step}: the RMS of the memory is {rms:.4g}, usually {usual:.4g}."
                found["memory_alarm"] = sentence, {"memory_alarm": rms, "usual_memory_rms": usual}
            if finite:
                self._memory = [*self._memory, rms][-self._health.window :]
        if known and math.isfinite(loss):
            self._losses = [*self._losses, loss][-self._health.window :]
        return well, self._raise(found)

    def restart(self) -> None:
        """Begins a stage, whose losses may be others."""
        self._losses, self._memory, self._raised = [], [], []

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON values."""
        return {"losses": self._losses, "memory": self._memory, "raised": self._raised}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state that `get_state` returned."""
        self._losses, self._memory = list(state["losses"]), list(state["memory"])
        self._raised = list(state["raised"])

    def copy(self) -> "Watch":
        """A watch that has seen the same."""
        other = object.__new__(Watch)
        other.__dict__ |= self.__dict__
        return other

    def _usual_loss(self, loss: float) -> bool:
        health, losses = self._health, self._losses
        if not math.isfinite(loss):
            return False
        if len(losses) < health.least_steps:
            return loss <= _WORST_START * max([self._chance, *losses])
        usual = statistics.median(losses)
        if loss <= max(health.loss_ratio * usual, usual + health.loss_margin):
            return True
        deviation = 1.4826 * statistics.median(abs(x - usual) for x in losses)  # of a normal distribution
        return loss <= usual + health.loss_deviations * deviation

    def _usual_memory(self, rms: float) -> bool:
        if len(self._memory) < self._health.least_steps:
            return True
        usual, ratio = statistics.median(self._memory), self._health.memory_ratio
        return usual / ratio <= rms <= usual * ratio

    def _raise(self, found: Mapping[str, tuple[str, dict[str, float]]]) -> list[Alarm]:
        new = [Alarm(name, *found[name]) for name in found if name not in self._raised]
        self._raised = list(found)
        return new


# ---------------------------------------------------------------- parameters and moments


class Unsound(Exception):
    """Numbers with which a run cannot continue.

    Args:
      cause: what is wrong with them, in words that begin a sentence.
      step: the step, counted from 0, in which they went wrong as far as is known.
    """

    def __init__(self, cause: str, step: int):
        super().__init__(cause)
        self.step = step


def check_sound(params: Any, opt_state: Any, health: Health, step: int) -> None:
    """Checks parameters and the optimiser's moments; the devices read them once.

    Args:
      params: parameters.
      opt_state: optax state.
      health: the limits.
      step: number of steps taken.

    Raises:
      Unsound: a parameter or a moment is out of its range.
    """
    largest, finite = map(float, jax.device_get(_extent(params, opt_state)))
    if largest <= health.largest_parameter and finite:
        return
    if not largest <= health.largest_parameter:  # NaN is not, either
        name, value = _largest(params)
        raise Unsound(f"The parameter {name} is {value:.3g} after step {step}", step - 1)
    name, value = _largest(serialization.to_state_dict(opt_state))
    raise Unsound(f"The optimiser's {name} is {value:.3g} after step {step}", step - 1)


def _real(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]


@jax.jit
def _extent(params: Any, opt_state: Any) -> tuple[jax.Array, jax.Array]:
    """The largest absolute parameter, NaN if there is one, and whether all moments are finite."""
    zero = jnp.float32(0)
    largest = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in _real(params)]
    finite = [jnp.all(jnp.isfinite(x)) for x in _real(opt_state)]
    return jnp.max(jnp.stack([zero, *largest])), jnp.all(jnp.stack([jnp.bool_(True), *finite]))


def _largest(tree: Any) -> tuple[str, float]:
    """The place 'layers/mlp/up/kernel[1, 5, 2]' and value of what is not finite, or else is largest."""

    def of_leaf(x) -> tuple[float, int, float]:
        size = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
        index = jnp.argmax(size)
        return tuple(jax.device_get((jnp.max(size), index, x.ravel()[index])))

    flat = {"/".join(path): x for path, x in traverse_util.flatten_dict(tree).items()}
    found = {name: of_leaf(x) for name, x in flat.items() if _real(x)}
    name = max(found, key=lambda name: found[name][0])
    index = np.unravel_index(int(found[name][1]), flat[name].shape)
    return f"{name}{list(map(int, index))}", float(found[name][2])


# ---------------------------------------------------------------- good checkpoints


class GoodCheckpoints:
    """Which checkpoints of a `MODEL_DIR` are good; process 0 keeps a list in good_checkpoints.json.

    All processes read the list when the run begins, and observe the same steps.

    Args:
      directory: the `MODEL_DIR`.
      existing: steps of its checkpoints up to where the run begins.
      confirm_steps: number of steps after a checkpoint that must go well.
      writes: whether this process writes the list.
    """

    def __init__(
        self, directory: pathlib.Path, existing: Collection[int], confirm_steps: int, writes: bool
    ):
        self._path, self._steps, self._writes = directory / "good_checkpoints.json", confirm_steps, writes
        self._good = [step for step in _listed(self._path) if step in existing]
        self._pending = {max(existing): 0} if existing else {}  # steps that went well after each

    @property
    def newest(self) -> int | None:
        """The step of the newest good checkpoint, or None."""
        return max(self._good, default=None)

    @property
    def kept(self) -> frozenset[int]:
        """Steps of checkpoints that must not be deleted: the newest good one and the undecided ones."""
        return frozenset({*self._good[-1:], *self._pending})

    def saved(self, step: int) -> None:
        """Notes that a sound checkpoint is being saved after `step` steps."""
        self._pending[step] = 0

    def observe(self, step: int, well: bool, existing: Callable[[], Collection[int]]) -> None:
        """Notes whether a step went well.

        Args:
          step: number of the step, from 1.
          well: result of `Watch.observe`.
          existing: returns the steps of the checkpoints that exist.
        """
        after = [saved for saved in self._pending if saved < step]
        if not well:
            for saved in after:
                del self._pending[saved]
            return
        for saved in after:
            self._pending[saved] += 1
        found = [saved for saved in after if self._pending[saved] >= self._steps]
        if not found:
            return
        for saved in found:
            del self._pending[saved]
        # A checkpoint that is still being written is not among the existing ones.
        known = existing()
        self._good = [step for step in self._good if step in known] + sorted(found)
        if self._writes:
            write_json(self._path, {"steps": self._good})


def _listed(path: pathlib.Path) -> list[int]:
    """The steps in the list; none if there is no list or it is damaged: the next good one begins it."""
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        return [step for step in steps if isinstance(step, int)]
    except (OSError, ValueError, TypeError, KeyError):
        return []
