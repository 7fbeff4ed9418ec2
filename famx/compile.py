"""Compiles a run's programs for devices that need not exist: do they fit, how fast can they be?

    famx compile pretrain_8b --topology=v5p:4x4x4

The gin files and bindings are those of `famx.train`; no data or checkpoint is opened. See docs/scale.md.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, require
from famx.base.errors import ConfigError
from famx.base.ranges import Path, Positive

# Macros that training needs and compiling does not.
_UNNEEDED = "MODEL_DIR MIXTURE_OR_TASK_NAME INITIAL_CHECKPOINT_PATH TRAIN_STEPS TEXT_FILES DATA_DIR"


def define_flags() -> None:
    topology = "TPU slice such as v5p:4x4x4 (or v4, v5e, v6e); GPUs such as h100 or h100:8 (a100, h200,"
    flags.DEFINE_string("topology", None, f"{topology} b200); gpu for those of this machine; or cpu:8.")
    define("num_slices", Positive, 1, "Number of slices, joined by the data-centre network.")
    flags.DEFINE_list("programs", ["train"], "Programs to compile: train, prefill, decode.")
    define("inference_batch_size", Positive, None, "Rows of prefill and decode; default 1 per shard.")
    flags.DEFINE_enum("find", None, ["batch_size"], "Search for the largest batch_size that fits.")
    define("json", Path, None, "JSON file to write the reports to.")
    flags.DEFINE_list("reports", None, "Files of --json that fill the table --name; compiles nothing.")
    define("markdown", Path, None, "Markdown page that contains the table --name.")
    flags.DEFINE_string("name", None, "Name of the table in the page, as its markers give it.")
    define("hlo", Path, None, "Folder to write the compiled programs to, as HLO text.")


def main() -> None:
    values = flags.FLAGS
    page = (values.reports, values.markdown, values.name)
    if any(page):
        if not all(page):
            raise ConfigError("--reports, --markdown and --name fill a table of a page: give all three.")
        from famx.scale.compiling import fill_page

        return fill_page(*page)
    require({"topology": "--topology is not set: name what to compile for, such as --topology=v5e:4x4."})

    from famx.scale.compiling import check_programs, compile_programs

    check_programs(values.programs)
    gin_utils.require_gin_file(__doc__)
    gin_utils.parse_gin_flags(_UNNEEDED.split())
    fits = compile_programs(
        values.topology, values.num_slices, values.programs, values.inference_batch_size, values.find,
        values.json, values.hlo,
    )  # fmt: skip
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, argument="gin_file")
