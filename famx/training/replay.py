"""Runs the step again in which a run's numbers went wrong, and says where they did.

The steps from the checkpoint before it are taken once more, with the same batches and random keys, so the
carried states of every kind of state passing are those of the run. Nothing is written.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.model_dir.checkpointer import Checkpointer
from famx.training import loop
from famx.training.health import GoodCheckpoints, Unsound, Watch
from famx.training.initial_state import new_state
from famx.training.metrics import RecentMetrics
from famx.training.nonfinite import Origin, first_nonfinite
from famx.training.run import Run
from famx.training.run_log import RunLog
from famx.training.session import Session
from famx.training.speed import Profile
from famx.training.stages import Place, stages_of
from famx.training.step import TrainState, make_gradient, make_initializer, step_key
from famx.training.stopping import Stopped, read_stopped

_ARGUMENTS = {"params": "parameters", "kept": "carried states"}  # of the step, by their names; or "batch"
_MEMORY_NAMES = ("memory_step", "_close", "scan_memory", "_start", "initial_state", "_remember", "_climb")


def replay(run: Run, say: Callable[[str], None] = print) -> Origin | None:
    """Takes the steps of `run.model_dir` again that lead to `stopped.json`.

    Args:
      run: the run that stopped, or one with other settings to see whether these help.
      say: what each line of the report is given to.

    Returns:
      The operation that made the first value that is not finite; None if there is none.

    Raises:
      ConfigError: the run has not stopped because of its numbers, or `run` does not fit its checkpoints.
    """
    if jax.process_count() > 1:
        raise ConfigError("A replay runs in one process: start it without --multiprocess.")
    directory = as_path(run.model_dir)
    stopped = read_stopped(directory)
    say(f"The run stopped: {stopped.cause}.")
    stages = tuple(stage.ready() for stage in stages_of(run))
    stages, data = loop.open_data(stages)
    with contextlib.ExitStack() as stack:
        session = _session(stages, data, directory, stopped, stack)
        begin = "the beginning" if stopped.checkpoint is None else f"checkpoint {stopped.checkpoint}"
        say(f"Step {stopped.step + 1} again, from {begin}, {stopped.step - session.step} steps before.")
        while session.step <= stopped.step:
            loop.observe(session)
            rows, batch, metrics = loop.take_step(session)
            if session.step == stopped.step + 1:
                _compare(stopped, rows.trained, session.run, say)
            if float(metrics["skipped"].total):
                return _explain(session, batch, say)
            try:
                session.check_sound()
            except Unsound as error:
                norm = float(metrics["gradient_norm"].compute())
                say(f"{error}. Its gradient was finite, with a norm of {norm:.4g}, so it is the update")
                say("that was too large: lower the learning rate, or clip the gradient.")
                return None
        say("All its values are finite here: the settings, the devices or the version of jax are others.")
        return None


def _session(stages, data, directory, stopped: Stopped, stack) -> Session:
    """The session at the checkpoint before the step; writes nothing."""
    last, place, step = stages[-1].run, Place(stages, stages[-1].run.steps), stopped.checkpoint
    checkpointer, position = stack.enter_context(Checkpointer(directory, read_only=True)), {}
    if step is not None:
        position = checkpointer.data_state(step)
        if "stage" in position:
            place.set_state(position["stage"])
    run, notes = place.stage.run, []
    initialize, abstract = make_initializer(run)
    if step is None:
        state = new_state(run, data, initialize, None, notes)
    else:
        state = TrainState.from_checkpoint(checkpointer.restore(step, abstract.to_checkpoint())[0])
        data.feeds[place.index].set_state(position["feed"])
    count = int(state.step)
    session = Session(
        last, data, directory, Profile(None, directory, run.steps), checkpointer, None,
        RunLog(str(directory), enabled=False), place, state, count,
        RecentMetrics(position.get("pending", ())), position.get("logged", count), 0,
        Watch(last.health, last.model.config.vocab_size),
        GoodCheckpoints(directory, (), last.health.confirm_steps, writes=False), count,
    )  # fmt: skip
    stack.callback(session.close)
    stack.enter_context(run.on_mesh())
    session.enter(abstract)
    return session


def _compare(stopped: Stopped, batch, run: Run, say) -> None:
    """Says what differs from the step of the run: its batch or its random key."""
    key = np.asarray(jax.random.key_data(step_key(run, stopped.step))).tolist()
    if key != stopped.key:
        say("The random key is another: the run had another RANDOM_SEED.")
    same = batch.keys() == stopped.batch.keys() and all(
        np.array_equal(batch[name], stopped.batch[name], equal_nan=batch[name].dtype.kind == "f")
        for name in batch
    )
    if not same:
        say("The batch is another than that of the run: the data or their settings have changed.")


def _explain(session: Session, batch, say) -> Origin | None:
    """Finds where the values of the last step, which was skipped, went wrong."""
    run, step = session.run, session.step - 1
    state = session.state.replace(step=session.state.step - 1)  # a skipped step changes nothing else
    compute, states = make_gradient(run), run.state_passing

    def gradient(state, batch):
        part = states.part(run.trainable, state.params, state.kept)
        grads, (metrics, _) = compute(part, state, batch, step_key(run, state.step))
        return metrics["loss"].compute(), optax.tree.norm(grads)

    loss, norm = map(float, jax.jit(gradient)(state, batch))
    say(f"Step {step + 1}: loss {loss:.4g}, norm of the gradient {norm:.4g}.")
    origin = first_nonfinite(gradient, state, batch)
    if origin is None:
        say("One by one all operations are finite: they are not where the compiler joins several.")
        return None
    for line in describe(origin, run.model.config.num_layers):
        say(line)
    return origin


# ---------------------------------------------------------------- description


@dataclasses.dataclass(frozen=True)
class Where:
    """Where in the model an operation is.

    Attributes:
      layer: index of the layer, from 0, or None.
      block: index of the block in the rows, from 0, or None.
      part: "attention", "feed-forward", "memory update", "start of the memory", "embedding", "loss" or
        "others"; a part of the memory's in brackets. "parameters", "batch" or "carried states" if a value
        was not finite before the step.
      backward: whether it is in the backward pass.
    """

    layer: int | None
    block: int | None
    part: str
    backward: bool


def where(origin: Origin) -> Where:
    """The place in the model of an operation."""
    layer = block = None
    if origin.operation == "argument":
        kind, *path = origin.names
        if kind == "kept" or path[:1] == ["layers"]:
            layer = origin.index[0]
        return Where(layer, None, _ARGUMENTS.get(kind, "batch"), False)
    for loop_ in origin.loops:
        if loop_.names[-1:] == ("Decoder._start",) or loop_.names[-1:] == ("Decoder._scan_layers",):
            layer = loop_.index
        elif "layers.scan_memory" in loop_.names:
            block = loop_.index
    names = [name.split(".")[-1] for name in origin.names]
    if layer is None and "_start" in names and origin.index:  # all layers at once
        layer = origin.index[0]
    return Where(layer, block, _part(names), origin.backward)


def _part(names: list[str]) -> str:
    half = None
    if "mlp" in names or "mlp_norm" in names or "post_mlp_norm" in names:
        half = "feed-forward"
    elif any(name in names for name in ("read_chunk", "finish", "qkv", "project", "_close")):
        half = "attention"
    memory = [name for name in names if name in _MEMORY_NAMES]
    if memory:
        part = "start of the memory" if {"_start", "initial_state"} & set(memory) else "memory update"
        return part if half is None else f"{part} ({half})"
    if half is not None:
        return half
    if "_embed" in names:
        return "embedding"
    if {"logits", "final_norm"} & set(names) or any("_chunks" in name for name in names):
        return "loss"
    return "others"


def describe(origin: Origin, layers: int) -> list[str]:
    """Lines that say where an operation is; `layers`: number of layers of the model."""
    place = where(origin)
    direction = "backward" if place.backward else "forward"
    words = [] if place.layer is None else [f"layer {place.layer} of 0 to {layers - 1}"]
    words += [] if place.block is None else [f"block {place.block}"]
    words += [place.part, f"{direction} pass"]
    names = " / ".join(origin.names) or "the whole step"
    if origin.operation == "argument":
        where_ = ", ".join([*words[:-1], f"{origin.kind} at {list(origin.index)} of {names}"])
        return [f"A value is not finite before the step begins: {where_}."]
    return [
        f"The first value that is not finite: {', '.join(words)}.",
        f"  {origin.kind} at {list(origin.index)} of the result of {origin.operation} in {names};",
        f"  the largest finite value that it was made of is {origin.largest:.4g}.",
    ]
