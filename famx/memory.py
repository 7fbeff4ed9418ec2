"""Reads texts of any length into a memory file of constant size.

    python -m famx.memory --checkpoint /tmp/famx/model --read book.txt --out book.famem
    python -m famx.memory --checkpoint /tmp/famx/model --memory book.famem --read more.txt --out two.famem
    python -m famx.memory --show book.famem

`python -m famx.chat --memory book.famem` answers questions about the text.
"""

from absl import flags

from famx.base import gin_utils


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Model that reads: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    flags.DEFINE_string("adapter", None, "Saved LoRA adapter to apply to the checkpoint.")
    flags.DEFINE_multi_string("read", [], "Text file to read; several are read in order.")
    flags.DEFINE_string("out", None, "Memory file to write.")
    flags.DEFINE_string("memory", None, "Memory file whose state reading starts from.")
    flags.DEFINE_bool("overwrite", False, "Replace the file --out if it exists.")
    flags.DEFINE_string("show", None, "Memory file to describe; nothing is read or written.")


def main() -> None:
    from famx.inference import memorize

    values = flags.FLAGS
    if values.show:
        print(memorize.describe(values.show))
        return
    memorize.make_memory(
        values.checkpoint, values.read, values.out, values.memory, values.overwrite, values.adapter
    )


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
