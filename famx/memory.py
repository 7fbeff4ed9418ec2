"""Reads texts of any length into a memory file of constant size.

    famx memory --checkpoint /tmp/famx/model --read book.txt --out book.famem
    famx memory --checkpoint /tmp/famx/model --memory book.famem --read more.txt --out two.famem
    famx memory --show book.famem

`famx chat --memory book.famem` answers questions about the text.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define
from famx.base.errors import ConfigError
from famx.base.ranges import Directory, Path


def define_flags() -> None:
    define("checkpoint", Directory, None, "Model that reads: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    define("adapter", Directory, None, "Saved LoRA adapter to apply, or the name of one of famx's own.")
    define("read", Path, [], "Text file to read; several are read in order.", several=True)
    define("out", Path, None, "Memory file to write.")
    define("memory", Path, None, "Memory file whose state reading starts from.")
    flags.DEFINE_bool("overwrite", False, "Replace the file --out if it exists.")
    define("show", Path, None, "Memory file to describe; nothing is read or written.")


def main() -> None:
    from famx.inference import memorize

    values = flags.FLAGS
    if values.show:
        names = ("checkpoint", "adapter", "read", "out", "memory")
        others = [name for name in names if values[name].value]
        if others:
            raise ConfigError(f"--show only describes a memory file: leave out --{others[0]}.")
        print(memorize.describe(values.show))
        return
    memorize.make_memory(
        values.checkpoint, values.read, values.out, values.memory, values.overwrite, values.adapter
    )


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
