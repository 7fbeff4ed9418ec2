"""Completes or scores the prompts of a JSON-lines file.

    famx infer --gin.CHECKPOINT_PATH=/tmp/famx/passkey_tiny --gin.INPUT_FILE=prompts.jsonl \\
        --gin.OUTPUT_FILE=answers.jsonl

The settings are the macros of gin_configs/runs/infer.gin, which is read if no gin file is given.

The same command resumes an interrupted run. `famx.inference.lines` documents the fields of a line.
"""

from famx.base import gin_utils


def main() -> None:
    from famx import inference

    gin_utils.parse_gin_flags(default="gin_configs/runs/infer.gin")
    gin_utils.call(inference.infer)


if __name__ == "__main__":
    gin_utils.run(main, argument="gin_file")
