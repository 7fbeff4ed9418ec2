"""Trains a model from gin files.

    python -m famx.train --gin_file=gin_configs/examples/passkey_tiny.gin \\
        --gin.MODEL_DIR="'/tmp/famx/passkey_tiny'"

The same command goes on where an interrupted run stopped.
"""

import os

import jax

from famx import gin_utils
from famx.errors import ConfigError
from famx.training import loop


def main(argv):
    if len(argv) > 1:
        raise ConfigError(f"Unknown argument {argv[1]}: settings are --gin_file and --gin.NAME=VALUE.")
    cache = os.path.join(os.path.expanduser("~"), ".cache", "famx", "xla")
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache))
    gin_utils.parse_gin_flags()
    gin_utils.call(loop.train)


if __name__ == "__main__":
    gin_utils.run(main)
