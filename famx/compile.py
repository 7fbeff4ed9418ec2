"""Compiles a run's programs for a slice that need not exist: do they fit, how fast can they be?

    python -m famx.compile --gin_file=gin_configs/examples/pretrain_8b.gin --topology=v5p:4x4x4

The gin files and bindings are those of `famx.train`, of which neither the task, nor MODEL_DIR, nor a
checkpoint is looked at. See docs/scale.md.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.scale import main as scale
from famx.scale import programs

# What a run needs and a compiler does not.
UNNEEDED = (
    *("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "INITIAL_CHECKPOINT_PATH", "TRAIN_STEPS"),
    *("TEXT_FILES", "DATA_DIR"),
)

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "A TPU slice such as v5p:4x4x4 (v4, v5e, v5p, v6e); gpu; or cpu:8."
)
_SLICES = flags.DEFINE_integer("num_slices", 1, "So many such slices, joined by the network.")
_PROGRAMS = flags.DEFINE_list("programs", ["train"], "Of train, prefill, decode.")
_INFERENCE = flags.DEFINE_integer(
    "inference_batch_size", None, "Of prefill and decode; a row for each shard of a batch by default."
)
_FIND = flags.DEFINE_enum("find", None, ["batch_size"], "Find the largest batch_size that fits.")
_JSON = flags.DEFINE_string("json", None, "File for the reports.")
_REPORTS = flags.DEFINE_list("reports", None, "Files of --json; --markdown is filled, nothing compiled.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Page whose table --name the reports fill.")
_NAME = flags.DEFINE_string("name", None, "Of the table in the page, between its markers.")
_HLO = flags.DEFINE_string("hlo", None, "Folder for the programs as the compiler made them.")


def main():
    page = (_REPORTS.value, _MARKDOWN.value, _NAME.value)
    if any(page):
        if not all(page):
            raise ConfigError("--reports, --markdown and --name fill a table of a page: give all three.")
        scale.fill_page(*page)
        return
    if _TOPOLOGY.value is None:
        raise ConfigError("--topology is not set: name what to compile for, such as --topology=v5e:4x4.")
    for name in _PROGRAMS.value:
        if name not in programs.PROGRAMS:
            known = ", ".join(programs.PROGRAMS)
            raise ConfigError(f"There is no program {name!r}: choose from {known}.")
    gin_utils.parse_gin_flags(UNNEEDED)
    fits = scale.compile_programs(
        _TOPOLOGY.value, _SLICES.value, _PROGRAMS.value, _INFERENCE.value, _FIND.value, _JSON.value,
        _HLO.value,
    )  # fmt: skip
    if not fits:
        sys.exit(1)


if __name__ == "__main__":
    gin_utils.run(main)
