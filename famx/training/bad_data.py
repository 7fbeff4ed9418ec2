"""Data that cannot be used: a look before the run, and what happens when a batch cannot be made."""

import jax

from famx.base.errors import BadData, BadRecord, ConfigError
from famx.data.tasks import Kind, kind_of
from famx.data.tasks.checking import check_documents
from famx.training.feeds import Rows
from famx.training.run import Data
from famx.training.session import Session

_HOW_TO_SKIP = (
    "Set --gin.Data.on_bad_record=skip to leave out such records, or mend it; a run in progress"
    " then needs --gin.train.allow_changes=\"('data',)\"."
)


def look_at(task, data: Data) -> list[str]:
    """Sentences about bad documents among the first ones, if they are to be skipped.

    Raises:
      ConfigError: there is a bad document that is not to be skipped, or the task has no documents.
    """
    if kind_of(task) not in (Kind.DOCUMENTS, Kind.SCORED):
        if data.skips_bad:
            raise ConfigError(
                "Data.on_bad_record = 'skip' leaves out documents, and the task has none: leave it out."
            )
        return []
    try:
        found = check_documents(task, data.skips_bad)
    except BadRecord as error:
        raise BadRecord(f"{error} {_HOW_TO_SKIP}") from error
    return [f"{len(found)} bad records will be skipped; the first: {found[0]}"] if found else []


def take(session: Session) -> Rows:
    """The rows of the next step, with a line in the log about bad records that they left out."""
    try:
        rows = session.ahead.take()
    except BadData as error:
        raise _with_checkpoint(session, error) from error
    if rows.skipped > session.bad_records:
        session.bad_records = rows.skipped
        counted = f"{rows.skipped} bad record{'s' * (rows.skipped > 1)} skipped so far"
        session.log.message(f"Step {session.step}: {counted}; the last: {rows.last_skipped}")
    return rows


def _with_checkpoint(session: Session, error: BadData) -> BadData:
    """The error of data that ends the run, after a checkpoint of the step before it.

    Several processes save together, and here only one may know of the error.
    """
    sentence = str(error)
    if jax.process_count() == 1:
        if session.step != session.saved or session.checkpointer.latest_step() is None:
            session.save()
        session.checkpointer.wait()
        sentence += f" The run is saved at step {session.step}."
    if isinstance(error, BadRecord):
        sentence += f" {_HOW_TO_SKIP}"
    return type(error)(sentence)
