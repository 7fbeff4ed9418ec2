"""Answers of a model to the examples of a text task: generated text, or scores of given choices."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.files import as_path, is_stored, move_into_place, replacing
from famx.data.tasks.examples import Example, cut_tokens
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import Vocabulary, token_ids
from famx.decoding import Sampling
from famx.evaluation.common import streamer_of
from famx.inference.answers import Answers
from famx.inference.prompts import Example as Prompt
from famx.inference.prompts import batches
from famx.models import DecoderModel
from famx.modules import Decoder

Write = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class TextAnswers:
    """Callable that answers examples of kind "generation" (greedy decoding) or "rank".

    Attributes:
      task: the task.
      model: the model.
      vocabulary: the model's vocabulary; its `bos_id` begins each prompt.
      batch_size: number of prompts per batch.
      max_new_tokens: maximum length of a generated answer.
      max_prompt_tokens: maximum length of the inputs, truncated the way the task truncates them; None
        for no limit.
      score_end: score end of text after each choice, too.
    """

    task: TextTask
    model: DecoderModel
    vocabulary: Vocabulary
    batch_size: int
    max_new_tokens: int
    max_prompt_tokens: int | None
    score_end: bool = False

    def __call__(self, params, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Answers the examples.

        Returns:
          One dictionary per example, in order. `prediction` is what the task's metrics score: the
          generated text, or the scores of the choices. The other entries explain it in the predictions
          file.

        Raises:
          ValueError: a choice is tokenised to nothing.
        """
        answers = answers_of(self.model.module, self.vocabulary, self.batch_size, self.max_new_tokens)
        if self.task.kind == "rank":
            return self._rank(functools.partial(answers.score, params), examples)
        return self._write(functools.partial(answers.predict, params), examples)

    def _write(self, answer: Callable, examples: Sequence[Example]) -> list[dict[str, Any]]:
        prompts = [Prompt(i, {}, self._prompt(x["inputs"])) for i, x in enumerate(examples)]
        answers = in_batches(answer, prompts, self.batch_size)
        return [
            {
                "prediction": row["prediction"],
                "finished": row["aux"]["finished"],
                "references": example["references"],
            }
            for example, row in zip(examples, answers)
        ]

    def _rank(self, answer: Callable, examples: Sequence[Example]) -> list[dict[str, Any]]:
        prompts: list[Prompt] = []
        places = []  # per example: (index of the prompt, index of the target) of each request
        for example in examples:
            requests = self.task.requests(example)
            # Targets with the same inputs share one prompt, so that the inputs are read once.
            targets: dict[str, list[str]] = {}
            for inputs, target in requests:
                targets.setdefault(inputs, []).append(target)
            numbers = {inputs: len(prompts) + i for i, inputs in enumerate(targets)}
            places.append([(numbers[x], targets[x].index(target)) for x, target in requests])
            for inputs, texts in targets.items():
                tokens = [token_ids(text, self.vocabulary) for text in texts]
                if self.score_end and self.vocabulary.eos_id is not None:
                    tokens = [np.append(ids, np.int32(self.vocabulary.eos_id)) for ids in tokens]
                if not all(map(len, tokens)):
                    raise ValueError(f"A choice of '{self.task.name}' has no tokens: {texts}.")
                prompt = self._prompt(inputs)
                prompts.append(Prompt(len(prompts), {"targets": texts}, prompt, tokens))
        answers = in_batches(answer, prompts, self.batch_size)
        rows = []
        for example, pairs in zip(examples, places):
            scored = [(answers[i]["score"][k], answers[i]["num_tokens"][k]) for i, k in pairs]
            scores = self.task.choice_scores(example, scored)
            given = {name: example[name] for name in ("choices", "answer")}
            rows.append({"prediction": scores, **given})
        return rows

    def _prompt(self, inputs: str) -> np.ndarray:
        tokens = token_ids(inputs, self.vocabulary)
        if self.max_prompt_tokens is not None:
            tokens = cut_tokens(tokens, self.max_prompt_tokens, self.task.cut)
        return np.insert(tokens, 0, self.vocabulary.bos_id)


def answers_of(module: Decoder, vocabulary: Vocabulary, batch_size: int, max_new_tokens: int) -> Answers:
    """Cached per model and settings, so that all checkpoints share the compiled programs."""
    return _answers_of(module, vocabulary, vocabulary.end_ids, batch_size, max_new_tokens)


@functools.lru_cache(maxsize=8)
def _answers_of(
    module: Decoder, vocabulary: Vocabulary, ends: tuple[int, ...], batch_size: int, max_new_tokens: int
) -> Answers:
    """`answers_of`; vocabularies are equal even if other ids end a text, so these are named."""
    sampling = Sampling(max_new_tokens, stop_tokens=ends)
    return Answers(streamer_of(module), vocabulary, None, batch_size, sampling, 1, 0)


def in_batches(answer: Callable, prompts: Sequence[Prompt], batch_size: int) -> list[dict[str, Any]]:
    """Answers to the prompts, in order. Prompts of similar length share a batch."""
    answers = {}
    for batch in batches(prompts, batch_size):
        answers |= zip((prompt.line for prompt in batch), answer(batch)[0])
    return [answers[prompt.line] for prompt in prompts]


@contextlib.contextmanager
def predictions_file(folder: str | os.PathLike | None, step: int) -> Iterator[Write]:
    """Opens `<folder>/<step>.predictions.jsonl` and yields a function that writes one row.

    The file gets its name only when the block ends without an exception, so a reader never sees part
    of it. Until then, and after an exception, the rows are in `<step>.predictions.jsonl.partial`; for a
    store, they are in no file that lasts. With `folder=None` the yielded function discards the rows.
    """
    if folder is None:
        yield lambda row: None
        return
    path = as_path(folder) / f"{step}.predictions.jsonl"
    if is_stored(path):
        with replacing(path) as partial, _rows(partial) as write:
            yield write
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with _rows(partial) as write:
        yield write
    move_into_place({partial: path})


@contextlib.contextmanager
def _rows(path: pathlib.Path) -> Iterator[Write]:
    """A function that writes a row to a new file, in which it is at once."""
    with path.open("w", encoding="utf-8", buffering=1) as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
