"""Tasks of famx for t5x: registered with SeqIO, and as the iterator that t5x trains on."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import seqio
from clu.data.dataset_iterator import ArraySpec, DatasetIterator
from t5x import utils

from famx.base.errors import ConfigError
from famx.base.files import as_path, write_text
from famx.base.packages import import_named
from famx.data.seqio import register_named, register_tasks
from famx.data.seqio_cache import check_cached_vocabulary
from famx.data.tasks import Kind, kind_of, registry
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import split_checkpoint
from famx.model_dir.loading import check_model
from famx.models import DecoderModel
from famx.training.feeds import DatasetFeed, Feed, fresh_feed
from famx.training.run import bound_options
from famx.training.source import Source


def import_tasks(module: str | None) -> None:
    """Import the module that registers tasks with SeqIO; None: there is none.

    Raises:
      ConfigError: there is no such module.
    """
    if module is not None:
        import_named(module, f"MIXTURE_OR_TASK_MODULE {module!r}")


def seqio_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    module: str | None = None,
) -> str:
    """Name of a task in SeqIO's registry; a task with options is registered under a name of its own.

    Args:
      name: name of a task or mixture.
      options: options of a task of `famx.data`.
      checkpoint: a `MODEL_DIR` or a checkpoint in it; its vocabulary is the task's if the task can take
        any vocabulary and is given none.
      module: a module to import first, which registers tasks.

    Raises:
      ConfigError: there is no such task or module, or the task does not take these options.
    """
    import_tasks(module)
    register_tasks()
    with _named(name):
        options, as_name = task_options(name, options, checkpoint), name
        if options:
            described = {key: getattr(value, "fingerprint", value) for key, value in options.items()}
            digest = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()
            as_name = f"{name}_{digest[:8]}"
        if as_name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
            register_named(name, as_name, **options)
    return as_name


def task_options(name: str, options: Mapping[str, Any] | None, checkpoint: str | None) -> dict[str, Any]:
    """Options of a task: those bound by gin to its class, `options`, and the checkpoint's vocabulary.

    `options` win over gin; for the vocabulary see `seqio_task`.
    """
    options = {**bound_options(name), **(options or {})}
    if checkpoint is not None and "vocabulary" not in options and registry.takes(name, "vocabulary"):
        vocabulary = check_model(split_checkpoint(checkpoint)[0]).vocabulary
        if vocabulary not in (None, registry.get(name, **options).vocab):
            options["vocabulary"] = vocabulary
    return options


def latest_checkpoint(path: str) -> str:
    """Directory of a checkpoint: `path` itself, or the newest one in it if it is a `MODEL_DIR`.

    Raises:
      ConfigError: there is no checkpoint.
    """
    directory, step = split_checkpoint(path)
    with Checkpointer(directory, read_only=True) as checkpointer:
        return str(directory / f"checkpoint_{checkpointer.find(step)}")


class FeedIterator(DatasetIterator):
    """A feed of famx's training loop, whose position is saved in the format of that loop.

    So `famx.train` and t5x can each resume a run of the other, batch for batch.
    """

    def __init__(self, feed: Feed):
        self._feed, self._step = feed, 0
        self._beginning = _copy(feed.get_state())
        self._states = {0: self._beginning}  # by step: t5x looks one batch ahead before it saves
        batch = self._batch()
        self._spec = {name: ArraySpec(dtype=x.dtype, shape=x.shape) for name, x in batch.items()}
        self.reset()

    def _batch(self):
        batch = self._feed.next(self._step).batch
        return {name: x for name, x in batch.items() if name != "answer"}

    def __next__(self):
        batch = self._batch()
        self._states = {self._step: self._states[self._step]}
        self._step += 1
        self._states[self._step] = _copy(self._feed.get_state())
        return batch

    def _go_to(self, step: int, state: Any) -> None:
        self._feed.set_state(_copy(state))
        self._step, self._states = step, {step: state}

    def reset(self):
        """Returns to the first batch."""
        self._go_to(0, self._beginning)

    @property
    def element_spec(self):
        """Shapes and dtypes of a batch."""
        return self._spec

    def save(self, filename):
        """Writes the position after the step that the checkpoint's directory is named for."""
        path = as_path(filename)
        state = self._states.get(_step_of(path), self._states[self._step])
        text = json.dumps({"feed": state, "pending": []})
        write_text(path, text)
        if jax.process_index() == 0:
            write_text(_engine_file(path), text)

    def restore(self, filename):
        """Continues from the position that `save` wrote for this checkpoint."""
        path = as_path(filename)
        file = path if path.exists() else _engine_file(path)
        self._go_to(_step_of(path), json.loads(file.read_text())["feed"])


