"""Arguments of gin on a command line: `--gin.NAME=VALUE`, and gin files by name.

A value that reads as gin is gin's: a number, True, False, None, or what begins with a quote, a bracket,
`%` or `@`. Everything else is the text itself, so that `--gin.MODEL_DIR=runs/x` needs no quotes. A text
that would read as gin, such as the number 7, needs quotes of its own: `--gin.NAME="'7'"`.
"""

import ast
import pathlib
from collections.abc import Iterator, Sequence

from famx.base.errors import ConfigError
from famx.base.text import near, nearest

_FLAG = "--gin."
_BEGINNINGS = ("'", '"', "(", "[", "{", "%", "@")  # of values that are gin's, whatever follows
_FIRST = ("examples", "runs", "models", "meshes")  # folders of gin_configs/, as they are listed
_OTHER_PROGRAMS = ("t5x",)  # those whose files no main of famx reads


def rewrite_gin_args(argv: Sequence[str]) -> list[str]:
    """Rewrites each `--gin.NAME=VALUE` to `--gin_bindings=NAME = VALUE` and leaves the rest as it is."""
    return [_rewrite(arg) for arg in argv]


def _rewrite(arg: str) -> str:
    if not arg.startswith(_FLAG):
        return arg
    name, equals, value = arg.removeprefix(_FLAG).partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"{arg} is not a gin binding: write it as --gin.NAME=VALUE.")
    return f"--gin_bindings={name} = {value if reads_as_gin(value) else repr(value)}"


def reads_as_gin(value: str) -> bool:
    """Whether the value of a `--gin.` argument is gin's, and not the text itself."""
    if value.lstrip().startswith(_BEGINNINGS):
        return True
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return found is None or isinstance(found, bool | int | float | str | bytes)


# ---------------------------------------------------------------- files


def find_gin_file(name: str, directories: Sequence[str]) -> str:
    """The path of a gin file that is given as a path, or by the name of one of famx's own.

    Args:
      name: a path, looked up in the current directory and in `directories`, or a name such as
        `passkey_tiny` of a file in a folder of gin_configs/.
      directories: directories to look in; one of them has gin_configs/.

    Raises:
      ConfigError: there is no such file, and the sentence lists near names.
    """
    roots = [pathlib.Path(), *map(pathlib.Path, directories)]
    for path in (name, f"{name}.gin"):
        if any((root / path).is_file() for root in roots):
            return path
    shipped = {path.stem: path for path in shipped_files(directories)}
    if (found := shipped.get(name.removesuffix(".gin"))) is not None:
        return found.as_posix()
    if "/" in name or name.endswith(".gin"):
        raise ConfigError(f"There is no gin file {name}.{nearest(name, list(gin_files(directories)))}")
    hint = near(name, list(shipped))
    raise ConfigError(
        f"There is no gin file {name}.{hint} `famx examples` lists those that come with famx."
    )


def shipped_files(directories: Sequence[str]) -> Iterator[pathlib.Path]:
    """Paths of the files that have names, from the directory of gin_configs/."""
    for root in map(pathlib.Path, directories):
        others = sorted(path.name for path in (root / "gin_configs").glob("*") if path.is_dir())
        for folder in (x for x in dict.fromkeys((*_FIRST, *others)) if x not in _OTHER_PROGRAMS):
            for path in sorted((root / "gin_configs" / folder).glob("*.gin")):
                yield path.relative_to(root)


def gin_files(directories: Sequence[str]) -> Iterator[str]:
    """Paths of all gin files in some directories, from there; of one with gin_configs/, those in it."""
    for root in map(pathlib.Path, directories):
        base = root / "gin_configs" if (root / "gin_configs").is_dir() else root
        for path in sorted(base.rglob("*.gin")):
            yield path.relative_to(root).as_posix()
