"""Trains a model from gin files.

    famx train passkey_tiny --gin.MODEL_DIR=/tmp/famx/passkey_tiny

A gin file is a path, or a name that `famx examples` lists. The same command resumes an interrupted run.
With several hosts, each runs it with --multiprocess (`famx.base.distributed`), which `launch/` does.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define
from famx.base.ranges import NonNegative, Positive, Rate


def define_flags() -> None:
    flags.DEFINE_bool("multiprocess", False, "Join the processes that TPU, GKE or Slurm started.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT at which process 0 can be reached.")
    define("num_processes", Positive, None, "Number of processes that train together.")
    define("process_id", NonNegative, None, "Index of this process, from 0.")
    silence = "Seconds without a sign of life after which a process is lost; others exit with code 75."
    define("peer_timeout_seconds", Rate, 60.0, silence)
    define("start_timeout_seconds", Rate, 300.0, "Seconds in which all processes must start.")
    stopped = "Exit code of a stopped run; by default 130 after SIGINT (Ctrl-C), 143 after SIGTERM."
    flags.DEFINE_integer("exit_code_if_stopped", None, stopped, 0, 255)
    older = "Step of the checkpoint to resume from; newer ones are moved to MODEL_DIR/set_aside."
    define("resume_from", NonNegative, None, older)
    steps = "First and last step to profile, such as 10:13; the trace goes to MODEL_DIR/profile."
    flags.DEFINE_string("profile_steps", None, steps)


def main() -> None:
    gin_utils.require_gin_file(__doc__)

    from famx.base import distributed, peers, signals
    from famx.training import loop

    values = flags.FLAGS
    distributed.initialize(
        values.multiprocess, values.coordinator_address, values.num_processes, values.process_id,
        values.peer_timeout_seconds, values.start_timeout_seconds,
    )  # fmt: skip
    for name in ("profile_steps", "resume_from"):
        if values[name].value not in (None, ""):
            binding = f"Run.{name} = {values[name].value!r}"
            values["gin_bindings"].value = [*values.gin_bindings, binding]
    with peers.together(values.peer_timeout_seconds, values.start_timeout_seconds):
        gin_utils.parse_gin_flags()
        gin_utils.call(loop.train)
    if signals.was_stopped():
        code = values.exit_code_if_stopped
        sys.exit(signals.stopped_code() if code is None else code)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, argument="gin_file")
