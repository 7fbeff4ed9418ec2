"""All tasks that come with famx, by name: the one place where they are registered."""

import functools
from collections.abc import Callable
from typing import Any

from famx.data.formats import (
    flan,
    gpt3,
    isabelle,
    narrative_qa,
    offline,
    own_chat,
    own_records,
    pg19,
    scrolls,
    xlsum,
)
from famx.data.probes.catalogue import PROBES
from famx.data.sequences.catalogue import SEQUENCES
from famx.data.storage import TextFiles
from famx.data.tasks import registry

TASKS: dict[str, Callable[..., Any]] = {
    **PROBES,
    **SEQUENCES,
    **flan.TASKS,
    **gpt3.TASKS,
    **isabelle.TASKS,
    **narrative_qa.TASKS,
    **offline.TASKS,
    **pg19.TASKS,
    **scrolls.TASKS,
    **xlsum.TASKS,
    "python_stdlib": functools.partial(TextFiles, files=None),
    "own_text": TextFiles,
    **own_records.TASKS,
    **own_chat.TASKS,
}


def register_tasks() -> None:
    """Register `TASKS`, as `import famx.data` does."""
    registry.register_all(TASKS)
