"""The GPT-3 suites: the tasks that TransformerFAM averages as "GPT-3 rank" and "GPT-3 gen".

`gpt3_rank` and `gpt3_gen` are suites; each of their tasks also has a name, such as `gpt3_boolq`:

| suite | tasks | scoring or metric |
|---|---|---|
| rank | anli_r1 to anli_r3, boolq, cb, copa, hellaswag, piqa, record, rte, story_cloze, wic | mean |
| rank | arc_challenge, arc_easy, openbookqa, race_high, race_middle | unconditional |
| rank | multirc | mean; right if all answers of a question are judged rightly |
| rank | winograd, winogrande, wsc273 | likelihood of the text after the option |
| gen | lambada | first word |
| gen | natural_questions, squad_v2, trivia_qa, web_questions | exact match; F1 |

Records come from DATA_DIR/gpt3/TASK/SPLIT.jsonl with the field names of TensorFlow Datasets, from Parquet
or Arrow files with these columns in that folder, or from the records that TensorFlow Datasets has
prepared, by default in the split on which GPT-3 was scored. Prompts are those of the GPT-3 paper (arXiv
2005.14165, appendix G) without examples. Its figures do not show every line break, so ours may differ;
SQuAD has one question in each prompt. The TransformerFAM paper names both Winograd and WSC273 but not
their difference: here both read `wsc273`, unless DATA_DIR/gpt3/winograd has other schemas with the same
fields.

    suite = famx.data.get("gpt3_rank", data_dir="/data")
    suite.evaluate(predictions)  # {"gpt3_boolq/accuracy": ..., ..., "average": ...}

`famx.evaluation.TextTaskEvaluation` makes a model's predictions. `famx.data.tasks.ranking` describes the
scorings.
"""

import difflib
import functools
import os
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.ranges import Name
from famx.base.values import checked
from famx.data.formats import gpt3_prompts as prompts
from famx.data.metrics import Texts, accuracy, squad, text_exact_match, trivia_qa
from famx.data.storage import MappedRecords, open_split
from famx.data.tasks.examples import Example, Records
from famx.data.tasks.suites import Suite
from famx.data.tasks.text_task import Metric, TextTask, task_factories
from famx.data.vocabularies import AnyVocabulary


class MultiRcTask(TextTask):
    """MultiRC: an example is one answer, which is true or false; a question has several."""

    def evaluate(self, split, predictions, indices=None, lengths=None):
        """`accuracy` of whole questions, `answer_accuracy`, and `f1a`, the F-measure of true answers."""
        scores = super().evaluate(split, predictions, indices, lengths)
        if isinstance(predictions[0], str):
            return scores
        examples = self.examples(split)
        indices = range(len(examples)) if indices is None else indices
        rows = [np.asarray(row, np.float64) for row in predictions]
        if lengths is not None:
            rows = [row / np.asarray(length) for row, length in zip(rows, lengths)]
        judged = np.array([row.argmax() for row in rows])
        right = np.array([examples[int(i)]["answer"][0] for i in indices])
        questions: dict[str, bool] = {}
        for i, hit in zip(indices, judged == right):
            name = examples[int(i)]["id"]
            questions[name] = questions.get(name, True) and bool(hit)
        both = (judged & right).sum()
        return {
            "accuracy": 100 * float(np.mean(list(questions.values()))),
            "answer_accuracy": scores["accuracy"],
            "f1a": float(200 * both / max(judged.sum() + right.sum(), 1)),
        }


# ------ Files


class _Articles:
    """The questions of RACE, of which a record has several."""

    def __init__(self, records: Records):
        self._records = records
        counts = [len(prompts.many(records[i]["questions"])) for i in range(len(records))]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        article = int(np.searchsorted(self._starts, i, side="right")) - 1
        return {**self._records[article], "k": int(i - self._starts[article])}


def _of_tfds(record: Mapping[str, Any]) -> dict[str, Any]:
    """TensorFlow Datasets' record in the form of JSON: `a/b` becomes `b` in `a`, bytes become text."""
    nested: dict[str, Any] = {}
    for name, value in record.items():
        *outer, last = name.split("/")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = _plain(value)
    return nested


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [x.decode() for x in value]
    return value.item() if value.size == 1 else value.tolist()


def _open_rows(columns: Sequence[str], folder: str, split: str) -> Records:
    records = open_split(folder, split, columns)
    return _Articles(records) if "questions" in columns else records


def _open_tfds(records: Records, split: str) -> Records:
    nested = MappedRecords(records, _of_tfds)
    return _Articles(nested) if "questions" in nested[0] else nested


# ------ Metrics of free answers


