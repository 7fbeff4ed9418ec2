"""Turns the official download of a data set into records that its task reads quickly.

    famx prepare --task scrolls_qasper --source ~/Downloads/qasper.zip --data_dir /data

The source is a folder or an archive (zip, tar, tar.gz, tar.bz2, tar.xz), or a folder that contains such
archives. The records are written to DATA_DIR/TASK/SPLIT.tfrecord-00000-of-00001, each split completely or
not at all; the same command resumes an interrupted one at the next split. `--task xlsum` prepares every
language. If the numbers of records differ from the published ones, nothing is written, unless
`--allow_partial` is given.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import BEAM_OPTIONS, define, require
from famx.base.errors import ConfigError
from famx.base.ranges import Path, Positive
from famx.base.signals import exit_on_interrupt


def define_flags() -> None:
    flags.DEFINE_string("task", None, "Name of the task or mixture, such as scrolls_qasper or xlsum.")
    define("source", Path, None, "Folder or archive of the official files.")
    define("data_dir", Path, None, "Directory of the records; FAMX_DATA_DIR by default.")
    flags.DEFINE_bool("allow_partial", False, "Accept incomplete files, or others than published.")
    define("num_shards", Positive, 1, "Number of files per split.")
    flags.DEFINE_string("beam_options", None, BEAM_OPTIONS)


def main() -> None:
    values = flags.FLAGS
    require({
        "task": "--task is missing: add --task=NAME.",
        "source": "--source is missing: add --source=PLACE.",
    })  # fmt: skip
    with exit_on_interrupt("Stopped; the same command resumes with the split that is missing."):
        from famx.data.tools.prepare import prepare

        try:
            prepare(
                values.task, values.source, values.data_dir, values.allow_partial, values.num_shards,
                beam_options=values.beam_options,
            )  # fmt: skip
        except (ValueError, OSError) as error:  # damaged files and full disks
            raise ConfigError(str(error)) from error


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
