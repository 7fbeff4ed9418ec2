"""Chat templates, rendered in a process of their own with limits on time, memory and length.

A template is a program of whoever published the model. Jinja's sandbox keeps it from reaching Python's
objects, but not from computing without end or filling the memory: it limits `range`, and neither the
multiplication of strings, nested loops, filters nor recursive macros. Counting operations within the
sandbox would have to know each of these, so the limits are the operating system's: a process has a limit
of its address space and of its processor time, and is killed when it exceeds one. It is started once for
a template and then renders each turn of a conversation, for which only two messages go through a pipe; a
process for each turn would cost its start each time.
"""

import datetime
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from famx.base.errors import ConfigError
from famx.base.packages import optional_package

_PROGRAM = pathlib.Path(__file__).with_name("template_process.py")
MOST_MEMORY = 1 << 30  # bytes of address space
MOST_SECONDS = 2.0  # of processor time for a rendering, and a second more for each megabyte of messages
_MOST_WAITING = 60.0  # seconds that pass, on a machine that is busy with other things
MOST_CHARACTERS = 4 << 20  # of a rendered text, and 16 more for each byte of the messages
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ", "SYSTEMROOT")  # that the process gets; no credentials


class Renderer:
    """A chat template that can be rendered; it may be pickled, and used from several threads.

    Args:
      source: source of the Jinja template.

    Raises:
      ConfigError: on construction, if the template is not valid, or the package `jinja2` is missing.
    """

    def __init__(self, source: str):
        optional_package("jinja2", "Chat templates")
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it: a fork must not share its pipes
        with self._lock:
            self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: bool,
        names: Mapping[str, str],
        tools: Sequence[Any] | None = None,
        today: datetime.datetime | None = None,
    ) -> str:
        """The text that the template makes of messages.

        Args:
          messages: the messages, of values that JSON can hold.
          prompt: whether the text ends where an answer starts.
          names: further variables, such as `bos_token`.
          tools: descriptions of tools.
          today: the date for templates that write it; None: the date.

        Raises:
          ConfigError: the template refuses the messages, or exceeds a limit.
        """
        request = {
            "messages": list(messages), "prompt": prompt, "names": dict(names), "tools": tools,
            "today": None if today is None else today.isoformat(),
        }  # fmt: skip
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()
            answer = self._ask(request)
        if "error" in answer:
            raise ConfigError(f"The chat template rejects the messages: {_printable(answer['error'])}.")
        return answer["text"]

    def __reduce__(self):
        return renderer, (self._source,)

    def _start(self) -> None:
        settings = {"path": sys.path, "memory": MOST_MEMORY}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROGRAM), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C ends an answer, and must not end this process
        )  # fmt: skip
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _stop, process, os.getpid())
        answer = self._ask({"source": self._source})
        if "error" in answer:
            text = _printable(answer["error"])
            raise ConfigError(f"The chat template of the vocabulary is not valid: {text}.")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; after a limit was exceeded the process is gone."""
        process, size = self._process, len(json.dumps(request, default=str))
        seconds = MOST_SECONDS + size / 1e6
        request = {**request, "seconds": seconds, "most": MOST_CHARACTERS + 16 * size}
        content = json.dumps(request, default=str).encode()
        deadline = time.monotonic() + _MOST_WAITING + seconds
        try:
            process.stdin.write(len(content).to_bytes(8, "little") + content)
            process.stdin.flush()
            length = int.from_bytes(_receive(process, 8, deadline), "little")
            # Six characters of JSON for each of the text, at most.
            if length > 6 * request["most"] + 4096:
                raise EOFError
            return json.loads(_receive(process, length, deadline))
        except (EOFError, OSError, TimeoutError, ValueError) as error:
            process.kill()
            code = process.wait()
            slow = isinstance(error, TimeoutError) or code == -signal.SIGXCPU
            why = f"it takes more than {seconds:.0f} seconds" if slow else "it needs too much memory"
            return {"error": why}


@functools.lru_cache(maxsize=8)
def renderer(source: str) -> Renderer:
    """The `Renderer` of a template, which all that use the template share."""
    return Renderer(source)


def _receive(process: subprocess.Popen, count: int, deadline: float) -> bytes:
    """The next `count` bytes of a process's output; EOFError if it ends, TimeoutError if it is late."""
    descriptor, parts = process.stdout.fileno(), bytearray()
    while len(parts) < count:
        ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise TimeoutError
        part = os.read(descriptor, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _stop(process: subprocess.Popen, owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _printable(text: str) -> str:
    """One line of a message from outside, without control characters of terminals."""
    return "".join(x if x.isprintable() else " " for x in text[:300]).strip().rstrip(".")
