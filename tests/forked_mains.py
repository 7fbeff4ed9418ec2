"""Runs many commands of famx in forks of one process, so that what is imported once serves all.

    python tests/forked_mains.py < jobs.json > answers.json

A job is `{"arguments": [...], "cwd": DIRECTORY, "home": DIRECTORY, "environment": {...}}`; its arguments
are those of the program `famx`. An answer is `{"code": exit code, "out": text, "err": text, "seconds": of
processor time}`; a command that takes more than `LIMIT` seconds is killed, and its code is -9.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time

import jax

import famx.analysis  # noqa: F401, imported once for all
import famx.conversion.importing  # noqa: F401
import famx.evaluation  # noqa: F401
import famx.inference  # noqa: F401
import famx.lora  # noqa: F401
import famx.scale  # noqa: F401
import famx.training.loop  # noqa: F401
import famx.training.replay  # noqa: F401

LIMIT = 120.0


def child(job: dict, out: int, err: int) -> int:
    """Runs a job in this process, which is a fork; returns the exit code."""
    os.chdir(job["cwd"])
    os.environ["HOME"] = job["home"]
    os.environ.update(job["environment"])
    if "JAX_PLATFORMS" in job["environment"]:  # jax read the variable when it was imported
        jax.config.update("jax_platforms", job["environment"]["JAX_PLATFORMS"])
    for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(file, number)
    sys.argv = ["famx", *job["arguments"]]
    try:
        runpy.run_module("famx", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def forked(job: dict) -> dict:
    """The answer to a job, which runs in a fork."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        number = os.fork()
        if number == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = child(job, out.fileno(), err.fileno())
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        end = time.monotonic() + LIMIT
        while not (done := os.wait4(number, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(number, signal.SIGKILL)
                done = os.wait4(number, 0)
                break
            time.sleep(0.01)
        _, status, used = done
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    seconds = used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": seconds}


if __name__ == "__main__":
    json.dump([forked(job) for job in json.load(sys.stdin)], sys.stdout)
