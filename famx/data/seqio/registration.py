"""Registration with SeqIO of tasks made by index, text tasks, documents, or all tasks of famx."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from famx.base.errors import ConfigError
from famx.base.features import features_of
from famx.data.catalogue import TASKS
from famx.data.rows import Documents, tokens_and_weights
from famx.data.seqio.sources import DocumentSource, MadeSource
from famx.data.seqio.vocabularies import as_seqio_vocabulary
from famx.data.sequences import SEQUENCES
from famx.data.tasks import Kind, Made, Mixture, Suite, TextTask, kind_of, registry
from famx.data.tasks.examples import TaskDocuments
from famx.data.vocabularies import Vocabulary

TRAIN_EXAMPLES = 2**31 - 1
VALIDATION_EXAMPLES = 256
# The first reads the user's files, although it can be made without options; SeqIO's rows are tokens.
_LEFT_OUT = ("own_text", *SEQUENCES)

_replaceable: set[str] = set()  # names that `register_tasks` registered and no other call since


def register_tasks() -> None:
    """Register the tasks that come with famx with SeqIO, under their names and with default settings.

    Tasks of your own files (`own_text`, `own_records`, `own_chat`) and those that have features in place
    of tokens (`famx.data.sequences`) are left out; suites become mixtures.
    Names that SeqIO already knows are skipped, so it may be called more than once. Files are looked for
    when examples are read, not here.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    mixtures = {}
    for name in TASKS:
        if name in known or name in _LEFT_OUT or registry.needs_options(name):
            continue
        task = registry.get(name)
        if isinstance(task, Suite):
            mixtures[name] = [(member.name, 1.0) for member in task.tasks]
        elif isinstance(task, Mixture):
            rates = task.rates or {}
            by_size = seqio.mixing_rate_num_examples
            mixtures[name] = [(x.name, rates.get(x.name, by_size)) for x in task.tasks]
        else:
            register_named(name)
            _replaceable.add(name)
    for name, rates in mixtures.items():  # after all their tasks
        seqio.MixtureRegistry.add(name, rates)


def register_named(name: str, as_name: str | None = None, **options) -> seqio.Task:
    """Register `famx.data.get(name, **options)` with SeqIO under `as_name`; None: the same name."""
    task, as_name = registry.get(name, **options), as_name or name
    if isinstance(task, TextTask):
        return register_text_task(task, as_name, lazy=True)
    if features_of(task):
        raise ConfigError(f"The task {name} has features besides tokens, which SeqIO's rows do not hold.")
    if kind_of(task) is Kind.MADE:
        return register_made(as_name, task)
    documents = {x: registry.get(name, **{**options, "split": x}) for x in ("train", "validation")}
    return register_documents(as_name, documents, task.vocab)


