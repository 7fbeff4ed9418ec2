"""Names that gin bindings of `famx.eval` may use without an import in a gin file."""

import functools

import gin

from famx import evaluation
from famx.data.probes.passkey import PasskeyTask
from famx.data.storage.text_files import TextFiles
from famx.data.vocabularies import open_vocabulary


@functools.cache
def register() -> None:
    """Registers the evaluations, and the tasks, texts and vocabularies that they take, with gin.

    What a gin file has imported before keeps its name: under two names, the short one would be ambiguous.
    """
    for configurable in (
        evaluation.LmEvaluation,
        evaluation.PasskeyEvaluation,
        evaluation.ProbeEvaluation,
        evaluation.TaskEvaluation,
        evaluation.TextEvaluation,
        evaluation.TextTaskEvaluation,
        PasskeyTask,
        TextFiles,
        open_vocabulary,
    ):
        try:
            gin.get_configurable(configurable)
        except ValueError:  # not registered yet
            gin.external_configurable(configurable, module=configurable.__module__)
