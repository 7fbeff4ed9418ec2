"""Text tasks: answers that the model writes, choices that it ranks, whole texts that it reads."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from famx.base.errors import ConfigError
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

_WINDOW = 4  # batches among which examples of similar length are put together


class _Part(NamedTuple):
    """A task, the split it is scored on, and the numbers of those examples that count, in order."""

    task: TextTask
    split: str
    examples: Examples
    numbers: Sequence[int]


@dataclasses.dataclass
class TextTaskEvaluation:
    """The scores of a text task, a mixture or a suite, 0..100, under the names of the task's metrics.

    "generation": the likeliest tokens are written after the inputs until end of text, and scored by
    the task's metrics. "rank": `accuracy` of the choice, with end of text, that is the likeliest
    after the inputs. "documents": `next_token_accuracy`, and `bits_per_token` and `bits_per_byte` of
    the text. The kinds are those of `famx.data.tasks.text_task`.

    Of several tasks each is scored by itself, every example once whatever its rate, as
    `<task>/<metric>`. A mixture has the mean over its tasks as `<metric>`, each counting the same, and
    the suites of GPT-3 have their `average`.

    Of examples, texts and documents only those of a few batches lie in memory, of a whole split the
    predictions alone.

    Attributes:
      task: a text task or a mixture of them, or its name, see `famx.data.tasks.registry`; None: the task
        that the run trains on.
      task_options: settings of a named task. The vocabulary is the model's, unless it is named here.
      split: the split, whose answers must be known; None: the one on which GPT-3 was scored, for its
        suites, and "validation" for all other tasks.
      examples: how many of each task at most, drawn with `seed`; None: all.
      max_new_tokens: of a written answer.
      batch_size: examples at once; it changes no score beyond rounding.
      length_normalize: how choices are compared: by log-likelihood ("sum"), divided by the number of
        tokens, end of text included ("mean"), or less that of the choice without the question
        ("unconditional"); None: as GPT-3's suites say, and "sum" for all other tasks.
      max_prompt_tokens: longest inputs, and longest document of "documents"; they are cut as the task
        cuts them. None: the task's `max_tokens`.
      seed: see `examples`.
      health: whether the memory is looked at, see `famx.evaluation`. Its scores are the bits per token
        and the share of right tokens of the answers, each read after its inputs; they and the
        memory's figures are of the first examples, of about `health_tokens` tokens.
      health_tokens: how much is read at most for the memory, unless an answer alone is longer.
    """

    task: Any = None
    task_options: Mapping[str, Any] | None = None
    split: str | None = None
    examples: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 8
    length_normalize: str | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0
    health: bool = True
    health_tokens: int = HEALTH_TOKENS

    writes_predictions: ClassVar[bool] = True  # see `__call__`

    def __post_init__(self):
        for name in ("examples", "max_new_tokens", "batch_size", "max_prompt_tokens", "health_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TextTaskEvaluation.{name} must be at least 1, not {value}.")
        if self.length_normalize not in (None, *SCORINGS):
            raise ValueError(
                f"TextTaskEvaluation.length_normalize is {self.length_normalize!r}: it must be one of"
                f" {', '.join(SCORINGS)}."
            )
        if self.seed < 0:
            raise ValueError(f"TextTaskEvaluation.seed must be at least 0, not {self.seed}.")

    def with_task(self, make_task: Callable[..., Any]) -> "TextTaskEvaluation":
        """This evaluation with the task of a run, unless it has its own; see `famx.evaluation`."""
        return self if self.task is not None else dataclasses.replace(self, task=make_task())

    def __call__(
        self, model: DecoderModel, params, step: int, folder: str | os.PathLike | None = None
    ) -> dict[str, float]:
        """The scores, and what `health` adds.

        Args:
          model: the model.
          params: its parameters.
          step: training steps that they have seen.
          folder: where `<step>.predictions.jsonl` is written, a line for each answer or choice; None:
            nothing is written.

        Raises:
          ConfigError: an example has no answer, or its record is broken.
        """
        vocabulary = self._vocabulary(model)
        if all(part.task.kind == "documents" for part in self._parts):
            folder = None
        scores = {}
        with predictions_file(folder, step) as write:
            for part in self._parts:
                score = self._score_documents if part.task.kind == "documents" else self._score_answers
                scores[part.task.name] = score(part, model, params, vocabulary, write)
        scores = self._made.summary(scores)
        if self.health and model.config.memory.exists:
            scores |= self._health(model, params, vocabulary)
        return scores

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError unless task, data and answers are there and the ids are the model's."""
        self._vocabulary(model)
        for part in self._parts:
            with self._config_errors():
                _check_answer(part, part.numbers[0], part.examples[part.numbers[0]])

    # ------ What is evaluated

    @property
    def _name(self) -> str:
        is_name = self.task is None or isinstance(self.task, str)
        shown = self.task if is_name else getattr(self.task, "name", type(self.task).__name__)
        return f"TextTaskEvaluation.task {shown!r}"

    @contextlib.contextmanager
    def _config_errors(self) -> Iterator[None]:
        """What is wrong with the task or its files is the user's to mend."""
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
            with self._config_errors():
                made = registry.get(made, **(self.task_options or {}))
        with self._config_errors():
            scored = isinstance(made, Suite) or kind_of(made) is Kind.SCORED
        if not scored:
            raise ConfigError(
                f"{self._name} is no text task: evaluate it with TaskEvaluation or TextEvaluation, or"
                " choose another task."
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
                " put the vocabulary.json of its training beside model.json."
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
        self, part: _Part, model: DecoderModel, params, vocabulary: Vocabulary, write: Write
    ) -> dict[str, float]:
        longest = self.max_prompt_tokens or part.task.max_tokens
        answers = TextAnswers(
            part.task, model, vocabulary, self.batch_size, self.max_new_tokens, longest
        )
        predictions = []
        for start in range(0, len(part.numbers), _WINDOW * self.batch_size):
            numbers = part.numbers[start : start + _WINDOW * self.batch_size]
            with self._config_errors():
                examples = [part.examples[number] for number in numbers]
            for number, example in zip(numbers, examples):
                _check_answer(part, number, example)
            for number, example, row in zip(numbers, examples, answers(params, examples)):
                write({"task": part.task.name, "index": number, "id": example.get("id", ""), **row})
                predictions.append(row["prediction"])
        return part.task.evaluate(part.split, predictions, part.numbers)

    def _score_documents(
        self, part: _Part, model: DecoderModel, params, vocabulary: Vocabulary, write: Write
    ) -> dict[str, float]:
        del write
        documents = _Counted(self._documents(part, vocabulary), part.numbers)
        evaluation = TextEvaluation(documents, self.batch_size, max_tokens=None, health=False)
        found = evaluation(model, params, 0)
        num_tokens, num_bytes = np.sum(list(documents.sizes.values()), axis=0)
        nats = found["bits_per_token"] * num_tokens * np.log(2)
        return {
            "next_token_accuracy": 100 * found["accuracy"],
            "bits_per_token": found["bits_per_token"],
            "bits_per_byte": bits_per_byte(nats, num_bytes),
        }

    def _health(self, model: DecoderModel, params, vocabulary: Vocabulary) -> dict[str, float]:
        """The memory in reading the first examples of all tasks in turn, each with its answer."""
        parts = [(self._documents(p, vocabulary, self.health_tokens), p.numbers) for p in self._parts]
        turns = itertools.zip_longest(*(((own, i) for i in numbers) for own, numbers in parts))
        documents, size = _Documents(), 0
        documents.vocab = vocabulary
        for own, number in filter(None, itertools.chain.from_iterable(turns)):
            documents.append(own[number])
            size += len(documents[-1][0])
            if size >= self.health_tokens:
                break
        evaluation = TextEvaluation(documents, self.batch_size, max_tokens=None, health_tokens=size)
        return {k: v for k, v in evaluation(model, params, 0).items() if is_of_memory(k)}


class _Documents(list):
    """Documents with their vocabulary."""

    vocab: Vocabulary


class _Counted:
    """Some of the documents; `sizes` notes tokens and bytes of each that was read."""

    def __init__(self, documents: TaskDocuments, numbers: Sequence[int]):
        self.documents, self.numbers, self.vocab = documents, numbers, documents.vocab
        self.sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, weights = self.documents[self.numbers[i]]
        if isinstance(self.vocab, ByteVocabulary):  # where a text is cut, part of a character may stay
            num_bytes = int(np.sum(tokens >= self.vocab.num_special_ids))
        else:
            num_bytes = len(self.vocab.decode(tokens.tolist()).encode())
        self.sizes[i] = len(tokens), num_bytes
        return tokens, weights


def _check_answer(part: _Part, number: int, example: Example) -> None:
    """Raises ConfigError unless the example can be scored."""
    if part.task.kind == "documents":
        return
    if not example["answer" if part.task.kind == "rank" else "references"]:
        raise ConfigError(
            f"Example {number} of the {part.split} split of '{part.task.name}' has no answer to be"
            " scored with: evaluate a split that is published with its answers."
        )
