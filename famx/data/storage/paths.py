"""Paths of text and record files: glob patterns, validation splits, Python's own sources."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence

from famx.data.storage import places

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def matching_files(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Sorted absolute paths of the files that match one or several paths or glob patterns, or URLs.

    Raises:
      ValueError: a pattern matches no file, or there is no pattern.
    """
    paths = set()
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        pattern = os.path.expanduser(pattern)
        # A name that exists is not expanded, even if it has characters of glob patterns.
        matches = [pattern] if places.is_file(pattern) else places.matching(pattern)
        files = [places.absolute(path) for path in matches if places.is_file(path)]
        if not files and places.is_directory(pattern):
            raise ValueError(f"'{pattern}' is a directory; name its files, such as '{pattern}/*'.")
        if not files:
            raise ValueError(
                f"No file matches '{pattern}' (working directory: {os.getcwd()}); check the path, and "
                "write '**' to match folders of any depth."
            )
        paths.update(files)
    if not paths:
        raise ValueError("No text files were named; give at least one path or glob pattern.")
    return sorted(paths)


def stdlib_text_files() -> list[str]:
    """Sorted paths of the sources of Python's standard library, without its tests.

    Raises:
      ValueError: this Python was installed without its sources.
    """
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise ValueError("This Python was installed without its sources; name text files of your own.")
    return sorted(paths)


def validation_names(names: Sequence[str], fraction: float, seed: int = 0) -> set[str]:
    """Choose the names for validation by a hash of each name and the seed.

    At least one name and not all are chosen, unless `fraction` is 0. Apart from that, a name keeps its
    split when others are added.
    """
    if not fraction:
        return set()

    def hash_of(name: str) -> float:
        digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    hashes = {name: hash_of(name) for name in names}
    ranked = sorted(names, key=lambda name: hashes[name])
    count = sum(x < fraction for x in hashes.values())
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


def listed(names: Iterable[str]) -> str:
    """Names with commas between them for a sentence, at most 20 of them; "none" if there is none."""
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
