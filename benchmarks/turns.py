"""Implementations in processes of their own, which compute in turns.

Two frameworks in one process compete for threads. So each gets a process, which prepares itself once
and then takes a number of steps whenever it is asked to; whoever asks waits for the answer, hence
only one computes at a time. Both ends of the pipe are here: lines of JSON, asked on standard input.
All compute on the CPU. No framework is imported here: an implementation imports its own.
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
_WARM_UP = 3  # steps before the first turn, over which the loss must fall


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation, ready to train.

    Attributes:
      step: takes one training step and returns its loss, a Python float, once it is done.
      facts: what JSON can hold and the table shows.
    """

    step: Callable[[], float]
    facts: Mapping[str, Any]


class LeftOut(Exception):
    """An implementation cannot be measured; says why in one sentence."""


class Worker:
    """A process with one implementation.

    Args:
      name: for messages.
      build: "module:function"; called in the process with `arguments`, it returns a `Peer`.
      arguments: by name, plain values.
      root: the checkout that the process runs in, and imports from.
      program: arguments of Python; it serves as this module does.

    Raises:
      LeftOut: if a package is missing, if it cannot be built, or if it does not learn.
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
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # an accelerator has room for one process
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
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["nothing"])[-1]
            raise LeftOut(f"{self.name}: its process ended; its last words: {last}")
        answer = json.loads(line)
        if "left_out" in answer:
            raise LeftOut(f"{self.name}: {answer['left_out']}")
        return answer


def serve(questions, answer: Callable[[dict[str, Any]], None]) -> None:
    """The process's end: builds what the first line asks for, then takes steps line by line."""
    first = json.loads(next(questions))
    module, function = first["build"].split(":")
    try:
        peer = getattr(importlib.import_module(module), function)(**first["arguments"])
        losses = [peer.step() for _ in range(_WARM_UP)]
    except LeftOut as reason:
        return answer({"left_out": str(reason)})
    except ModuleNotFoundError as error:
        return answer({"left_out": f"the package {error.name} is not installed."})
    except Exception as error:  # whatever a foreign package fails with, the others go on
        words = " ".join(str(error).split())[:300]
        return answer({"left_out": f"it failed with {type(error).__name__}: {words}"})
    if not losses[-1] < losses[0]:
        return answer({"left_out": f"its loss does not fall: {losses}."})
    answer({**peer.facts, "first_loss": losses[0]})
    for line in questions:
        for _ in range(json.loads(line)["steps"]):
            loss = peer.step()
        answer({"loss": loss})


def _main() -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, lambda message: print(json.dumps(message), file=pipe, flush=True))


if __name__ == "__main__":
    # Implementations import this module too, and its classes must be the same ones.
    sys.modules["benchmarks.turns"] = sys.modules["__main__"]
    _main()