def first_word(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: predictions whose first word, without punctuation, is the reference."""
    words = [(x.split() or [""])[0].strip(string.punctuation) for x in predictions]
    return accuracy(targets, words)


def _of_first_line(metric: Metric) -> Metric:
    """The metric, applied to the first line of each prediction."""

    @functools.wraps(metric)
    def scored(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
        return metric(targets, [x.strip().partition("\n")[0].strip() for x in predictions])

    return scored


# ------ The tasks


def _task(
    name: str,
    prompt: Callable[[Mapping[str, Any]], Example],
    columns: str,
    tfds: str,
    split: str,
    splits: str = "train validation test",
    metrics: Sequence[Metric] = (),
    cls: type[TextTask] = TextTask,
    scoring: str = "mean",
    answer_context: str = "Answer:",
) -> TextTask:
    """A task of a suite: of kind "generation" if it has metrics, else of kind "rank"."""
    return cls(
        name=f"gpt3_{name}",
        kind="generation" if metrics else "rank",
        open_split=functools.partial(_open_rows, tuple(columns.split())),
        preprocess=prompt,
        metrics=tuple(_of_first_line(metric) for metric in metrics or (text_exact_match,)),
        splits=tuple(splits.split()),
        split=split,
        evaluation_split=None,  # `split`, on which GPT-3 was scored
        folders=(os.path.join("gpt3", name),),
        published=f"https://www.tensorflow.org/datasets/catalog/{tfds.split('/')[0]}",
        tfds=tfds,
        open_tfds=_open_tfds,
        scoring=scoring,
        answer_context=answer_context,
    )


_SCHEMA = "text option1_normalized option2_normalized pronoun_start pronoun_end label"
_RANK = [
    *(_task(f"anli_r{k}", prompts.anli(k), "context hypothesis label", f"anli/r{k}", "test")
      for k in (1, 2, 3)),
    *(_task(f"arc_{name.lower()}", prompts.arc, "question choices answerKey", f"ai2_arc/ARC-{name}",
            "test", scoring="unconditional") for name in ("Challenge", "Easy")),
    _task("boolq", prompts.boolq, "question passage label", "super_glue/boolq", "validation"),
    _task("cb", prompts.cb, "premise hypothesis label", "super_glue/cb", "validation"),
    _task("copa", prompts.copa, "premise choice1 choice2 question label", "super_glue/copa",
          "validation"),
    _task("hellaswag", prompts.hellaswag, "context endings activity_label label", "hellaswag",
          "validation"),
    _task("multirc", prompts.multirc, "paragraph question answer label idx", "super_glue/multirc",
          "validation", cls=MultiRcTask),
    _task("openbookqa", prompts.openbookqa, "question answerKey", "openbookqa", "test",
          scoring="unconditional"),
    _task("piqa", prompts.piqa, "goal sol1 sol2 label", "piqa", "validation", "train validation"),
    *(_task(f"race_{name}", prompts.race, "article questions answers options example_id",
            f"race/{name}", "test", "train dev test", scoring="unconditional", answer_context="A:")
      for name in ("high", "middle")),
    _task("record", prompts.record_cloze, "passage query entities answers", "super_glue/record",
          "validation"),
    _task("rte", prompts.rte, "premise hypothesis label", "super_glue/rte", "validation"),
    _task("story_cloze", prompts.story_cloze, "context endings label", "story_cloze/2016", "test",
          "validation test"),
    _task("wic", prompts.wic, "word sentence1 sentence2 label", "super_glue/wic", "validation"),
    _task("winograd", prompts.winograd, _SCHEMA, "wsc273", "test", "test"),
    _task("winogrande", prompts.winogrande, "sentence option1 option2 label", "winogrande",
          "validation", "train_xl validation test"),
    _task("wsc273", prompts.winograd, _SCHEMA, "wsc273", "test", "test"),
]  # fmt: skip
_GENERATION = [
    _task("lambada", prompts.lambada, "passage", "lambada", "test", "train test", (first_word,)),
    _task("natural_questions", prompts.closed_book, "question answer", "natural_questions_open",
          "validation", "train validation", (squad,)),
    _task("squad_v2", prompts.squad_v2, "title context question answers", "squad/v2.0", "validation",
          "train validation", (squad,)),
    _task("trivia_qa", prompts.trivia_qa, "question answer", "trivia_qa/unfiltered.nocontext",
          "validation", metrics=(trivia_qa,)),
    _task("web_questions", prompts.closed_book, "question answers", "web_questions", "test",
          "train test", (squad,)),
]  # fmt: skip
_SUITES = {"gpt3_rank": task_factories(_RANK), "gpt3_gen": task_factories(_GENERATION)}
_HEADLINES = {  # metrics of the average that are not "accuracy"
    f"gpt3_{name}": "em" for name in ("natural_questions", "squad_v2", "trivia_qa", "web_questions")
}


@checked
def suite(
    name: Name,
    members: Sequence[Name] | None = None,
    vocabulary: AnyVocabulary = "bytes",
    **options: Any,
) -> Suite:
    """Make a suite of GPT-3's zero-shot tasks: `gpt3_rank` or `gpt3_gen`.

    Args:
      name: "gpt3_rank" or "gpt3_gen".
      members: names of some of its tasks, without `gpt3_`; None: all.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`.
      **options: other settings of every task, such as `data_dir` and `scoring`.

    Raises:
      ConfigError: the suite has no such task, or a setting is out of range.
    """
    factories = _SUITES[name]
    known = [task.removeprefix("gpt3_") for task in factories]
    for member in members or ():
        if member not in known:
            near = difflib.get_close_matches(str(member), known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"'{name}' has no task '{member}'; the nearest name is '{near}', all are "
                f"{', '.join(known)}."
            )
    tasks = (factories[f"gpt3_{x}"](vocabulary=vocabulary, **options) for x in members or known)
    return Suite(name, tuple(tasks), _HEADLINES)


TASKS = {
    **_SUITES["gpt3_rank"],
    **_SUITES["gpt3_gen"],
    **{name: functools.partial(suite, name) for name in _SUITES},
}