def register_made(
    name: str, task: Made, validation_examples: int = VALIDATION_EXAMPLES
) -> seqio.Task:
    """Register a task made by index: features `targets` int32 and `loss_weights` float32, both `[L]`.

    L is `sequence_length["targets"]`. The split `train` is endless, `validation` has examples of the
    task's "eval" split. Example `i` is the task's example `i` whatever seed SeqIO is given (the task has
    its own seed), and shard `s` of `n` has the examples `s`, `s + n`, `s + 2 n`, ...

    Args:
      name: name in SeqIO's registry.
      task: a dataclass with the field `split`, which is set here.
      validation_examples: number of examples of the validation split.

    Returns:
      the `seqio.Task`. A task of this name that `register_tasks` registered is replaced.
    """
    train, evaluation = (dataclasses.replace(task, split=split) for split in ("train", "eval"))

    def make_examples(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None):
        if not sequence_length or not sequence_length.get("targets"):
            raise ValueError(
                f"Task '{name}' makes rows of the length asked for; give the length of 'targets'."
            )
        length = sequence_length["targets"]

        def example(index: np.ndarray, is_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            batch = (train if is_train else evaluation).batch([int(index)], length)
            return batch["decoder_target_tokens"][0], batch["decoder_loss_weights"][0]

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return _targets(example, [features["index"], features["is_train"]], length)

        return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    _make_room(name)
    return seqio.TaskRegistry.add(
        name,
        source=MadeSource({"train": TRAIN_EXAMPLES, "validation": validation_examples}),
        preprocessors=[make_examples],
        output_features=_weighted_features(task.vocab),
        shuffle_buffer_size=None,
    )


def register_documents(
    name: str, documents: Mapping[str, Documents], vocabulary: Vocabulary
) -> seqio.Task:
    """Register documents: features `targets` int32 `[n]` and `loss_weights` float32 `[n]`.

    Args:
      name: name in SeqIO's registry.
      documents: the documents of each split, such as `TextFiles` or `IndexedDocuments`.
      vocabulary: the vocabulary of the documents.

    Returns:
      the `seqio.Task`, which can be cached. A task of this name that `register_tasks` registered is
      replaced.
    """

    def document(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tokens_and_weights(documents[_text(split)][int(index)])

    def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return _targets(document, [features["index"], features["split"]])

    _make_room(name)
    return seqio.TaskRegistry.add(
        name,
        source=DocumentSource(tuple(documents), lambda split: len(documents[split])),
        preprocessors=[
            lambda dataset: dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE),
            seqio.CacheDatasetPlaceholder(),
        ],
        output_features=_weighted_features(vocabulary),
        shuffle_buffer_size=None,
    )


def register_text_task(
    task: TextTask, name: str | None = None, decoder_only: bool = False, lazy: bool = False
) -> seqio.Task:
    """Register a text task in its vocabulary; an example is read at access.

    Features are `inputs` and `targets`, int32 tokens of the two texts, with eos after the targets; for
    tasks of kind "documents", `targets` alone. `references`, the accepted answers, go to the
    metrics, which are the task's. With `decoder_only`, and for kind "chat", features are those of
    `TextTask.documents`: `targets` int32 and `loss_weights` float32.

    Args:
      task: the task, with `data_dir`, `vocabulary`, `max_tokens` and `cut` as wanted. `max_tokens`
        matters with `decoder_only`, and for "documents" and "chat".
      name: name in SeqIO's registry; None: the task's name.
      decoder_only: join inputs and targets into one sequence with loss weights.
      lazy: register every split that the task may have without looking at the files; missing files
        raise an error when examples are read.

    Returns:
      the `seqio.Task`, with the splits whose files exist. A task of this name that `register_tasks`
      registered is replaced.

    Raises:
      ConfigError: no split exists; the sentence says what is needed.
    """
    name = name or task.name
    examples = functools.cache(task.examples)
    splits = task.splits if lazy else _existing_splits(task, examples)
    decoder_only = decoder_only or task.kind == "chat"
    one_sequence = decoder_only or task.is_read

    @functools.cache
    def documents(split):
        return TaskDocuments(examples(split), task.kind, task.vocab, task.max_tokens, task.cut)

    def document(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return documents(_text(split))[int(index)]

    def texts(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        example = examples(_text(split))[int(index)]
        return tuple(_bytes(example[part]) for part in ("inputs", "targets", "references"))

    def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        numbers = [features["index"], features["split"]]
        inputs, targets, references = tf.numpy_function(texts, numbers, [tf.string] * 3, stateful=False)
        for part, shape in ((inputs, []), (targets, []), (references, [None])):
            part.set_shape(shape)
        converted = {"references": references}
        if not one_sequence:
            return {**converted, "inputs": inputs, "targets": targets}
        row = _targets(document, numbers)
        return {**converted, **(row if decoder_only else {"targets": row["targets"]})}

    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    _make_room(name)
    return seqio.TaskRegistry.add(
        name,
        source=DocumentSource(splits, lambda split: len(examples(split))),
        preprocessors=[
            lambda dataset: dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE),
            seqio.CacheDatasetPlaceholder(),
            *(() if one_sequence else steps),
        ],
        output_features=_text_features(task, decoder_only),
        postprocess_fn=_references_or_output,
        metric_fns=list(task.metrics),
        shuffle_buffer_size=None,
    )


def _existing_splits(task: TextTask, examples) -> list[str]:
    """The splits whose files exist; raises the ConfigError of the first one if there are none."""
    splits, first_error = [], None
    for split in task.splits:
        try:
            examples(split)
            splits.append(split)
        except ConfigError as error:
            first_error = first_error or error
    if not splits:
        raise first_error
    return splits


def _text_features(task: TextTask, decoder_only: bool) -> dict[str, seqio.Feature]:
    if decoder_only:
        return _weighted_features(task.vocab)
    vocabulary = as_seqio_vocabulary(task.vocab)
    if task.is_read:  # `TaskDocuments` has appended eos
        return {"targets": seqio.Feature(vocabulary, add_eos=False)}
    return {
        "targets": seqio.Feature(vocabulary, add_eos=task.vocab.eos_id is not None),
        "inputs": seqio.Feature(vocabulary, add_eos=False),
    }


def _weighted_features(vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    weights = seqio.PassThroughVocabulary(size=0)
    return {
        "targets": seqio.Feature(as_seqio_vocabulary(vocabulary), add_eos=False),
        "loss_weights": seqio.Feature(weights, add_eos=False, dtype=tf.float32),
    }


def _references_or_output(output, example, is_target=False):
    """SeqIO's postprocessing: references as strings in place of the targets, outputs unchanged."""
    return [x.decode() for x in example["references"]] if is_target else output


def _targets(function, arguments, length: int | None = None) -> dict[str, tf.Tensor]:
    """Targets and weights, both `[length]`, that a numpy function makes of the arguments."""
    tokens, weights = tf.numpy_function(function, arguments, (tf.int32, tf.float32), stateful=False)
    tokens.set_shape([length])
    weights.set_shape([length])
    return {"targets": tokens, "loss_weights": weights}


def _make_room(name: str) -> None:
    """Remove the task of this name if `register_tasks` registered it; SeqIO refuses any other."""
    if name in _replaceable:
        _replaceable.remove(name)
        seqio.TaskRegistry.remove(name)


def _text(value: bytes | np.ndarray) -> str:
    return (value.item() if isinstance(value, np.ndarray) else value).decode()


def _bytes(value: str | list[str]) -> np.ndarray:
    if isinstance(value, str):
        return np.array(value.encode(), object)
    return np.array([x.encode() for x in value], object)