def get_dataset(
    cfg: utils.DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Any,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
    model: DecoderModel | None = None,
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
) -> FeedIterator:
    """The batches that t5x trains on: those of famx's training loop, or those of any SeqIO task.

    The arguments up to `continue_from_last_checkpoint` are t5x's. A task of famx is read by famx's feed
    if it is the split "train", shuffled and not cached; everything else is read by t5x's pipeline.

    Args:
      model: the model, for its block size; needed for tasks of `famx.data`.
      options, checkpoint: see `seqio_task`.

    Raises:
      ConfigError: the task, its options and the lengths do not go together.
    """
    del continue_from_last_checkpoint
    import_tasks(cfg.module)
    register_tasks()
    if (name := cfg.mixture_or_task_name) in registry.names():
        with _named(name):
            options = task_options(name, options, checkpoint)
            task = registry.get(name, **options)
        if cfg.split == "train" and cfg.shuffle and not cfg.use_cached:
            return FeedIterator(_feed(cfg, (shard_id, num_shards), task, model))
        if cfg.use_cached and options:
            raise ConfigError(
                f"USE_CACHED_TASKS reads {name!r} as it was cached, whatever {_listed(options)} says:"
                " register the task with these options under a name of its own"
                " (famx.data.seqio.register_named), cache that and train on it."
            )
        cfg = dataclasses.replace(cfg, mixture_or_task_name=seqio_task(name, options))
    if cfg.use_cached:
        check_cached_vocabulary(seqio.get_mixture_or_task(cfg.mixture_or_task_name))
    make = functools.partial(
        utils.get_dataset, cfg, shard_id, num_shards, feature_converter_cls, num_epochs
    )
    return FeedIterator(DatasetFeed(make))


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(sorted(options))


def _feed(cfg: utils.DatasetConfig, shard: tuple[int, int], task: Any, model: DecoderModel) -> Feed:
    lengths = cfg.task_feature_lengths
    length = lengths["targets"] + lengths.get("inputs", 0)
    packed = cfg.pack and kind_of(task) is not Kind.MADE  # t5x packs by default; such rows are whole
    return fresh_feed(Source(
        task, cfg.batch_size, length, model.config.block_size, cfg.seed, shard, packed=packed,
    ))  # fmt: skip


@contextlib.contextmanager
def _named(name: str):
    """Makes a ConfigError of what is wrong with the task of this name."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"MIXTURE_OR_TASK_NAME {name!r}: {error}") from error


def _copy(state: Any) -> Any:
    return json.loads(json.dumps(state))


def _step_of(path: pathlib.Path) -> int:
    """20 for .../checkpoint_20/dataset/train_ds-000-of-001, also under a temporary name."""
    return int(re.findall(r"checkpoint_(\d+)", str(path.parent))[-1])


def _engine_file(path: pathlib.Path) -> pathlib.Path:
    """File of the same checkpoint in which famx's training loop keeps the position."""
    parent = path.parent  # with several processes, each has a folder
    return (parent.parent if parent.name.startswith("process_") else parent) / "metadata"
