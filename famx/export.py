"""Writes a trained model as a directory that transformers can load.

    famx export --checkpoint /tmp/famx/model --to /tmp/famx/exported
    famx export --checkpoint /tmp/famx/model/checkpoint_5000 --to DIR --dtype bfloat16

Adapters are merged into the weights. A model with a memory comes with the code that transformers runs
with `trust_remote_code=True`. `famx convert --from DIR` reads all of it back.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, require
from famx.base.ranges import Directory, Path
from famx.base.signals import exit_on_interrupt

_DTYPES = ["float32", "bfloat16", "float16", "float64"]


def define_flags() -> None:
    define("checkpoint", Directory, None, "Model to export: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    define("to", Path, None, "Directory to write; must be missing or empty.")
    define("adapter", Directory, None, "Saved LoRA adapter to merge, or the name of one of famx's own.")
    define("source", Directory, None, "Directory with config.json and tokenizer of the model that was "
                        "imported; by default MODEL_DIR/source if it exists.")  # fmt: skip
    flags.DEFINE_enum("dtype", None, _DTYPES, "Weight dtype of the files; by default that of training.")
    flags.DEFINE_boolean("memory", True, "Whether the model keeps its memory; without it, it is one of "
                         "its original architecture.")  # fmt: skip
    flags.DEFINE_string("max_shard_size", "5GB", "Maximum size of a weight file: bytes, KB, MB, GB, TB.")


def main() -> None:
    values = flags.FLAGS
    require({
        "checkpoint": "There is nothing to export: add --checkpoint=MODEL_DIR.",
        "to": "There is nowhere to write to: add --to=DIR.",
    })  # fmt: skip
    with exit_on_interrupt("Stopped; nothing was written."):
        from famx.conversion.commands import export_checkpoint

        export_checkpoint(
            values.checkpoint, values.to, values.dtype, values.max_shard_size, values.source,
            values.adapter, values.memory,
        )  # fmt: skip


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
