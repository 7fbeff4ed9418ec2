"""Examples of a task in SeqIO's cache layout, by one process or by the workers of Apache Beam.

What is cached is the output of the task's preprocessors before its `CacheDatasetPlaceholder`. SeqIO
reads 16 files at a time and takes 16 examples of each in turn; the examples are distributed over the
files so that SeqIO, without shuffling, reads them in the order of the split. Files that an interrupted
command completed are kept by the next one; a cache of other data or settings in the same directory is an
error.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from famx.base.errors import ConfigError
from famx.base.files import replacing, write_json, write_text
from famx.base.packages import import_named, optional_package
from famx.base.progress import Progress
from famx.base.ranges import Path, Positive
from famx.base.values import checked, options_named
from famx.data.beam import map_on_workers
from famx.data.storage import shard_paths
from famx.data.storage.records import TFRecordRecords
from famx.data.tasks import IndexedDocuments, Kind, Suite, has_settings, kind_of, registry, vocabulary_of
from famx.data.vocabularies import load_vocabulary, open_vocabulary, save_vocabulary

_RUN = 16  # files that SeqIO reads at a time, and examples that it takes of each in turn


@checked
def cache(
    task: Any,
    output_dir: Path,
    splits: Sequence[str] | None = None,
    num_shards: Positive = 16,
    message: Callable[[str], None] = print,
    workers: "Workers | None" = None,
) -> dict[str, dict[str, int]]:
    """Cache a SeqIO task, or all tasks of a mixture.

    Args:
      task: `seqio.Task` or `seqio.Mixture`.
      output_dir: directory that gets a folder for each task.
      splits: names of splits; None: all splits of the task.
      num_shards: number of files per split.
      message: called with each line of the report.
      workers: write the files, which are the same; None: this process writes them.

    Returns:
      The number of examples per task and split.

    Raises:
      ConfigError: a task cannot be cached or lacks a split, or the directory
        cannot be written to or holds a cache of other data or settings.
    """
    import seqio

    plans: list[_Plan] = []
    for member in seqio.get_subtasks(task):
        if not member.supports_caching:
            raise ConfigError(
                f"'{member.name}' cannot be cached: its examples are generated, not read, or it has no "
                "CacheDatasetPlaceholder; use it without a cache."
            )
        for split in splits or ():
            if split not in member.splits:
                raise ConfigError(
                    f"'{member.name}' has no split '{split}' here; it has {', '.join(member.splits)}."
                )
        folder = os.path.join(os.path.expanduser(output_dir), seqio.get_task_dir_from_name(member.name))
        try:
            os.makedirs(folder, exist_ok=True)
            plans += [_begin(member, x, folder, num_shards) for x in splits or member.splits]
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise ConfigError(f"{folder} cannot be written to: {error.strerror}.") from error
    made = {} if workers is None else workers.write(plans, os.path.expanduser(output_dir))
    counts: dict[str, dict[str, int]] = {}
    for plan in plans:
        if workers is None:
            _write_files(plan.task, plan.split, plan.paths, plan.missing)
        done = _finish(plan, [made[path] for path in plan.paths if path in made], message)
        counts.setdefault(plan.task.name, {})[plan.split] = done
    for folder, plan in {os.path.dirname(plan.paths[0]): plan for plan in plans}.items():
        _save_vocabulary(plan, folder)
        write_text(os.path.join(folder, "COMPLETED"), "")
    return counts


def _save_vocabulary(plan: "_Plan", folder: str) -> None:
    """Write the vocabulary of cached ids into the folder; texts have none, and some cannot be saved."""
    from famx.data.seqio import from_seqio_vocabulary

    ids = plan.first.get("targets")
    if ids is not None and ids.dtype.is_integer:
        vocabulary = from_seqio_vocabulary(plan.task.output_features["targets"].vocabulary)
        if vocabulary is not None:
            save_vocabulary(vocabulary, folder)


def check_cached_vocabulary(task: Any) -> None:
    """Check that a cached SeqIO task or mixture has ids of its own vocabulary, as far as the cache tells.

    Raises:
      ConfigError: a cache was written with another vocabulary.
    """
    import seqio

    from famx.data.seqio import from_seqio_vocabulary

    for member in seqio.get_subtasks(task):
        folder = member.cache_dir
        if folder and os.path.exists(os.path.join(folder, "vocabulary.json")):
            saved = load_vocabulary(folder)
            if from_seqio_vocabulary(member.output_features["targets"].vocabulary, saved) != saved:
                raise ConfigError(
                    f"{folder} holds ids of another vocabulary than that of '{member.name}': cache it"
                    " again elsewhere, or register it with the vocabulary that it was cached with."
                )


class _Plan(NamedTuple):
    """A split to write.

    Attributes:
      task, split: the split of a SeqIO task.
      first: its first example.
      paths: its files.
      missing: indices of the files that are missing.
    """

    task: Any
    split: str
    first: Mapping[str, Any]
    paths: Sequence[str]
    missing: Sequence[int]

    def json_path(self, name: str) -> str:
        """Path of `info`, `stats` or `begun` of the split."""
        return os.path.join(os.path.dirname(self.paths[0]), f"{name}.{self.split}.json")


def _begin(task, split: str, folder: str, num_shards: int) -> _Plan:
    """Check the split and what exists of it, and write `begun.SPLIT.json`."""
    first = next(iter(_preprocessed(task, task.source.get_dataset(split=split, shuffle=False))), None)
    if first is None:
        raise ConfigError(f"The {split} split of '{task.name}' is empty; there is nothing to cache.")
    begun = {
        "num_shards": num_shards,
        "sources": _sources(task, split),
        "first_example": hashlib.sha256(_serialised(first)).hexdigest(),
    }
    paths = shard_paths(os.path.join(folder, f"{split}.tfrecord"), num_shards)
    missing = [k for k, path in enumerate(paths) if not os.path.exists(path)]
    plan = _Plan(task, split, first, paths, missing)
    _check_same(begun, plan.json_path("begun"), folder, split)
    for file in os.listdir(folder):
        if file.startswith(f".{split}.tfrecord-"):  # temporary file of a command that was killed
            os.remove(os.path.join(folder, file))
    write_json(plan.json_path("begun"), begun)
    return plan


def _finish(plan: _Plan, made: Sequence[Mapping[str, int]], message: Callable[[str], None]) -> int:
    """Write `stats` and `info` of a split; return the number of its examples.

    Args:
      plan: the split, whose files are complete.
      made: `_stats` of the missing files, if they are known.
      message: called with a line.
    """
    import seqio

    name = plan.paths[0].rpartition("-00000-of-")[0]
    if not plan.missing and os.path.exists(plan.json_path("info")):
        examples = len(_records(plan.paths))
        message(f"{name}: {examples} examples exist already.")
        return examples
    known = [plan.paths[k] for k in plan.missing] if made else []
    stats = _joined_stats([_stats(plan.task, [x for x in plan.paths if x not in known]), *made])
    write_json(plan.json_path("stats"), stats, sort_keys=True)
    info = {
        "num_shards": len(plan.paths),
        "features": {x: _feature(value) for x, value in plan.first.items()},
        "seqio_version": seqio.__version__,
    }
    write_json(plan.json_path("info"), info, sort_keys=True)
    message(f"{name}: {stats['examples']} examples.")
    return stats["examples"]


def _write_files(task, split: str, paths: Sequence[str], wanted: Sequence[int]) -> None:
    """Write the files `wanted` of a split, each completely or not at all."""
    import tensorflow as tf

    dataset = task.source.get_dataset(split=split, shuffle=False)
    size = _sources(task, split)
    owner = shard_of(np.arange(size), size, len(paths))
    owners = tf.constant(owner)
    with Progress(f"{task.name} {split}", int(np.isin(owner, wanted).sum())) as progress:
        for k in wanted:
            selected = dataset.enumerate().filter(lambda i, _, k=k: owners[i] == k).map(lambda _, x: x)
            with replacing(paths[k]) as unfinished, tf.io.TFRecordWriter(str(unfinished)) as writer:
                for example in _preprocessed(task, selected):
                    writer.write(_serialised(example))
                    progress.add()


def _preprocessed(task, dataset):
    import tensorflow as tf

    return task.preprocess_precache(dataset, seed=0).prefetch(tf.data.AUTOTUNE)


def _sources(task, split: str) -> int:
    """Number of examples of a split before preprocessing."""
    size = task.source.num_input_examples(split)
    if size is None:
        size = sum(1 for _ in task.source.get_dataset(split=split, shuffle=False))
    return int(size)


def shard_of(i: np.ndarray, size: int, num_shards: int) -> np.ndarray:
    """Index of the file of each example, int64, chosen so that SeqIO reads the examples in order.

    Runs of 16 examples go to the files of a group in turn. In every group except the last, all files get
    the same number of runs, so that they end together.

    Args:
      i: indices of examples, int64.
      size: number of examples of the split.
      num_shards: number of files.
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
    """Shape and dtype of a feature as SeqIO stores them: only the first dimension may vary."""
    shape = value.shape.as_list()
    return {"shape": [None, *shape[1:]] if shape else [], "dtype": value.dtype.name}


