"""What gin bindings on the command line of `famx.eval` may name, where gin imports nothing."""

import functools

import gin

from famx import evaluation
from famx.data.probes.passkey import PasskeyTask
from famx.data.storage.text_files import TextFiles
from famx.data.vocabularies import open_vocabulary


@functools.cache
def register() -> None:
    """Makes evaluations, and the tasks and texts that they take, known to gin by name."""
    for configurable in (
        evaluation.PasskeyEvaluation,
        evaluation.TaskEvaluation,
        evaluation.TextEvaluation,
        evaluation.TextTaskEvaluation,
        PasskeyTask,
        TextFiles,
        open_vocabulary,
    ):
        gin.external_configurable(configurable, module=configurable.__module__)
