"""Checks of what famx has written: runs, checkpoints, memory files and adapters."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from famx.base.checksums import read_checked_json
from famx.base.errors import ConfigError
from famx.base.files import as_path, check_answers
from famx.base.text import byte_size
from famx.data.vocabularies import load_vocabulary
from famx.lora.files import CONFIG, check_adapter
from famx.model_dir import digests
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.memory_file import check_memory

_JSON_FILES = ("model.json", "vocabulary.json", "base.json")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
      path: what was checked.
      sound: whether nothing is wrong with it.
      text: what was found, without the path.
    """

    path: pathlib.Path
    sound: bool
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def check(path: str) -> Iterator[Finding]:
    """Check a MODEL_DIR with all its checkpoints, a checkpoint, a memory file or a saved adapter.

    Raises:
      ConfigError: it is none of these.
    """
    found = as_path(path).expanduser().absolute()
    check_answers(found)
    if not found.exists():
        raise ConfigError(f"There is no {path}.")
    if found.is_file():
        yield _checked(found, lambda: _memory(found))
    elif (found / CONFIG).is_file():
        yield _checked(found, lambda: _adapter(found))
    elif (found / digests.NAME).is_file() or (found / digests.METADATA).is_file():
        yield _checked(found, lambda: _checkpoint(found))
    elif (found / "model.json").exists() or any(found.glob("checkpoint_*")):
        yield from _run(found)
    else:
        raise ConfigError(
            f"{path} is no MODEL_DIR, checkpoint, memory file or adapter of famx: give the path of one."
        )


def _run(directory: pathlib.Path) -> Iterator[Finding]:
    for name in _JSON_FILES:
        path = directory / name
        if path.exists():
            yield _checked(path, lambda path=path: _json_file(path))
    with Checkpointer(directory, read_only=True) as checkpointer:
        steps = checkpointer.all_steps()
    for step in steps:
        path = directory / f"checkpoint_{step}"
        yield _checked(path, lambda path=path: _checkpoint(path))
    if not steps:
        yield Finding(directory, False, "has no checkpoint.")
    if (directory / "adapter" / CONFIG).exists():
        yield _checked(directory / "adapter", lambda: _adapter(directory / "adapter"))


def _checked(path: pathlib.Path, call: Callable[[], str]) -> Finding:
    try:
        return Finding(path, True, call())
    except digests.DamagedCheckpoint as error:
        return Finding(path, False, error.finding.removeprefix(f"{path} is "))
    except ConfigError as error:
        return Finding(path, False, str(error))


def _checkpoint(path: pathlib.Path) -> str:
    with digests.verified(path) as found:
        pass
    if not found:
        match = digests.STEP.fullmatch(path.name)
        if match:
            with Checkpointer(path.parent, read_only=True) as checkpointer:
                checkpointer.verify(int(match[1]))
        return "has no digests: another program or an older famx wrote it. Its metadata can be read."
    files = digests.read_digests(path).files
    return f"sound, {len(files)} files, {byte_size(sum(size for size, _ in files.values()), 1)}."


def _json_file(path: pathlib.Path) -> str:
    if path.name == "vocabulary.json":
        load_vocabulary(path.parent)  # with its tokenizer file
    else:
        read_checked_json(path)
    return "sound."


def _memory(path: pathlib.Path) -> str:
    header = check_memory(path)
    return f"sound, a memory of {max(header.position, default=0)} tokens."


def _adapter(path: pathlib.Path) -> str:
    if check_adapter(path):
        return "sound, an adapter."
    return "has no checksum: another program or an older famx wrote it. It can be read."
