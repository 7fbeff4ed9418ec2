"""Program that renders one chat template; `template_renderer` starts it, and nothing imports it.

It needs only the standard library and jinja2, and limits itself before it reads a template: memory, time
of each rendering, length of what is rendered. It reads frames from its standard input and answers each
on its standard output. A frame is a length in 8 bytes and JSON: first `{"source": ...}`, then
`{"messages": ..., "names": ..., ...}`, see `_render`. It ends when its input does.
"""

import datetime
import json
import os
import random
import resource
import sys
import time
from typing import Any


def _environment(jinja2):
    """Sandboxed Jinja environment with what the templates of instruct models use."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Turn the tags with which some templates mark answers for training into marks of ours."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
            return [mark("\ufdd3"), *body, mark("\ufdd4")]

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def _render(template, request: dict[str, Any], most: int) -> str:
    """The text of the template; ValueError if it is longer than `most` characters."""
    names = request["names"]
    today = request["today"]
    today = datetime.datetime.now() if today is None else datetime.datetime.fromisoformat(today)
    random.seed(0)  # the filter `random` draws the same in every run
    parts, length = [], 0
    for part in template.generate(
        messages=request["messages"], add_generation_prompt=request["prompt"], tools=request["tools"],
        documents=None, strftime_now=today.strftime, **names,
    ):  # fmt: skip
        length += len(part)
        if length > most:
            raise ValueError(f"it writes more than {most:,} characters")
        parts.append(part)
    return "".join(parts)


def _limit_cpu(seconds: float) -> None:
    """End this process by a signal when it has computed for this long from now, or a second more."""
    last = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, last))


def _read(stream) -> dict[str, Any] | None:
    size = stream.read(8)
    return json.loads(stream.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def _write(stream, value: dict[str, Any]) -> None:
    content = json.dumps(value).encode()
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but frames goes to the pipe
    sys.path[:] = settings["path"]
    import textwrap  # noqa: F401, jinja2 imports it when a template first wraps a text

    import jinja2

    environment = _environment(jinja2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    memory = settings["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    template = None
    while (request := _read(requests)) is not None:
        _limit_cpu(request["seconds"])
        try:
            if template is None:
                template = environment.from_string(request["source"])
                answer = {"text": ""}
            else:
                answer = {"text": _render(template, request, request["most"])}
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except Exception as error:  # whatever a template raises
            answer = {"error": str(error)[:1000] or type(error).__name__}
        try:
            _write(answers, answer)
        except MemoryError:
            _write(answers, {"error": "it needs too much memory"})


if __name__ == "__main__":
    main()
