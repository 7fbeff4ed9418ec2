"""Tasks as tables for a terminal: all of them with what they need, and the options of one."""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from famx.base.errors import ConfigError
from famx.base.expectations import expectation
from famx.base.text import columns, near
from famx.base.values import annotations
from famx.data.probes import Probe
from famx.data.tasks import Suite, registry
from famx.data.tasks.text_task import TaskFactory

_KINDS = {
    "generation": "Texts with answers to write.",
    "rank": "Texts with answers to choose from.",
    "documents": "Whole texts.",
    "chat": "Conversations.",
}
_MOST = 8  # names of one family that are listed one by one
_DEFINITION = {"name", "kind", "open_split", "preprocess", "metrics", "folders", "published", "package",
               "tfds", "open_tfds", "counts", "scoring"}  # of a text task, not options  # fmt: skip


def task_table(pattern: str = "") -> str:
    """A table of the registered tasks whose names contain `pattern`.

    Without a pattern, large families such as xlsum_<language> take one line.

    Raises:
      ConfigError: no task has such a name.
    """
    names = [name for name in registry.names() if pattern in name]
    if not names:
        raise ConfigError(f"No task's name contains {pattern}.{near(pattern, registry.names())}")
    families = [names] if pattern else _families(names)
    rows = []
    for family in families:
        if pattern or len(family) <= _MOST:
            rows += [(name, _needs(name), _contents(name)) for name in family]
        else:
            label = f"{family[0].partition('_')[0]}_... ({len(family)})"
            rows.append((label, _needs(family[0]), _contents(family[0])))
    hint = "famx tasks NAME shows the options of one; famx tasks PART, those whose names contain PART."
    return "\n".join([columns(("TASK", "NEEDS", "CONTENTS"), rows), "", hint])


def task_options(name: str) -> str:
    """The options of a task, as TASK_OPTIONS takes them: what each may be, and its default."""
    factory = registry.factory(name)
    fixed = getattr(factory, "keywords", {})
    known = annotations(factory)
    skipped = {*fixed, *(_DEFINITION if isinstance(factory, TaskFactory) else ())}
    rows = [
        (parameter.name, _default(parameter), expectation(known.get(parameter.name, Any)))
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.name not in skipped and parameter.kind is not parameter.VAR_KEYWORD
    ]
    about = f"{name}: {_contents(name)} Needs: {_needs(name)}."
    example = f"famx inspect-data --task={name}"
    return "\n\n".join([about, columns(("OPTION", "DEFAULT", "MAY BE"), rows), example])


def is_task(name: str) -> bool:
    """Whether a task has this name."""
    return registry.factory(name) is not None


def _families(names: Sequence[str]) -> list[list[str]]:
    """The names, together those that share the word before the first underscore and how they are made."""
    found: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        key = name.partition("_")[0], isinstance(registry.factory(name), TaskFactory)
        found.setdefault(key, []).append(name)
    return list(found.values())


def _target(name: str) -> Callable[..., Any]:
    factory = registry.factory(name)
    return factory.func if isinstance(factory, functools.partial) else factory


def _contents(name: str) -> str:
    """What a task consists of, in a sentence."""
    factory = registry.factory(name)
    if isinstance(factory, TaskFactory):
        return _KINDS[factory().kind]
    first = (inspect.getdoc(_target(name)) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r"^Make ", "", first)[:1].upper() + re.sub(r"^Make ", "", first)[1:]


def _needs(name: str) -> str:
    """The files that a task reads."""
    factory, target = registry.factory(name), _target(name)
    if isinstance(factory, TaskFactory):
        task = factory()
        return task.package or _place(task.published) or "its files"
    if isinstance(target, type) and issubclass(target, Probe):
        return "nothing"
    if registry.needs_options(name) or name.startswith("own_"):
        return "your files"
    if inspect.signature(target).return_annotation is Suite:
        return "the files of its tasks"
    return _place(getattr(sys.modules[target.__module__], "PUBLISHED", "")) or "nothing"


def _place(published: str) -> str:
    return re.sub(r"^https?://(www\.)?", "", published)


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "(must be given)"
    text = repr(parameter.default)
    return text if len(text) < 40 else f"{text[:36]} ..."
