"""Runs lm-evaluation-harness, whose own command it calls, with the model `famx` added.

    famx lm-eval --model famx --model_args checkpoint=/tmp/famx/model --tasks hellaswag

All arguments are those of `lm_eval`; `famx lm-eval run --help` lists them. Arguments of the model, as
--model_args NAME=VALUE,...: checkpoint, and if wanted memory (a memory file), adapter, batch_size,
add_bos_token, prefix_token_id, max_gen_toks, zero_memory, seed. Only --import=MODULE is famx's.
It needs pip install 'famx[lm-eval]'.
"""

import sys

from famx.base import gin_utils


def main() -> None:
    from famx.evaluation import lm_eval_tasks

    lm_eval_tasks.run_command(sys.argv[1:])


if __name__ == "__main__":
    gin_utils.run(main, gin_flags=False, own_flags=False)
