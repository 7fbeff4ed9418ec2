"""Averages saved LoRA adapters: several of one run, or one with what it became in further training.

    famx average --adapter=smollm2_passkey --adapter=/tmp/famx/finetuned/adapter --to=/tmp/famx/averaged

All must have begun as the same adapter, since the mean is taken of each adapter's two factors. What
further training on few documents gains is often kept, and what it loses regained (arXiv 2109.01903).
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, require
from famx.base.ranges import Directory, Path, Rate


def define_flags() -> None:
    define("adapter", Directory, None, "Saved adapter, or the name of one of famx's own.", several=True)
    define("weight", Rate, None, "Weight of each adapter, in their order; by default all are equal.",
           several=True)  # fmt: skip
    define("to", Path, None, "Directory to write; must be missing or empty.")


def main() -> None:
    values = flags.FLAGS
    require({
        "adapter": "There is nothing to average: add --adapter=DIR for each adapter.",
        "to": "There is nowhere to write to: add --to=DIR.",
    })  # fmt: skip
    from famx.conversion.exporting import check_destination
    from famx.lora import average_adapters

    check_destination(values.to)
    average_adapters(values.to, values.adapter, values.weight)
    print(f"The mean of {len(values.adapter)} adapters is in {values.to}.")


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