def _check_same(begun: Mapping[str, Any], path: str, folder: str, split: str) -> None:
    """Raise ConfigError if the folder holds files of this split made from other data or settings."""
    files = [x for x in os.listdir(folder) if x.startswith(f"{split}.tfrecord-")]
    if not files and not os.path.exists(path):
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
    """Cached examples, file by file; empty files are skipped."""
    return TFRecordRecords([path for path in paths if os.path.getsize(path)])


def _stats(task, paths: Sequence[str]) -> dict[str, int]:
    """Number of examples; for each token feature, the total and the maximum without pad and eos."""
    if not any(os.path.getsize(path) for path in paths):
        return {"examples": 0}
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


def _joined_stats(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The `_stats` of several files from those of each."""
    joined: dict[str, int] = {}
    for name, value in (item for part in parts for item in part.items()):
        before = joined.get(name, 0)
        joined[name] = max(before, value) if name.endswith("_max_tokens") else before + value
    return joined


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The SeqIO task or mixture of a name, which any process can make.

    Attributes:
      name, options, decoder_only, length, examples: see `seqio_task`.
      vocabulary: tokenizer file that replaces the task's vocabulary.
      modules: modules to import, which register tasks with SeqIO.
    """

    name: str
    options: Mapping[str, Any] | None = None
    vocabulary: str | None = None
    decoder_only: bool = False
    length: int | None = None
    examples: int | None = None
    modules: tuple[str, ...] = ()

    def task(self) -> Any:
        """Make the task; raises ConfigError if a module, the tokenizer or the task cannot be used."""
        for module in self.modules:
            import_named(module, f"The module {module}")
        options = self.options
        if self.vocabulary:
            options = {**(options or {}), "vocabulary": open_vocabulary(self.vocabulary)}
        return seqio_task(self.name, options, self.decoder_only, self.length, self.examples)


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers of a pipeline of Apache Beam, each of which writes a file at a time.

    Attributes:
      recipe: makes the task on a worker.
      beam_options: flags of Beam, see `famx.data.beam`.
    """

    recipe: Recipe
    beam_options: str

    def write(self, plans: Sequence[_Plan], folder: str) -> dict[str, dict[str, int]]:
        """Write the missing files of all splits in one pipeline; return the `_stats` of each path."""
        files = [(x.task.name, x.split, list(x.paths), k) for x in plans for k in x.missing]
        write = functools.partial(_write_on_worker, pickle.dumps(self.recipe), files)
        stats = map_on_workers(write, len(files), folder, self.beam_options)
        return {paths[k]: made for (_, _, paths, k), made in zip(files, stats)}


_making = threading.Lock()  # SeqIO's registry is not made for several threads


@functools.lru_cache(maxsize=1)
def _members(recipe: bytes) -> dict[str, Any]:
    """The tasks of a pickled `Recipe` by name."""
    import seqio

    return {task.name: task for task in seqio.get_subtasks(pickle.loads(recipe).task())}


def _write_on_worker(
    recipe: bytes, files: Sequence[tuple[str, str, list[str], int]], i: int
) -> dict[str, int]:
    """Write one of the files, each (task, split, files of the split, index); return its `_stats`."""
    member, split, paths, k = files[i]
    with _making:
        task = _members(recipe)[member]
    _write_files(task, split, paths, [k])
    return _stats(task, [paths[k]])


def seqio_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    decoder_only: bool = False,
    length: int | None = None,
    examples: int | None = None,
) -> Any:
    """Return the SeqIO task or mixture of this name; a task of famx is registered with SeqIO first.

    A mixture of famx becomes a SeqIO mixture of all its tasks. A task that generates its examples becomes
    documents of one length, under the name `<name>_<length>`.

    Args:
      name: name known to SeqIO or to `famx.data.tasks.registry`.
      options: options of a task of famx, as in training.
      decoder_only: see `famx.data.seqio.register_text_task`.
      length, examples: tokens per example and number of examples, for a task that generates them.

    Raises:
      ConfigError: the task does not exist, the options do not fit it, its files are missing, or it has
        no splits.
    """
    seqio = optional_package("seqio", "Caches of SeqIO's tasks", "seqio")

    from famx.data.seqio import register_documents, register_text_task

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in known and name not in registry.names():
        if options:
            raise ConfigError(f"'{name}' is a SeqIO task and takes no options, but got {dict(options)}.")
        return seqio.get_mixture_or_task(name)
    try:
        with options_named("--task_options", options or {}):
            task = registry.get(name, **(options or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    kind = Kind.SCORED if isinstance(task, Suite) else kind_of(task)
    if kind is Kind.MADE:
        if not length or not examples:
            raise ConfigError(
                f"'{name}' generates examples of any length and number: add --length and --examples."
            )
        if not has_settings(task, "split"):
            raise ConfigError(
                f"'{name}' cannot be cached: {type(task).__name__} is not a dataclass with a field split."
            )
        made = {
            split: IndexedDocuments(dataclasses.replace(task, split=task_split), length, examples)
            for split, task_split in (("train", "train"), ("validation", "eval"))
        }
        seqio.TaskRegistry.remove(f"{name}_{length}")  # registered with other settings
        return register_documents(f"{name}_{length}", made, task.vocab)
    if kind is Kind.DOCUMENTS:
        try:
            splits = {
                split: registry.get(name, **{**(options or {}), "split": split})
                for split in ("train", "validation")
            }
        except (ValueError, TypeError) as error:
            raise ConfigError(f"'{name}' cannot be cached: {error}") from error
        vocabulary = vocabulary_of(task)
        if vocabulary is None:
            raise ConfigError(f"'{name}' cannot be cached: its documents have no attribute vocab.")
        seqio.TaskRegistry.remove(name)
        return register_documents(name, splits, vocabulary)
    for member in task.tasks:
        seqio.TaskRegistry.remove(member.name)
        register_text_task(member, decoder_only=decoder_only)
    if task.tasks == (task,):
        return seqio.TaskRegistry.get(task.name)
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, [member.name for member in task.tasks], default_rate=1.0)


@checked
def cache_by_name(
    name: str,
    output_dir: Path,
    options: Mapping[str, Any] | None = None,
    vocabulary: Path | None = None,
    splits: Sequence[str] | None = None,
    num_shards: Positive = 16,
    decoder_only: bool = False,
    length: Positive | None = None,
    examples: Positive | None = None,
    modules: Sequence[str] = (),
    beam_options: str | None = None,
) -> dict[str, dict[str, int]]:
    """Cache a task by its name; see `Recipe` and `cache`.

    Args:
      name, options, vocabulary, decoder_only, length, examples, modules: see `Recipe`.
      output_dir, splits, num_shards: see `cache`.
      beam_options: flags of Apache Beam, whose workers then write the files; None: this process writes
        them.

    Returns:
      The number of examples per task and split.

    Raises:
      ConfigError: a module, the tokenizer or the task cannot be used, a file is broken, the disk is full,
        or as `famx.data.beam.map_on_workers`.
    """
    recipe = Recipe(name, options, vocabulary, decoder_only, length, examples, tuple(modules))
    workers = None if beam_options is None else Workers(recipe, beam_options)
    try:
        return cache(recipe.task(), output_dir, splits, num_shards, workers=workers)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
