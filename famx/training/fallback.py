"""Which checkpoint a run resumes from: the newest whole one, or that of `Run.resume_from`."""

import dataclasses

from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.digests import DamagedCheckpoint


@dataclasses.dataclass(frozen=True)
class Choice:
    """The checkpoint that a run resumes from.

    Attributes:
      step: its step; None: there is none, the run is new.
      origin: the step that `Run.resume_from` has named in this run or an earlier one, for the checkpoints
        to come; None: it has not.
      newer: steps of newer checkpoints, which the run does not continue from.
      notes: sentences for the log about damaged ones.
    """

    step: int | None
    origin: int | None = None
    newer: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def set_newer_aside(self, checkpointer: Checkpointer) -> tuple[str, ...]:
        """Move the newer checkpoints to `MODEL_DIR/set_aside`, so that their steps can be saved again.

        All processes must call it once the run is sure to go on. Returns the sentences for the log.
        """
        if not self.newer:
            return self.notes
        moved = checkpointer.set_aside(self.newer)
        names = ", ".join(path.name for path in moved)
        return (*self.notes, f"Newer than step {self.step}, moved to {moved[0].parent}: {names}.")


def choose(checkpointer: Checkpointer, wanted: int | None) -> Choice:
    """The checkpoint to resume from, compared with its digests; changes nothing.

    Args:
      checkpointer: the checkpoints.
      wanted: `Run.resume_from`. A run that was already resumed from there, and is only started again,
        continues from its newest whole checkpoint.

    Raises:
      ConfigError: there is no such checkpoint, it is damaged, or none is whole.
    """
    steps, notes = checkpointer.all_steps(), []
    if wanted is not None:
        checkpointer.find(wanted)
        later = [step for step in steps if step > wanted and _origin(checkpointer, step) == wanted]
        if later:
            notes.append(f"The run was resumed from step {wanted} before, and continues from there.")
        steps = [step for step in steps if step >= wanted] if later else [wanted]
    errors = []
    for step in reversed(steps):
        try:
            checkpointer.verify(step)
        except DamagedCheckpoint as error:
            errors.append(error)
            continue
        origin = wanted if wanted is not None else _origin(checkpointer, step)
        newer = tuple(other for other in checkpointer.all_steps() if other > step)
        return Choice(step, origin, newer, (*notes, *(error.finding for error in errors)))
    if not errors:
        return Choice(None)
    if len(errors) == 1:
        raise errors[0]
    raise DamagedCheckpoint(
        f"No checkpoint in {checkpointer.model_dir} is whole; of the newest: {errors[0]}"
    )


def _origin(checkpointer: Checkpointer, step: int) -> int | None:
    """The step that the run with this checkpoint was resumed from by `Run.resume_from`, or None."""
    try:
        position = checkpointer.data_state(step)
    except DamagedCheckpoint:
        return None
    return position.get("resumed_from") if isinstance(position, dict) else None
