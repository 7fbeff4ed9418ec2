"""Writes a task's examples in SeqIO's cache layout, in this process or on the workers of Apache Beam.

    famx cache --task scrolls_qasper --output_dir /cache

writes OUTPUT_DIR/TASK/SPLIT.tfrecord-00000-of-00016 and so on, `info.SPLIT.json`, `stats.SPLIT.json`,
the vocabulary of ids and, when all requested splits are complete, `COMPLETED`. SeqIO reads it wherever
the same task is registered:

    seqio.add_global_cache_dirs(["/cache"])
    register_text_task(famx.data.get("scrolls_qasper"))
    seqio.get_mixture_or_task("scrolls_qasper").get_dataset(..., use_cached=True)

The same command resumes an interrupted one. See `famx.data.seqio_cache`.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import BEAM_OPTIONS, define, json_object, require
from famx.base.ranges import Path, Positive
from famx.base.signals import exit_on_interrupt


def define_flags() -> None:
    flags.DEFINE_string("task", None, "Name of the task or mixture, such as scrolls_qasper.")
    flags.DEFINE_string("task_options", "", 'Options of the task as JSON, such as {"data_dir": "/data"}.')
    define("vocabulary", Path, None, "Tokenizer file that replaces the task's vocabulary.")
    define("output_dir", Path, None, "Directory of the cache, which gets a folder for each task.")
    flags.DEFINE_list("split", [], "Splits to cache, with commas between them; all by default.")
    define("num_shards", Positive, 16, "Number of files per split.")
    flags.DEFINE_bool("decoder_only", False, "Cache inputs and targets as one sequence with weights.")
    define("length", Positive, None, "Tokens per example, for tasks that generate their examples.")
    define("examples", Positive, None, "Examples per split, for tasks that generate their examples.")
    flags.DEFINE_string("beam_options", None, BEAM_OPTIONS)


def main() -> None:
    values = flags.FLAGS
    require({
        "task": "--task is missing: add --task=NAME.",
        "output_dir": "--output_dir is missing: add --output_dir=DIR.",
    })  # fmt: skip
    options = json_object(values.task_options, "task_options")

    with exit_on_interrupt("Stopped; the same command resumes after the files that are complete."):
        from famx.data.seqio_cache import cache_by_name

        cache_by_name(
            values.task, values.output_dir, options, values.vocabulary, values.split or None,
            values.num_shards, values.decoder_only, values.length, values.examples,
            values["import"].value, values.beam_options,
        )  # fmt: skip


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
