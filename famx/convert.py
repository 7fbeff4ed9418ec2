"""Makes a MODEL_DIR from a pretrained model: a Hugging Face directory or a GGUF file.

    famx convert --from ~/models/SmolLM2-135M-Instruct --to /tmp/famx/smollm2
    famx convert --from model.gguf --to /tmp/famx/model --param_dtype=bfloat16 --memory=none

The weights are those of the original; the memory's parameters are new and learnt by finetuning. The
directory also gets the vocabulary and a `model.gin` for training. Tensors are copied one at a time.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, require
from famx.base.ranges import NonNegative, Path, Positive, Seed
from famx.base.signals import exit_on_interrupt

_FLOATS = ["float32", "bfloat16"]
_PROMPTS = ["normal", "tokens", "text", "bos"]
_FIELD_FLAGS = ("block_size", "memory_segments", "param_dtype", "dtype")


def define_flags() -> None:
    define("from", Path, None, "Model to import: a directory with config.json, or a GGUF file.")
    define("to", Path, None, "MODEL_DIR to write; must be missing or empty.")
    define("block_size", Positive, None, "Tokens per block (S); 1024 by default.")
    define("memory_segments", NonNegative, None, "Past blocks in the window (M); 3 by default.")
    flags.DEFINE_string("memory", None, "Kind of memory and its fields: infini, none, fam (the paper's), "
                        "fam:length=64,first_residual=ordinary (the default).")  # fmt: skip
    flags.DEFINE_enum("param_dtype", None, _FLOATS, "Weight dtype; float32 by default.")
    flags.DEFINE_enum("dtype", None, _FLOATS, "Compute dtype; float32 by default.")
    flags.DEFINE_multi_string("set", [], "Setting of the memory or the computation, as FIELD=VALUE.")
    flags.DEFINE_enum("prompt", None, _PROMPTS, "Initial prompt of the memory: an export's own, else by "
                      "default the begin-of-text token, bos; normal is noise.")  # fmt: skip
    define("plain_text", Path, None, "File for --prompt=text and fam:normalize=measured.")
    define("seed", Seed, 0, "Random seed of the initial prompt.")
    define("tokenizer", Path, None, "Tokenizer file that replaces the model's own.")
    define("pad_id", NonNegative, None, "Token id for padding, if the tokenizer defines none.")
    flags.DEFINE_string("mesh", "", "Mesh that will load the model, such as fsdp=8,tensor=2; arrays are "
                        "stored in pieces, so that each device reads only its own.")  # fmt: skip


def main() -> None:
    values = flags.FLAGS
    require({
        "from": "There is nothing to import: add --from=DIRECTORY or --from=FILE.gguf.",
        "to": "There is nowhere to write to: add --to=DIRECTORY.",
    })  # fmt: skip
    given = {name: values[name].value for name in _FIELD_FLAGS if values[name].value is not None}
    with exit_on_interrupt("Stopped; the same command starts over."):
        from famx.conversion.commands import convert, read_fields, read_mesh
        from famx.models.memory_start import MemoryStart

        fields, mesh = read_fields(values.set, values.memory) | given, read_mesh(values.mesh)
        places, start = (values["from"].value, values.to), MemoryStart(values.prompt, values.plain_text)
        convert(*places, fields, mesh, values.tokenizer, values.pad_id, start, values.seed)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
