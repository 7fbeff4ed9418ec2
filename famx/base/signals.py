"""Asked to stop, by SIGTERM or SIGINT: a run ends where it can go on later."""

import contextlib
import os
import signal

import jax
import numpy as np


@contextlib.contextmanager
def stop_signal():
    """Gives a function that tells whether the run was asked to stop; being asked twice ends it at once.

    With several processes the function must be called by all of them alike: one that was asked stops
    all.
    """
    asked = []

    def ask(number, frame):
        if asked:
            os._exit(128 + number)  # the second time it is meant
        asked.append(number)

    signals = (signal.SIGTERM, signal.SIGINT)
    old = {s: signal.signal(s, ask) for s in signals}

    def stop() -> bool:
        if jax.process_count() == 1:
            return bool(asked)
        from jax.experimental import multihost_utils  # all processes must stop at one step

        return bool(np.max(multihost_utils.process_allgather(np.int32(len(asked)))))

    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
