"""Text tasks: a data set as examples, as documents to train on, and as scores of answers.

A `TextTask` knows where its records are published and how a record becomes an example. An example is a
dict:

  inputs str: the whole prompt, which the answer follows; empty if whole texts are learnt
  targets str: the answer to learn, the first of the references; empty if none is published
  references list[str]: the answers that are accepted, possibly none
  choices list[str], answer list[int]: for kind "rank", the candidates and the indices of the right ones
  contexts list[str]: for kind "rank", if the candidates differ in the prompt: a prompt for each, which
    `targets` follows; `inputs` is not used then
  messages list of dicts, tools list: for kind "chat", what the chat template spells, in place of texts
  id str: the identifier in the data set, if there is one

Kinds: "generation" (the model writes the answer), "rank" (the candidate with the highest score is the
answer, see `famx.data.tasks.ranking`), "documents" (the whole text is the target: language modelling) and
"chat" (conversations, of which the assistant's turns are the target).

The records of a task are looked for in this order:

1. `DATA_DIR/NAME/SPLIT.tfrecord-*`, which `famx prepare` writes, or Parquet or Arrow files in
   DATA_DIR/NAME (see `famx.data.storage.opening`) with the columns `inputs`, `targets` and `references`,
   and, for kind "rank", `choices` and `answer`,
2. the official files, in one of the task's folders of DATA_DIR,
3. the folder of TensorFlow Datasets, if it has prepared the task.

DATA_DIR is the task's `data_dir`, else the environment variable FAMX_DATA_DIR. Nothing is downloaded.

    task = famx.data.get("scrolls_qasper", data_dir="/data", vocabulary="bytes")
    task.examples("validation")[0]["inputs"]
    lanes = ContinuousLanes(task.documents("train", max_tokens=8192), batch_size=8, length=1024)
    task.evaluate("validation", predictions)
"""

import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen

from famx.base.errors import ConfigError
from famx.base.ranges import Name, NonNegative, OneOf, Path, Positive
from famx.base.values import checked
from famx.data.metrics import next_token_accuracy, rank_accuracy
from famx.data.storage import (
    TableRecords,
    TFRecordRecords,
    complete_shards,
    dataset_splits,
    tfds_shards,
)
from famx.data.storage.tables import ARROW, PARQUET
from famx.data.tasks import ranking, registry
from famx.data.tasks.examples import (
    CUTS,
    RANK_COLUMNS,
    Example,
    Examples,
    Records,
    TaskDocuments,
    example_of_record,
    example_of_row,
)
from famx.data.vocabularies import AnyVocabulary, Vocabulary, as_vocabulary

KINDS = ("generation", "rank", "documents", "chat")

Metric = Callable[[Sequence[list[str]], Sequence[str]], dict[str, float]]


