"""Writes a task's examples in SeqIO's cache layout, without Apache Beam.

    python -m famx.cache --task scrolls_qasper --output_dir /cache

makes OUTPUT_DIR/TASK/SPLIT.tfrecord-00000-of-00016 and so on, `info.SPLIT.json`, `stats.SPLIT.json` and,
when all splits asked for are there, `COMPLETED`. SeqIO reads it where the same task is registered:

    seqio.add_global_cache_dirs(["/cache"])
    register_text_task(famx.data.get("scrolls_qasper"))
    seqio.get_mixture_or_task("scrolls_qasper").get_dataset(..., use_cached=True)

What is cached is what comes out of the task's preprocessors in front of its `CacheDatasetPlaceholder`.
Unshuffled, SeqIO reads the examples in the order of the split: it takes 16 examples of each file in turn,
16 files at a time, and so they are dealt out. A command that was interrupted keeps the files that are
complete; other data, settings or numbers of files in the same place end it.
"""

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.files import replacing, write_json, write_text
from famx.base.progress import Progress
from famx.base.signals import exit_on_interrupt
from famx.data.storage.records import TFRecordRecords
from famx.data.tasks import IndexedDocuments, Kind, Suite, kind_of, registry
from famx.data.vocabularies import open_vocabulary

_RUN = 16  # SeqIO's files read at a time, and examples taken of each in turn


def cache(
    task: Any,
    output_dir: str,
    splits: Sequence[str] | None = None,
    num_shards: int = 16,
    message: Callable[[str], None] = print,
) -> dict[str, dict[str, int]]:
    """Caches a task of SeqIO, or all tasks of a mixture.

    Args:
      task: a `seqio.Task` or `seqio.Mixture`.
      output_dir: where the folders of the tasks go.
      splits: names of splits; None: all that the task has.
      num_shards: number of files of a split.
      message: called with what is worth knowing.

    Returns:
      the number of examples of every split of every task.

    Raises:
      ConfigError: a task cannot be cached or has no such split, `num_shards` is below 1, the place
        cannot be written to, or holds a cache of other data or settings.
    """
    import seqio

    if num_shards < 1:
        raise ConfigError(f"num_shards is {num_shards}; it must be at least 1.")
    found: dict[str, dict[str, int]] = {}
    for one in seqio.get_subtasks(task):
        if not one.supports_caching:
            raise ConfigError(
                f"'{one.name}' cannot be cached: its examples are made, not read, or it has no "
                "CacheDatasetPlaceholder; use it as it is."
            )
        for split in splits or ():
            if split not in one.splits:
                raise ConfigError(
                    f"'{one.name}' has no split '{split}' here; it has {', '.join(one.splits)}."
                )
        folder = os.path.join(os.path.expanduser(output_dir), seqio.get_task_dir_from_name(one.name))
        try:
            os.makedirs(folder, exist_ok=True)
            found[one.name] = {
                split: _cache_split(one, split, folder, num_shards, message)
                for split in splits or one.splits
            }
            write_text(os.path.join(folder, "COMPLETED"), "")
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise ConfigError(f"{folder} cannot be written to: {error.strerror}.") from error
    return found


