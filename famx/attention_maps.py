"""Writes the attention maps of a text: figures, a page, the numbers and their summary.

    famx attention-maps --checkpoint /tmp/famx/model --text book.txt --out /tmp/maps
    famx attention-maps --checkpoint /tmp/famx/model --text book.txt --out /tmp/maps \\
        --layers 0,5 --heads 0,1 --blocks 0,1,-1

The text may have any length: only the maps of the blocks in `--blocks` are kept; -1 is the last block.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, integers
from famx.base.ranges import Directory, Path


def define_flags() -> None:
    define("checkpoint", Directory, None, "Model that reads: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    define("text", Path, None, "Text file to read.")
    define("out", Path, None, "Directory to write to; created if missing.")
    flags.DEFINE_list("layers", None, "Layers whose maps are kept, such as 0,5; all by default.")
    flags.DEFINE_list("heads", None, "Heads whose maps are kept, such as 0,1; all by default.")
    flags.DEFINE_list("blocks", ["0", "-1"], "Blocks whose maps are kept; -1 is the last block.")
    flags.DEFINE_bool("overwrite", False, "Write into the directory --out even if it contains maps.")


def main() -> None:
    values = flags.FLAGS
    choice = {name: integers(values[name].value, name) for name in ("layers", "heads", "blocks")}

    from famx.inference.text_maps import make_maps

    make_maps(values.checkpoint, values.text, values.out, overwrite=values.overwrite, **choice)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
