"""Evaluation on text tasks: generated answers, ranked choices and likelihood of whole documents."""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from famx.base.errors import BadRecord, ConfigError
from famx.base.ranges import Name, Object, OneOf, Positive, Seed
from famx.base.values import checked, options_named
from famx.data.metrics import bits_per_byte
from famx.data.tasks import Kind, Scored, Suite, TextTask, kind_of, registry
from famx.data.tasks.examples import Example, Examples, TaskDocuments
from famx.data.tasks.ranking import SCORINGS
from famx.data.vocabularies import ByteVocabulary, Vocabulary
from famx.evaluation.common import HEALTH_TOKENS, check_vocabulary, is_of_memory
from famx.evaluation.text import TextEvaluation
from famx.evaluation.text_answers import TextAnswers, Write, predictions_file
from famx.models import DecoderModel
from famx.training.feeds import check_bos

# Examples are grouped by length within this many batches: a larger window wastes less padding and keeps
# more examples in memory.
_WINDOW = 4
_LOOKED_AT = 100  # examples among which `check` looks for an answer


class _Part(NamedTuple):
    """One task, the split it is scored on, its examples, and the indices of those that are scored."""

    task: TextTask
    split: str
    examples: Examples
    numbers: Sequence[int]


@checked
@dataclasses.dataclass
class TextTaskEvaluation:
    """Metrics of a text task, of a mixture of them, or of a suite, on a scale of 0 to 100.

    What is measured depends on the task's kind (`famx.data.tasks.text_task`):

    * "generation": text is generated greedily after the inputs until end of text, and scored by the
      task's metrics.
    * "rank": `accuracy` of taking the choice with the highest likelihood after the inputs.
    * "documents": `next_token_accuracy`, `bits_per_token` and `bits_per_byte` of the text.
    * "chat": the same of the tokens that the assistant writes.

    Each task of a mixture or suite is scored separately, as `<task>/<metric>`, with every example
    counted once whatever the task's mixing rate. A mixture also has the unweighted mean over its tasks
    as `<metric>`; the GPT-3 suites have their `average`.

    Memory use does not grow with the inputs: only the examples of a few batches are held at a time,
    and the predictions of a whole split.

    Attributes:
      task: a text task or mixture, or its registered name (`famx.data.tasks.registry`); None: the task
        that the run trains on.
      task_options: task options, as in training, which override those of the run. The vocabulary is the
        model's unless given here.
      split: split to score; its answers must be published. None means the split that GPT-3 was scored
        on for the GPT-3 suites, and "validation" for all other tasks.
      examples: maximum number of examples per task, drawn at random with `seed`; None scores all.
      max_new_tokens: maximum length of a generated answer.
      batch_size: number of examples per batch; it does not change scores beyond rounding.
      length_normalize: how choices are compared: by log-likelihood ("sum"), by log-likelihood per
        token ("mean"), or by log-likelihood minus that of the choice without the
        question ("unconditional"). None takes the setting of the GPT-3 suites, and "sum" for all
        other tasks.
      score_end: whether the likelihood of a choice includes that of end of text after it. Without it
        only the completion counts, as in GPT-3's and lm-evaluation-harness' scores.
      max_prompt_tokens: maximum length of inputs, and of documents of kind "documents", truncated the
        way the task truncates them. None uses the task's `max_tokens`.
      seed: seed with which `examples` are drawn.
      health: whether to report memory scalars, see `famx.evaluation`. They are measured on the first
        examples, about `health_tokens` tokens, each read with its answer; the scores are bits per
        token and accuracy of the answer tokens.
      health_tokens: maximum number of tokens read for the memory scalars; a single longer answer is
        still read completely.
    """

    task: Name | Object | None = None
    task_options: Mapping[Name, Any] | None = None
    split: Name | None = None
    examples: Positive | None = None
    max_new_tokens: Positive = 256
    batch_size: Positive = 8
    length_normalize: Annotated[str, OneOf(SCORINGS)] | None = None
    score_end: bool = False
    max_prompt_tokens: Positive | None = None
    seed: Seed = 0
    health: bool = True
    health_tokens: Positive = HEALTH_TOKENS

    writes_predictions: ClassVar[bool] = True  # see `__call__`

    def with_task(self, make_task: Callable[..., Any]) -> "TextTaskEvaluation":
        """A copy that evaluates a run's task, or itself if its task is set; see `famx.evaluation`."""
        if self.task is not None:
            return self
        return dataclasses.replace(self, task=make_task(**(self.task_options or {})))

    def __call__(
        self, model: DecoderModel, params, step: int, folder: str | os.PathLike | None = None
    ) -> dict[str, float]:
        """Scores all tasks.

        Args:
          model: the model.
          params: its parameters.
          step: training step of the parameters, for the file name.
          folder: directory of `<step>.predictions.jsonl`, one line per answered example; None writes
            no file.

        Returns:
          The metrics and, with `health`, the memory scalars. If examples without an answer, or with a
          malformed record, were left out: their number as `left_out`.

        Raises:
          ConfigError: no example of a task has an answer.
        """
        vocabulary = self._vocabulary(model)
        if all(part.task.is_read for part in self._parts):
            folder = None
        scores, left_out = {}, 0
        with predictions_file(folder, step) as write:
            for part in self._parts:
                score = self._score_documents if part.task.is_read else self._score_answers
                bad: dict[int, str] = {}
                scores[part.task.name] = score(part, model, params, vocabulary, write, bad)
                _say_left_out(part, bad)
                left_out += len(bad)
        scores = self._made.summary(scores)
        if left_out:
            scores["left_out"] = float(left_out)
        if self.health and model.config.memory.exists:
            scores |= self._health(model, params, vocabulary)
        return scores

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if the task, its data or its answers are missing, or the vocabulary differs.

        An answer is looked for among the first examples of each task.
        """
        self._vocabulary(model)
        for part in self._parts:
            with self._config_errors():
                _check_some_answer(part)

    # ------ What is evaluated

    @property
    def _name(self) -> str:
        is_name = self.task is None or isinstance(self.task, str)
        shown = self.task if is_name else getattr(self.task, "name", type(self.task).__name__)
        return f"TextTaskEvaluation.task {shown!r}"

    @contextlib.contextmanager
    def _config_errors(self) -> Iterator[None]:
        """Turns errors of the task and its files, which the user can fix, into ConfigError."""
        try:
            yield
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._name}: {error}") from error

    @functools.cached_property
    def _made(self) -> Scored | Suite:
        made = self.task
        if made is None:
            raise ConfigError("TextTaskEvaluation.task is not set: name the task to evaluate.")
        if isinstance(made, str):
            options = self.task_options or {}
            with self._config_errors(), options_named("TextTaskEvaluation.task_options", options):
                made = registry.get(made, **options)
        with self._config_errors():
            scored = isinstance(made, Suite) or kind_of(made) is Kind.SCORED
        if not scored:
            raise ConfigError(
                f"{self._name} is not a text task: use TaskEvaluation or TextEvaluation, or choose"
                " another task."
            )
        return made

    @functools.cached_property
    def _parts(self) -> list[_Part]:
        parts = []
        for task in self._made.tasks:
            split = self.split or task.scored_split
            if self.length_normalize is not None:
                task = dataclasses.replace(task, scoring=self.length_normalize)
            with self._config_errors():
                examples = task.examples(split)
            numbers = range(len(examples))
            if self.examples is not None and self.examples < len(examples):
                rng = np.random.default_rng(self.seed)
                numbers = sorted(rng.choice(len(examples), self.examples, replace=False).tolist())
            parts.append(_Part(task, split, examples, numbers))
        return parts

    def _vocabulary(self, model: DecoderModel) -> Vocabulary:
        vocabulary = model.vocabulary
        if (self.task_options or {}).get("vocabulary") is not None:
            vocabulary = self._parts[0].task.vocab
        if vocabulary is None:
            raise ConfigError(
                f"{self._name} needs a vocabulary, and the model has none: name one in task_options, or"
                " copy the vocabulary.json of the training run next to model.json."
            )
        check_vocabulary(vocabulary, model, self._name)
        check_bos(vocabulary.bos_id, self._name)
        return vocabulary

    def _documents(self, part: _Part, vocabulary: Vocabulary, limit: int | None = None) -> TaskDocuments:
        sizes = [size for size in (self.max_prompt_tokens or part.task.max_tokens, limit) if size]
        longest = min(sizes, default=None)
        return TaskDocuments(part.examples, part.task.kind, vocabulary, longest, part.task.cut)

    # ------ Scores

    def _score_answers(
        self,
        part: _Part,
        model: DecoderModel,
        params,
        vocabulary: Vocabulary,
        write: Write,
        bad: dict[int, str],
    ) -> dict[str, float]:
        """Scores of the answers; fills `bad` with what is left out: the reason by example."""
        longest = self.max_prompt_tokens or part.task.max_tokens
        answers = TextAnswers(
            part.task, model, vocabulary, self.batch_size, self.max_new_tokens, longest, self.score_end
        )
        predictions, answered = [], []
        for start in range(0, len(part.numbers), _WINDOW * self.batch_size):
            examples = {}
            for number in part.numbers[start : start + _WINDOW * self.batch_size]:
                example = _example(part, number, bad)
                if example is not None:
                    examples[number] = example
            rows = answers(params, list(examples.values())) if examples else []
            for (number, example), row in zip(examples.items(), rows, strict=True):
                write({"task": part.task.name, "index": number, "id": example.get("id", ""), **row})
                predictions.append(row["prediction"])
                answered.append(number)
        if not answered:
            raise _no_answer(part)
        return part.task.evaluate(part.split, predictions, answered)

    def _score_documents(
        self,
        part: _Part,
        model: DecoderModel,
        params,
        vocabulary: Vocabulary,
        write: Write,
        bad: dict[int, str],
    ) -> dict[str, float]:
        """Scores of whole documents; fills `bad` as `_score_answers` does."""
        del write
        numbers = [n for n in part.numbers if _example(part, n, bad) is not None]
        if not numbers:
            raise _no_answer(part)
        documents = _Counted(self._documents(part, vocabulary), numbers)
        evaluation = TextEvaluation(documents, self.batch_size, max_tokens=None, health=False)
        scores = evaluation(model, params, 0)
        num_tokens, num_bytes = np.sum(list(documents.sizes.values()), axis=0)
        nats = scores["bits_per_token"] * num_tokens * np.log(2)
        return {
            "next_token_accuracy": 100 * scores["accuracy"],
            "bits_per_token": scores["bits_per_token"],
            "bits_per_byte": bits_per_byte(nats, num_bytes),
        }

    def _health(self, model: DecoderModel, params, vocabulary: Vocabulary) -> dict[str, float]:
        """Memory scalars over the first examples of all tasks, taken in turn, each with its answer."""
        parts = [(self._documents(p, vocabulary, self.health_tokens), p.numbers) for p in self._parts]
        turns = itertools.zip_longest(*(((texts, i) for i in numbers) for texts, numbers in parts))
        documents, size = _Documents(), 0
        documents.vocab = vocabulary
        for texts, number in filter(None, itertools.chain.from_iterable(turns)):
            with contextlib.suppress(BadRecord):
                documents.append(texts[number])
                size += len(documents[-1][0])
            if size >= self.health_tokens:
                break
        evaluation = TextEvaluation(documents, self.batch_size, max_tokens=None, health_tokens=size)
        return {k: v for k, v in evaluation(model, params, 0).items() if is_of_memory(k)}


class _Documents(list):
    """List of documents with the `vocab` attribute that `TextEvaluation` looks for."""

    vocab: Vocabulary


class _Counted:
    """Selected documents that record what is scored: `sizes` is `{index: (tokens, bytes)}`."""

    def __init__(self, documents: TaskDocuments, numbers: Sequence[int]):
        self.documents, self.numbers, self.vocab = documents, numbers, documents.vocab
        self.sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, weights = self.documents[self.numbers[i]]
        scored = tokens[weights > 0]
        if isinstance(self.vocab, ByteVocabulary):  # truncation may split a character
            num_bytes = int(np.sum(scored >= self.vocab.num_special_ids))
        else:
            num_bytes = len(self.vocab.decode(scored.tolist()).encode())
        self.sizes[i] = len(scored), num_bytes
        return tokens, weights


def _example(part: _Part, number: int, bad: dict[int, str]) -> Example | None:
    """An example to score; None, with the reason in `bad`, for one that cannot be scored."""
    try:
        example = part.examples[number]
    except BadRecord as error:
        bad[number] = str(error)
        return None
    if _has_answer(part, example):
        return example
    bad[number] = f"{part.examples.where(number)} has no answer."
    return None


def _has_answer(part: _Part, example: Example) -> bool:
    """Whether an example can be scored: it has a right choice, or a reference that is not blank."""
    if part.task.is_read:
        return True
    if part.task.kind == "rank":
        return bool(example["answer"])
    return any(text.strip() for text in example["references"])


def _check_some_answer(part: _Part) -> None:
    """Raises ConfigError if none of the first examples can be scored, or none can be read."""
    bad: dict[int, str] = {}
    numbers = part.numbers[:_LOOKED_AT]
    if any(_example(part, number, bad) is not None for number in numbers):
        return
    reason = bad[numbers[0]]
    raise _no_answer(part) if reason.endswith("has no answer.") else BadRecord(reason)


def _no_answer(part: _Part) -> ConfigError:
    return ConfigError(
        f"Example {part.numbers[0]} of the {part.split} split of '{part.task.name}' has no answer to"
        " score against, nor has any other one: choose a split that is published with answers."
    )


def _say_left_out(part: _Part, bad: Mapping[int, str]) -> None:
    if bad:
        number, reason = next(iter(bad.items()))
        print(
            f"{part.task.name}, {part.split}: {len(bad)} of {len(part.numbers)} examples left out; the"
            f" first is example {number}: {reason}",
            file=sys.stderr,
            flush=True,
        )
