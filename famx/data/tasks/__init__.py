"""Tasks: their kinds, the registry of their names, text tasks, mixtures and suites."""

from famx.data.tasks.indexed import IndexedDocuments
from famx.data.tasks.kinds import (
    SPLITS,
    Kind,
    Made,
    Scored,
    SeqioTask,
    has_settings,
    kind_of,
    vocabulary_of,
)
from famx.data.tasks.mixtures import Mixture
from famx.data.tasks.registry import get, names, register
from famx.data.tasks.suites import Suite
from famx.data.tasks.text_task import TextTask, register_task, task_factories

__all__ = [
    "IndexedDocuments",
    "Kind",
    "Made",
    "Mixture",
    "SPLITS",
    "Scored",
    "SeqioTask",
    "Suite",
    "TextTask",
    "get",
    "has_settings",
    "kind_of",
    "names",
    "register",
    "register_task",
    "task_factories",
    "vocabulary_of",
]