@checked
@dataclasses.dataclass(frozen=True)
class TextTask:
    """A data set with its format, its metrics and the location of its files.

    The task is also the documents of its `split`: lanes, packed rows and the training engine take it as
    it is. `dataclasses.replace(task, ...)` changes settings, as `famx.data.get` does.

    Args:
      name: name in the registry, and of the folder of prepared records.
      kind: "generation", "rank", "documents" or "chat".
      open_split: `open_split(folder, split)` opens the official records, by number and without loading
        them all; it raises FileNotFoundError with the name of the first missing file. Records may have
        the attributes `num_rows`, their number of rows in the official files, and `missing`, the names
        of missing files because of which records were skipped.
      preprocess: makes an example of a record; called for one record at a time.
      metrics: functions `(references, predictions) -> {name: 0..100}`, the paper's first.
      splits: names of the splits.
      folders: where the official files may be: relative to the data directory, absolute, or a function
        that returns a path or None.
      published: where the data set is published, for error sentences.
      package: the package that installs the files, if they are not downloaded.
      tfds: name in TensorFlow Datasets, such as "scrolls/qasper", or None.
      open_tfds: `open_tfds(records, split)` turns TensorFlow Datasets' records into official ones.
      counts: number of rows of the official files per split, if known.
      data_dir: the data directory; None: FAMX_DATA_DIR.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`.
      split: the split to read when the task is used as documents.
      max_tokens, cut: settings of `documents`.
      allow_partial: skip records whose files are missing, in place of an error.
      evaluation_split: the split that evaluation scores by default; None: `split`.
      scoring: for "rank", how choices are compared, one of `famx.data.tasks.ranking.SCORINGS`.
      answer_context: for the scoring "unconditional", the prompt without its question.

    Raises:
      ConfigError: on construction, a setting is unknown or out of range.
    """

    name: Name
    kind: Annotated[str, OneOf(KINDS)]
    open_split: Callable[[str, str], Records]
    preprocess: Callable[[Mapping[str, Any]], Example]
    metrics: tuple[Metric, ...] = ()
    splits: Annotated[tuple[Name, ...], MinLen(1)] = ("train", "validation", "test")
    folders: tuple[str | Callable[[], str | None], ...] = ("",)
    published: str = ""
    package: str = ""
    tfds: str | None = None
    open_tfds: Callable[[Records, str], Records] | None = None
    counts: Mapping[Name, NonNegative] = dataclasses.field(default_factory=dict)
    data_dir: Path | None = None
    vocabulary: AnyVocabulary = "bytes"
    split: Name = "train"
    max_tokens: Positive | None = None
    cut: Annotated[str, OneOf(CUTS)] = "middle"
    allow_partial: bool = False
    evaluation_split: Name | None = "validation"
    scoring: Annotated[str, OneOf(ranking.SCORINGS)] = "sum"
    answer_context: str = ""

    def __post_init__(self):
        self.check_split(self.split)
        as_vocabulary(self.vocabulary)

    def check_split(self, split: str) -> None:
        """Raise ConfigError, with the nearest name, unless the task has this split."""
        if split not in self.splits:
            near = difflib.get_close_matches(str(split), self.splits, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"Task '{self.name}' has no split '{split}'; the nearest name is '{near}', all are "
                f"{', '.join(self.splits)}."
            )

    @property
    def is_read(self) -> bool:
        """True if examples are texts to read, not prompts to answer."""
        return self.kind in ("documents", "chat")

    # ------ Location of the records

    @property
    def root(self) -> str | None:
        """The data directory; None if none is set."""
        root = self.data_dir or os.environ.get("FAMX_DATA_DIR")
        return os.path.expanduser(root) if root else None

    def prepared_name(self, split: str, data_dir: str | None = None) -> str:
        """Path of the prepared records of a split, without the numbers of their shards."""
        return os.path.join(data_dir or self.root or "", self.name, f"{split}.tfrecord")

    def examples(self, split: str) -> Examples:
        """Open the examples of a split: `len(examples)`, and `examples[i]` makes one.

        Raises:
          ConfigError: there is no such split, or its files are missing; the sentence names the file,
            where it is published and how to prepare it.
          ValueError: a file is broken or empty, here or when an example is made.
        """
        self.check_split(split)
        prepared = complete_shards(self.prepared_name(split)) if self.root else []
        if prepared:
            return Examples(TFRecordRecords(prepared), example_of_record)
        rows = self._prepared_rows(split)
        if rows is not None:
            return Examples(rows, example_of_row)
        records = self.open_official(split)
        missing = getattr(records, "missing", ())
        if missing and not self.allow_partial:
            raise ConfigError(
                f"The {split} split of '{self.name}' lacks {len(missing)} of its files, the first is "
                f"{missing[0]}; add them, or set allow_partial to skip their records. "
                f"Published: {self.published}."
            )
        return Examples(records, self.preprocess)

    def _prepared_rows(self, split: str) -> Records | None:
        """Parquet or Arrow files whose rows are examples; None if there are none."""
        files = dataset_splits(os.path.join(self.root, self.name)).get(split, []) if self.root else []
        if not files or not files[0].endswith(PARQUET + ARROW):
            return None
        needed = {"inputs", "targets", "references", *(RANK_COLUMNS if self.kind == "rank" else ())}
        rows = TableRecords(files)
        return rows if needed <= set(rows.columns) else None

    def open_official(self, split: str) -> Records:
        """Open the official records of a split, from the task's folders or TensorFlow Datasets'.

        Raises:
          ConfigError, ValueError: as `examples`.
        """
        missing = []
        for folder in self._official_folders():
            try:
                return self.open_split(folder, split)
            except FileNotFoundError as error:
                missing.append(error.filename or folder)
        if self.tfds:
            shards = tfds_shards(self.tfds, split)
            if shards:
                records = TFRecordRecords(shards)
                return self.open_tfds(records, split) if self.open_tfds else records
        if self.package:
            file = f" needs {missing[-1]}, which" if missing else ""
            raise ConfigError(
                f"The {split} split of task '{self.name}'{file} is not there; install {self.package}."
            )
        if missing:
            needed = f"needs {missing[0]}, which is not there"
        else:
            needed = "needs a data directory, and none is set: set data_dir or FAMX_DATA_DIR"
        tfds = f", or prepare it with `tfds build {self.tfds}`" if self.tfds else ""
        raise ConfigError(
            f"The {split} split of task '{self.name}' {needed}. Published: {self.published}. "
            f"Then run `famx prepare --task {self.name} --source DOWNLOAD --data_dir "
            f"{self.root or 'DATA_DIR'}`{tfds}."
        )

    def _official_folders(self) -> list[str]:
        folders = [folder() if callable(folder) else folder for folder in self.folders]
        return [
            os.path.join(self.root or "", folder)
            for folder in folders
            if folder is not None and (self.root or os.path.isabs(folder))
        ]

    # ------ Documents for training

    def documents(
        self,
        split: str,
        vocabulary: str | Vocabulary | None = None,
        max_tokens: int | None = None,
        cut: str | None = None,
    ) -> TaskDocuments:
        """The examples of a split as documents: (tokens int32 `[n]`, loss weights float32 `[n]`).

        A document is the inputs (weight 0), the targets (weight 1) and eos (weight 1), if the
        vocabulary has one. For kind "chat", it is what the vocabulary's chat template writes, without a
        bos at its start, since rows begin with bos; `ChatTemplate.conversation` gives the weights.
        Arguments that are None default to the task's settings.

        Args:
          split: name of the split.
          vocabulary: see `famx.data.vocabularies.as_vocabulary`.
          max_tokens: longest document. Inputs are cut and targets never, so a document whose targets
            alone are longer stays longer. For kind "documents" and "chat", the end is cut off.
          cut: which part of the inputs is removed: "left", or "middle", which keeps their end and a
            question at their beginning.

        Raises:
          ConfigError, ValueError: as `examples`, or an argument is out of range.
        """
        vocabulary = as_vocabulary(self.vocabulary if vocabulary is None else vocabulary)
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        cut = self.cut if cut is None else cut
        return TaskDocuments(self.examples(split), self.kind, vocabulary, max_tokens, cut)

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary object."""
        return as_vocabulary(self.vocabulary)

    @functools.cached_property
    def _training_documents(self) -> TaskDocuments:
        return self.documents(self.split)

    def __len__(self) -> int:
        return len(self._training_documents)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._training_documents[i]

    def check(self, i: int) -> None:
        """Raises BadRecord if document `i` of the split cannot be used; makes no tokens."""
        self._training_documents.check(i)

    def where(self, i: int) -> str:
        """The place of document `i` of the split for a message."""
        return self._training_documents.where(i)

    # ------ Scores

    @property
    def tasks(self) -> tuple["TextTask"]:
        """The task itself; mixtures and suites have several."""
        return (self,)

    @property
    def scored_split(self) -> str:
        """The split that is scored by default."""
        return self.evaluation_split or self.split

    def evaluate(
        self,
        split: str,
        predictions: Sequence[Any],
        indices: Sequence[int] | None = None,
        lengths: Sequence[Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """Score predictions; returns 0..100 under the names of the task's metrics.

        Args:
          split: name of the split.
          predictions: one per example. For kind "generation", strings. For "rank", the scores of the
            choices, measured by accuracy; or strings, scored by the metrics. For "documents" and "chat",
            pairs (number of tokens predicted right, number of tokens), scored by next-token accuracy.
          indices: indices of the predicted examples; None: all, in order.
          lengths: for "rank", lengths by which the scores of the choices are divided.

        Raises:
          ConfigError: there is no such split, or its answers are not published.
          ValueError: the predictions are not of the right number or type.
        """
        examples = self.examples(split)
        indices = range(len(examples)) if indices is None else indices
        if len(predictions) != len(indices):
            raise ValueError(
                f"{len(predictions)} predictions were given for {len(indices)} examples of the "
                f"{split} split of '{self.name}'; give one per example."
            )
        if not len(predictions):
            raise ValueError(f"No predictions of '{self.name}' were given; give at least one.")
        if self.is_read:
            correct, count = np.asarray(predictions, np.float64).sum(axis=0)
            return {"next_token_accuracy": next_token_accuracy(correct, count)}
        by_rank = self.kind == "rank" and not isinstance(predictions[0], str)
        answers = [examples[int(i)]["answer" if by_rank else "references"] for i in indices]
        if not all(answers):
            raise ConfigError(
                f"The {split} split of '{self.name}' is published without answers; score the "
                f"validation split, or hand in the predictions where it is published: {self.published}."
            )
        if by_rank:
            return rank_accuracy(predictions, answers, lengths)
        scores: dict[str, float] = {}
        for metric in self.metrics:
            scores |= metric(answers, predictions)
        return scores

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The scores of this task, from the scores by name of the task."""
        return dict(scores[self.name])

    def requests(self, example: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Pairs (inputs, targets) whose log-likelihoods `choice_scores` needs, in its order."""
        return ranking.requests(example, self.scoring, self.answer_context)

    def choice_scores(
        self, example: Mapping[str, Any], scored: Sequence[tuple[float, int]]
    ) -> list[float]:
        """A score for each choice; the highest is the model's answer.

        Args:
          example: the example.
          scored: (log-likelihood, number of tokens) of each of its `requests`.

        Raises:
          ValueError: the number of scores is not the number of requests.
        """
        count = len(self.requests(example))
        if len(scored) != count:
            raise ValueError(
                f"An example of '{self.name}' has {count} requests, but {len(scored)} scores were given."
            )
        return ranking.choice_scores(example, scored, self.scoring)


class TaskFactory:
    """A factory for the registry: called with settings, it returns the task with these settings."""

    def __init__(self, task: TextTask):
        self._task = task

    def __call__(self, **settings: Any) -> TextTask:
        return dataclasses.replace(self._task, **settings)

    @property
    def __signature__(self) -> inspect.Signature:  # lists the settings, which `registry.takes` looks up
        keyword = inspect.Parameter.KEYWORD_ONLY
        make = lambda name, annotation: inspect.Parameter(
            name, keyword, default=getattr(self._task, name), annotation=annotation
        )
        fields = dataclasses.fields(self._task)
        return inspect.Signature([make(field.name, field.type) for field in fields])


def task_factories(tasks: Iterable[TextTask]) -> dict[str, TaskFactory]:
    """The factories of several tasks, by name, for `registry.register_all`."""
    return {task.name: TaskFactory(task) for task in tasks}


def register_task(task: TextTask) -> TextTask:
    """Register a task: `famx.data.get(task.name, data_dir=..., ...)` returns it with these settings."""
    registry.register(task.name, TaskFactory(task))
    return task
