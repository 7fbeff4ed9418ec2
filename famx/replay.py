"""Runs the step again in which the numbers of a run went wrong, and names the first value not finite.

    famx replay /tmp/famx/model
    famx replay /tmp/famx/model --gin.OPTIMIZER=@optimizers.lion()

The settings are those of the run (`MODEL_DIR/config.gin`), and bindings change them. See
docs/reliability.md.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.files import as_path, local_copy


def define_flags() -> None:
    flags.DEFINE_string("model_dir", None, "MODEL_DIR of the run; it may also be given without a name.")


def main() -> None:
    from famx.training.replay import replay
    from famx.training.run import Run

    values = flags.FLAGS
    if not values.model_dir:
        raise ConfigError("Name the MODEL_DIR of the run: famx replay MODEL_DIR.")
    directory = as_path(values.model_dir).absolute()
    config = directory / "config.gin"
    if not config.exists():
        raise ConfigError(f"{directory} has no config.gin: it is not the directory of a training run.")
    gin_utils.import_modules()
    with local_copy(config) as file:
        gin_utils.parse_gin([str(file), *values.gin_file], values.gin_bindings, values.gin_search_paths)
    replay(gin_utils.call(lambda: Run(model_dir=str(directory), evaluation=None)))


if __name__ == "__main__":
    gin_utils.run(main, define_flags, argument="model_dir")
