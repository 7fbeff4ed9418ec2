"""Says what is installed here and what is missing: devices, versions, optional parts, free disk.

    famx doctor

The exit code is 1 if something is missing that famx always needs.
"""

import collections
import os
import sys

from famx.base import gin_utils


def main() -> None:
    import jax

    from famx.base.installation import report

    try:
        devices = dict(collections.Counter(device.device_kind for device in jax.devices()))
    except RuntimeError as error:  # a plugin that does not fit its driver, or a device that is in use
        devices = " ".join(str(error).split())
    caches = {"compiled programs": str(jax.config.jax_compilation_cache_dir)}
    if folder := os.environ.get("FAMX_DATA_DIR"):
        caches["data sets"] = folder
    text, complete = report("famx", devices, caches)
    print(text)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    gin_utils.run(main, gin_flags=False)
