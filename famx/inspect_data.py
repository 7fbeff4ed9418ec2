"""Shows what a model sees of a task: tokens, their loss weights, blocks and sizes.

    famx inspect-data --task passkey_words --length 512 --block_size 128
    famx inspect-data --task python_stdlib --packed --length 8192 --plot lengths.png

`famx.data.tools.inspect` explains the marks in the output.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, json_object, require
from famx.base.ranges import AtLeastTwo, NonNegative, Path, Positive, Seed


def define_flags() -> None:
    flags.DEFINE_string("task", None, "Name of the task, such as passkey_words or scrolls_qasper.")
    flags.DEFINE_string("task_options", "", 'Options of the task as JSON, such as {"data_dir": "/data"}.')
    define("vocabulary", Path, None, "Tokenizer file that replaces the task's vocabulary.")
    flags.DEFINE_string("split", None, "Split to show; the task's default if not given.")
    define("length", Positive, None, "Tokens per row, for packed rows and generated examples.")
    flags.DEFINE_bool("packed", False, "Show documents as packed rows.")
    define("seed", Seed, 0, "Random seed of the order of packed rows.")
    define("block_size", Positive, None, "Tokens per block, to mark where blocks begin.")
    define("examples", Positive, 2, "Number of examples to show.")
    define("first", NonNegative, 0, "Index of the first example to show.")
    define("show", AtLeastTwo, 2000, "Maximum tokens to show of an example, half from its end.")
    flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "Mark weights by colours.")
    define("plot", Path, None, "PNG file to write histograms of lengths to.")


def main() -> None:
    values = flags.FLAGS
    require({"task": "--task is missing: add --task=NAME."})
    options = json_object(values.task_options, "task_options")
    sys.stdout.reconfigure(errors="backslashreplace")
    color = values.color == "always" or (values.color == "auto" and sys.stdout.isatty())

    from famx.data.tools.inspect import inspect_task

    inspect_task(
        values.task, options, values.vocabulary, values.split, values.length, values.packed, values.seed,
        plot_file=values.plot, examples=values.examples, first=values.first,
        block_size=values.block_size, color=color, show=values.show,
    )  # fmt: skip


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
