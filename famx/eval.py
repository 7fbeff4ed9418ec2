"""Evaluates checkpoints from gin files.

    famx eval --gin.CHECKPOINT_PATH=/tmp/famx/passkey_tiny \\
        --gin.EVALUATIONS="{'passkey': @PasskeyEvaluation()}"
    famx eval probes --gin.CHECKPOINT_PATH=/tmp/famx/smollm2

The settings are the macros of gin_configs/runs/eval.gin, which is read if no gin file is given. Prints a
table of the results and writes them to `MODEL_DIR/eval/<name>/<step>.json`.
"""

from famx.base import gin_utils


def main() -> None:
    from famx.evaluation import bindable, checkpoints

    bindable.register()
    gin_utils.parse_gin_flags(default="gin_configs/runs/eval.gin")
    print(checkpoints.table(gin_utils.call(checkpoints.evaluate)))


if __name__ == "__main__":
    gin_utils.run(main, argument="gin_file")
