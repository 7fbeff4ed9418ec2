"""Trains a model from gin files.

    python -m famx.train --gin_file=gin_configs/examples/passkey_tiny.gin \\
        --gin.MODEL_DIR="'/tmp/famx/passkey_tiny'"

The same command resumes an interrupted run. On several hosts each runs it with
--multiprocess, see `famx.base.distributed`; `launch/` starts them.
"""

import sys

from absl import flags

from famx.base import distributed, gin_utils
from famx.training import loop

_STOPPED = flags.DEFINE_integer(
    "exit_code_if_stopped", 0, "Exit code of a run that SIGTERM or SIGINT stopped before its end.", 0, 255
)

_PROFILE = flags.DEFINE_string(
    "profile_steps", None, "First and last step of a trace in MODEL_DIR/profile, written as 10:13."
)


def main():
    distributed.initialize()
    if _PROFILE.value:
        binding = f"Run.profile_steps = {_PROFILE.value!r}"
        flags.FLAGS.gin_bindings = [*flags.FLAGS.gin_bindings, binding]
    gin_utils.parse_gin_flags()
    with distributed.noting_signals() as stopped:
        gin_utils.call(loop.train)
        if _STOPPED.value and stopped():
            sys.exit(_STOPPED.value)


if __name__ == "__main__":
    gin_utils.run(main)
