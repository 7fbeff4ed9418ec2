"""Evaluates checkpoints with gin files.

    python -m famx.eval --gin_file=gin_configs/runs/eval.gin \\
        --gin.CHECKPOINT_PATH="'/tmp/famx/passkey_tiny'" \\
        --gin.EVALUATIONS="{'passkey': @PasskeyEvaluation()}"

The results stand in the last table, and in `MODEL_DIR/eval/<name>/<step>.json`.
"""

import gin

from famx import evaluation
from famx.base import gin_utils
from famx.data.probes.passkey import PasskeyTask
from famx.data.storage.text_files import TextFiles
from famx.data.vocabularies import open_vocabulary
from famx.evaluation import checkpoints

# What EVALUATIONS may name on the command line, where gin imports nothing.
for _configurable in (
    evaluation.PasskeyEvaluation,
    evaluation.TaskEvaluation,
    evaluation.TextEvaluation,
    evaluation.TextTaskEvaluation,
    PasskeyTask,
    TextFiles,
    open_vocabulary,
):
    gin.external_configurable(_configurable, module=_configurable.__module__)


def main():
    gin_utils.parse_gin_flags()
    print(checkpoints.table(gin_utils.call(checkpoints.evaluate)))


if __name__ == "__main__":
    gin_utils.run(main)
