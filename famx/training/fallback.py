"""Which checkpoint a run resumes from: the newest whole one, or that of `Run.resume_from`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from famx.base.distributed import agreed
from famx.base.errors import ConfigError
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.digests import DamagedCheckpoint


class Resumed(NamedTuple):
    """What a run resumes from.

    Attributes:
      step: step of the checkpoint; None: there is none, the run is new.
      content: what was read from it.
      origin: the step that `Run.resume_from` has named in this run or an earlier one, for the checkpoints
        to come; None: it has not.
      notes: sentences for the log.
    """

    step: int | None
    content: Any = None
    origin: int | None = None
    notes: tuple[str, ...] = ()


def resume(checkpointer: Checkpointer, wanted: int | None, read: Callable[[int], Any]) -> Resumed:
    """Read the checkpoint to resume from; newer ones are moved to `MODEL_DIR/set_aside`.

    So steps that are taken again can be saved again, and nothing is lost.

    Args:
      checkpointer: the checkpoints.
      wanted: `Run.resume_from`. A run that was already resumed from there, and is only started again,
        goes on from its newest checkpoint.
      read: reads a checkpoint, in all processes; raises DamagedCheckpoint if it is damaged.

    Raises:
      ConfigError: there is no such checkpoint, or none is whole.
    """
    steps, notes = checkpointer.all_steps(), []
    if wanted is not None:
        checkpointer.find(wanted)
        later = [step for step in steps if step > wanted and _origin(checkpointer, step) == wanted]
        if later:
            notes.append(f"The run was resumed from step {wanted} before, and goes on from there.")
        steps = [step for step in steps if step >= wanted] if later else [wanted]
    if not steps:
        return Resumed(None)
    sentences = []
    for step in reversed(steps):
        content, sentence = None, None
        try:
            content = read(step)
        except DamagedCheckpoint as error:
            sentence = str(error)
        sentence = agreed(sentence)
        if sentence is None:
            break
        if step == wanted:
            raise DamagedCheckpoint(sentence)
        sentences.append(sentence)
    else:
        raise DamagedCheckpoint(
            sentences[0] if len(sentences) == 1 else
            f"None of the checkpoints in {checkpointer.model_dir} is whole; of the newest: {sentences[0]}"
        )  # fmt: skip
    moved = checkpointer.set_aside([other for other in checkpointer.all_steps() if other > step])
    for sentence in sentences:
        notes.append(DamagedCheckpoint(sentence).finding)
    if moved:
        names = ", ".join(path.name for path in moved)
        notes.append(f"Moved to {moved[0].parent}: {names}, which are newer than step {step}.")
    origin = wanted if wanted is not None else _origin(checkpointer, step)
    return Resumed(step, content, origin, tuple(notes))


def _origin(checkpointer: Checkpointer, step: int) -> int | None:
    """The step that the run with this checkpoint was resumed from by `Run.resume_from`, or None."""
    try:
        position = checkpointer.data_state(step)
    except ConfigError:
        return None
    return position.get("resumed_from") if isinstance(position, dict) else None