def _cache_split(task, split, folder, num_shards, message) -> int:
    """Writes what is missing of a split; the number of its examples."""
    import seqio
    import tensorflow as tf

    dataset = task.source.get_dataset(split=split, shuffle=False)
    preprocessed = lambda x: task.preprocess_precache(x, seed=0).prefetch(tf.data.AUTOTUNE)
    sources = task.source.num_input_examples(split)
    if sources is None:
        sources = sum(1 for _ in dataset)
    first = next(iter(preprocessed(dataset)), None)
    if first is None:
        raise ConfigError(f"The {split} split of '{task.name}' is empty; there is nothing to cache.")
    begun = {
        "num_shards": num_shards,
        "sources": int(sources),
        "first_example": hashlib.sha256(_serialised(first)).hexdigest(),
    }
    name = os.path.join(folder, f"{split}.tfrecord")
    info_path, begun_path = (os.path.join(folder, f"{x}.{split}.json") for x in ("info", "begun"))
    _check_same(begun, begun_path, folder, split)
    paths = [f"{name}-{k:05d}-of-{num_shards:05d}" for k in range(num_shards)]
    missing = [k for k, path in enumerate(paths) if not os.path.exists(path)]
    if not missing and os.path.exists(info_path):
        examples = len(_records(paths))
        message(f"{name}: {examples} examples are there already.")
        return examples
    for left in os.listdir(folder):
        if left.startswith(f".{split}.tfrecord-"):  # of a command that was killed
            os.remove(os.path.join(folder, left))
    owner = shard_of(np.arange(sources), int(sources), num_shards)
    write_json(begun_path, begun)
    total = int(np.isin(owner, missing).sum())
    progress = Progress(f"{task.name} {split}", total)
    owners = tf.constant(owner)
    for k in missing:
        own = dataset.enumerate().filter(lambda i, _, k=k: owners[i] == k).map(lambda _, x: x)
        with replacing(paths[k]) as unfinished, tf.io.TFRecordWriter(str(unfinished)) as writer:
            for example in preprocessed(own):
                writer.write(_serialised(example))
                progress.add()
    progress.close()
    stats = _stats(task, paths)
    write_json(os.path.join(folder, f"stats.{split}.json"), stats, sort_keys=True)
    info = {
        "num_shards": num_shards,
        "features": {x: _feature(value) for x, value in first.items()},
        "seqio_version": seqio.__version__,
    }
    write_json(info_path, info, sort_keys=True)
    message(f"{name}: {stats['examples']} examples.")
    return stats["examples"]


