"""Evaluates checkpoints from gin files.

    python -m famx.eval --gin_file=gin_configs/runs/eval.gin \\
        --gin.CHECKPOINT_PATH="'/tmp/famx/passkey_tiny'" \\
        --gin.EVALUATIONS="{'passkey': @PasskeyEvaluation()}"

Prints a table of the results and writes them to `MODEL_DIR/eval/<name>/<step>.json`.
"""

from famx.base import gin_utils


def main() -> None:
    from famx.evaluation import bindable, checkpoints

    bindable.register()
    gin_utils.parse_gin_flags()
    print(checkpoints.table(gin_utils.call(checkpoints.evaluate)))


if __name__ == "__main__":
    gin_utils.run(main)
