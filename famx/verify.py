"""Checks files of famx for damage: a run, a checkpoint, a memory file or an adapter.

    famx verify /tmp/famx/model
    famx verify /tmp/famx/model/checkpoint_5000 book.famem

Prints one line for each thing checked. The exit code is 0 if all are sound, 1 if one is not, and 2 if a
path is none of these. Reads everything and writes nothing; `docs/checkpoints.md` says what is compared.
"""

import sys

from famx.base import gin_utils
from famx.base.errors import ConfigError


def main() -> None:
    paths = sys.argv[1:]
    if not paths or any(path.startswith("--") for path in paths):
        raise ConfigError("Give the paths to check: famx verify PATH [PATH ...].")

    from famx.model_dir.soundness import check

    sound = True
    for path in paths:
        for finding in check(path):
            print(finding, flush=True)
            sound = sound and finding.sound
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    gin_utils.run(main, gin_flags=False, own_flags=False)