def shard_of(i: np.ndarray, size: int, num_shards: int) -> np.ndarray:
    """int64: the file of each of `size` examples, so that SeqIO reads them in order.

    Runs of examples are dealt to a group of files in turn; every group but the last gets as many runs
    for each of its files, so that all its files end together.
    """
    groups = -(-num_shards // _RUN)
    runs = -(-size // _RUN)
    rounds = -(-runs // num_shards)  # runs of a file
    group = np.minimum(i // (_RUN * _RUN * rounds), groups - 1)
    start = group * _RUN
    files = np.minimum(num_shards - start, _RUN)
    return start + (i // _RUN - group * _RUN * rounds) % files


def _serialised(example: Mapping[str, Any]) -> bytes:
    import seqio

    return seqio.dict_to_tfexample(example).SerializeToString(deterministic=True)


def _feature(value: Any) -> dict[str, Any]:
    """Shape and type of a feature as SeqIO notes them: only the first dimension may vary."""
    shape = value.shape.as_list()
    return {"shape": [None, *shape[1:]] if shape else [], "dtype": value.dtype.name}


def _check_same(begun: Mapping[str, Any], path: str, folder: str, split: str) -> None:
    """Raises ConfigError where files of this split were made from other data, or in another number."""
    there = [x for x in os.listdir(folder) if x.startswith(f"{split}.tfrecord-")]
    if not there and not os.path.exists(path):
        return
    before = {}
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
    if before != begun:
        changed = next((x for x in begun if before.get(x) != begun[x]), "")
        was = f" ({changed.replace('_', ' ')}: was {before[changed]})" if changed in before else ""
        raise ConfigError(
            f"{folder} holds a cache of the {split} split that was made from other data or settings{was};"
            " choose another output directory, or delete this one."
        )


def _records(paths: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """The cached examples, file by file; files without any are left out."""
    return TFRecordRecords([path for path in paths if os.path.getsize(path)])


def _stats(task, paths: Sequence[str]) -> dict[str, int]:
    """Numbers of examples, and per feature of tokens those of tokens that are neither pad nor eos."""
    records = _records(paths)
    stats = {"examples": len(records)}
    for i in range(len(records)):
        record = records[i]
        for name, feature in task.output_features.items():
            value = record.get(name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "i":
                special = [feature.vocabulary.eos_id, feature.vocabulary.pad_id]
                count = int((~np.isin(value, [x for x in special if x is not None])).sum())
                stats[f"{name}_tokens"] = stats.get(f"{name}_tokens", 0) + count
                stats[f"{name}_max_tokens"] = max(stats.get(f"{name}_max_tokens", 0), count)
            elif isinstance(value, bytes):
                stats[f"{name}_chars"] = stats.get(f"{name}_chars", 0) + len(value.decode())
    return stats


def seqio_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    decoder_only: bool = False,
    length: int | None = None,
    examples: int | None = None,
) -> Any:
    """The SeqIO task or mixture of a name; one of our tasks is registered with SeqIO for it.

    A mixture of ours becomes a SeqIO mixture of all its tasks. The first examples of a task that is
    made by index become documents of one length, under the name `<name>_<length>`.

    Args:
      name: a name known to SeqIO or to `famx.data.tasks.registry`.
      options: settings of a task of ours, as in training.
      decoder_only: see `famx.data.seqio.register_text_task`.
      length, examples: tokens of an example and number of examples of a task made by index.

    Raises:
      ConfigError: there is no such task, the options do not fit, or its files are missing.
    """
    import seqio

    from famx.data.seqio import register_documents, register_text_task

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in known and name not in registry.names():
        if options:
            raise ConfigError(f"'{name}' is a SeqIO task and takes no options, but got {dict(options)}.")
        return seqio.get_mixture_or_task(name)
    try:
        task = registry.get(name, **(options or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    kind = Kind.SCORED if isinstance(task, Suite) else kind_of(task)
    if kind is Kind.MADE:
        if not length or not examples:
            raise ConfigError(
                f"'{name}' is made, for any length and without end: say --length and --examples."
            )
        made = {
            split: IndexedDocuments(dataclasses.replace(task, split=own), length, examples)
            for split, own in (("train", "train"), ("validation", "eval"))
        }
        return register_documents(f"{name}_{length}", made, task.vocab)
    if kind is Kind.DOCUMENTS:
        splits = {
            split: registry.get(name, **{**(options or {}), "split": split})
            for split in ("train", "validation")
        }
        seqio.TaskRegistry.remove(name)
        return register_documents(name, splits, task.vocab)
    for one in task.tasks:
        seqio.TaskRegistry.remove(one.name)  # registered with other settings
        register_text_task(one, decoder_only=decoder_only)
    if task.tasks == (task,):
        return seqio.TaskRegistry.get(task.name)
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, [one.name for one in task.tasks], default_rate=1.0)


def json_options(text: str, flag: str) -> dict[str, Any]:
    """The value of a flag that holds a JSON object; raises ConfigError if it is none."""
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--{flag} is no JSON: {error}. Write it as '{{\"name\": value}}'.") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--{flag} must be a JSON object, such as '{{\"data_dir\": \"/data\"}}'.")
    return options


def main() -> None:
    """The command line."""
    values = flags.FLAGS
    for name in ("task", "output_dir"):
        if not getattr(values, name):
            raise ConfigError(f"--{name} is missing: python -m famx.cache --task NAME --output_dir DIR.")
    for module in values.module_import:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"The module {module} cannot be imported: {error}.") from error
    options = json_options(values.task_options, "task_options")
    try:
        if values.vocabulary:
            options["vocabulary"] = open_vocabulary(values.vocabulary)
        task = seqio_task(values.task, options, values.decoder_only, values.length, values.examples)
        with exit_on_interrupt("Stopped; the same command resumes after the files that are complete."):
            cache(task, values.output_dir, values.split or None, values.num_shards)
    except (ValueError, OSError) as error:  # broken data and full disks get their sentence too
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("task", None, "Name of the task or mixture, such as scrolls_qasper.")
    flags.DEFINE_string("task_options", "", 'Settings of the task, such as {"data_dir": "/data"}.')
    flags.DEFINE_string("vocabulary", None, "Tokenizer file in place of the task's vocabulary.")
    flags.DEFINE_string("output_dir", None, "Where the cache goes: a folder per task.")
    flags.DEFINE_list("split", [], "Splits, comma-separated; all if not given.")
    flags.DEFINE_integer("num_shards", 16, "Number of files of each split.")
    flags.DEFINE_bool("decoder_only", False, "Cache inputs and targets as one sequence with weights.")
    flags.DEFINE_integer("length", None, "Tokens of an example, for tasks that are made.")
    flags.DEFINE_integer("examples", None, "Examples of each split, for tasks that are made.")
    flags.DEFINE_multi_string("module_import", [], "Module that registers SeqIO tasks; repeatable.")
    gin_utils.run(main, gin_flags=False)
