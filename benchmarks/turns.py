"""Runs each implementation in its own process, one computing at a time.

Two frameworks in one process would compete for threads. Here each has a process that builds the model
once and then takes training steps on request. The caller waits for each answer, so only one process
computes at a time. Requests and answers are lines of JSON on standard input and output; this module has
both ends. JAX runs on the CPU there, PyTorch where the shape says. No framework is imported here; each
implementation imports its own.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
_WARM_UP = 3  # untimed steps after building; the loss must fall over them


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation that is ready to train.

    Attributes:
      step: takes one training step, waits for it, and returns its loss as a Python float.
      facts: JSON values for the table.
    """

    step: Callable[[], float]
    facts: Mapping[str, Any]


class LeftOut(Exception):
    """An implementation cannot be measured; the message is one sentence that says why."""


class Worker:
    """A process that trains one implementation.

    Args:
      name: label for messages.
      build: "module:function"; the process calls it with `arguments`, and it returns a `Peer`.
      arguments: keyword arguments, JSON values.
      root: root of the checkout that the process runs in and imports from.
      program: arguments of Python that start the process; it must speak the protocol of `serve`.

    Attributes:
      facts: `Peer.facts`, and `first_loss`.

    Raises:
      LeftOut: a package is missing, the model cannot be built, or its loss does not fall.
    """

    def __init__(
        self,
        name: str,
        build: str,
        arguments: Mapping[str, Any],
        root: pathlib.Path = ROOT,
        program: Sequence[str] = ("-m", "benchmarks.turns"),
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, *program],
            cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # an accelerator could serve only one process
        )  # fmt: skip
        try:
            self.facts = self._ask({"build": build, "arguments": dict(arguments)})
        except BaseException:
            self.close()
            raise

    def run(self, steps: int) -> float:
        """Takes `steps` steps and returns the last one's loss."""
        return self._ask({"steps": steps})["loss"]

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["none"])[-1]
            raise LeftOut(f"{self.name}: its process ended; last line of its error output: {last}")
        answer = json.loads(line)
        if "left_out" in answer:
            raise LeftOut(f"{self.name}: {answer['left_out']}")
        return answer


def serve(requests, answer: Callable[[dict[str, Any]], None]) -> None:
    """The worker process's loop: builds the implementation, then takes steps on request.

    Args:
      requests: iterator over lines of JSON. The first is `{"build", "arguments"}`, the others
        `{"steps"}`.
      answer: sends a message back.
    """
    first = json.loads(next(requests))
    module, function = first["build"].split(":")
    try:
        peer = getattr(importlib.import_module(module), function)(**first["arguments"])
        losses = [peer.step() for _ in range(_WARM_UP)]
    except LeftOut as reason:
        return answer({"left_out": str(reason)})
    except ModuleNotFoundError as error:
        return answer({"left_out": f"the package {error.name} is not installed."})
    except Exception as error:  # whatever a third-party package raises, the others are still measured
        message = " ".join(str(error).split())[:300]
        return answer({"left_out": f"it failed with {type(error).__name__}: {message}"})
    if not losses[-1] < losses[0]:
        return answer({"left_out": f"its loss does not fall: {losses}."})
    answer({**peer.facts, "first_loss": losses[0]})
    for line in requests:
        for _ in range(json.loads(line)["steps"]):
            loss = peer.step()
        answer({"loss": loss})


def _main() -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not mix with the answers
    serve(sys.stdin, lambda message: print(json.dumps(message), file=pipe, flush=True))


if __name__ == "__main__":
    # Implementations import this module by name and must get the same classes as `__main__` has.
    sys.modules["benchmarks.turns"] = sys.modules["__main__"]
    _main()
