"""Measures what a model costs by the length of its text: time and memory of training and of reading.

    famx profile --sizes=tiny --lengths=1024,4096,16384 --out=/tmp/famx/profile
    famx profile --sizes=1b --lengths=1024,16384,131072 --out=/tmp/famx/profile --topology=h100

FAM, the same model without memory (BSWA) and full attention are timed in turns on this machine, or
compiled for one that need not exist (`--topology`). profile.md, .csv and .png in `--out` have what all
commands with this directory found, next to theory's lines. See docs/cost.md.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, integers
from famx.base.ranges import Path, Positive, Rate
from famx.base.signals import exit_on_interrupt, interrupt_on_sigterm


def define_flags() -> None:
    define("out", Path, None, "Directory to write to; created if missing.")
    flags.DEFINE_list("sizes", ["tiny"], "Models: tiny, 135m, 1b, 8b, 24b, or gin files of models.")
    flags.DEFINE_list("lengths", ["1024", "4096", "16384"], "Tokens of a row.")
    flags.DEFINE_list("variants", ["fam", "bswa", "full"], "Compared: fam, bswa, full (attention).")
    passes = "Passes: training, reading (streamed), at_once (the text in one call)."
    flags.DEFINE_list("passes", ["training", "reading"], passes)
    topology = "Compile for a TPU slice such as v5e:1x1, or for GPUs such as h100, and run nothing."
    flags.DEFINE_string("topology", None, topology)
    define("rows", Positive, 1, "Rows of the batch of each device.")
    flags.DEFINE_enum("optimizer", "adamw", ["adamw", "adafactor", "lion"], "Optimiser of training.")
    dtype = "Dtype of the parameters; that of the model by default."
    flags.DEFINE_enum("param_dtype", None, ["float32", "bfloat16"], dtype)
    policies = ["none", "full", "attention", "dots", "dots_no_batch", "offload"]
    flags.DEFINE_enum("remat", None, policies, "What training recomputes; the model's policy by default.")
    define("repeats", Positive, 3, "Rounds in which the variants are timed in turns.")
    define("most_seconds", Rate, 60.0, "What would take longer, by a shorter text, is not timed.")


def main() -> None:
    values = flags.FLAGS
    lengths = integers(values.lengths, "lengths")

    from famx.scale.profiling import Plan, make_profile
    from famx.scale.variants import Options

    options = Options(values.rows, values.optimizer, values.param_dtype, values.remat)
    plan = Plan(
        values.sizes, lengths, values.variants, values.passes, options, values.repeats,
        values.most_seconds,
    )  # fmt: skip
    with exit_on_interrupt("Stopped; the same command resumes."), interrupt_on_sigterm():
        cells = make_profile(values.out, plan, values.topology)
    print(f"{values.out}: {len(cells)} cells; profile.md, profile.csv, profile.png")


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
