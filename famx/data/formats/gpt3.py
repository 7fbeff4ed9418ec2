"""The GPT-3 suite: the tasks that TransformerFAM sums up as "GPT-3 rank" and "GPT-3 gen".

`gpt3_rank` and `gpt3_gen` are suites of tasks, each also known by its own name (`gpt3_boolq`):

| suite | tasks | choice or metric |
|---|---|---|
| rank | anli_r1 to anli_r3, boolq, cb, copa, hellaswag, piqa, record, rte, story_cloze, wic | mean |
| rank | arc_challenge, arc_easy, openbookqa, race_high, race_middle | unconditional |
| rank | multirc | mean; all answers of a question must be judged rightly |
| rank | winograd, winogrande, wsc273 | likelihood of the text after the option |
| gen | lambada | first word |
| gen | natural_questions, squad_v2, trivia_qa, web_questions | exact match; F1 |

Records come from DATA_DIR/gpt3/TASK/SPLIT.jsonl with the field names of TensorFlow Datasets, or from what
TensorFlow Datasets has prepared, in the split that GPT-3 was scored on. Prompts are those of the GPT-3
paper (arXiv 2005.14165, appendix G) without examples. Its figures do not show every line break, so these
may differ; SQuAD has one question in each prompt. The TransformerFAM paper names both Winograd and
WSC273, not how they differ: both read `wsc273` here, unless DATA_DIR/gpt3/winograd holds other schemas
(with the same fields).

    suite = famx.data.get("gpt3_rank", data_dir="/data")
    suite.evaluate(predictions)  # {"gpt3_boolq/accuracy": ..., ..., "average": ...}

`famx.evaluation.TextTaskEvaluation` makes the predictions of a model.
"""

import dataclasses
import difflib
import functools
import os
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.formats import gpt3_prompts as prompts
from famx.data.metrics import Texts, accuracy, squad, text_exact_match, trivia_qa
from famx.data.storage.records import JsonlRecords
from famx.data.tasks import registry
from famx.data.tasks.examples import Example, Examples, Records, example_of_record
from famx.data.tasks.text_task import Metric, TextTask, register_task
from famx.data.vocabularies.base import Vocabulary

SCORINGS = ("sum", "mean", "unconditional")


@dataclasses.dataclass(frozen=True)
class Gpt3Task(TextTask):
    """A text task that says what to score, and how choices are compared.

    `split` is the split on which GPT-3 was scored.

    Args:
      scoring: "sum" compares log-likelihoods, "mean" divides them by their numbers of tokens,
        "unconditional" subtracts the log-likelihood of the same choice after `answer_context`.
      answer_context: the prompt without its question.
      headline: the metric that counts for the suite's average.

    Raises:
      ConfigError: on construction, as of `TextTask`, or there is no such scoring.
    """

    scoring: str = "mean"
    answer_context: str = "Answer:"
    headline: str = "accuracy"

    def __post_init__(self):
        super().__post_init__()
        if self.scoring not in SCORINGS:
            near = difflib.get_close_matches(str(self.scoring), SCORINGS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"'{self.scoring}' is no scoring of choices; the nearest name is '{near}', all are "
                f"{', '.join(SCORINGS)}."
            )

    def examples(self, split: str) -> Examples:
        """As `TextTask.examples`; where `contexts` are given, each stands in place of `inputs`."""
        found = super().examples(split)
        if found.preprocess is example_of_record:
            return Examples(found.records, _prepared_example)
        return found

    def requests(self, example: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Pairs (inputs, targets) whose log-likelihoods `choice_scores` needs, in its order."""
        if "contexts" in example:
            return [(context, example["targets"]) for context in example["contexts"]]
        pairs = [(example["inputs"], choice) for choice in example["choices"]]
        if self.scoring == "unconditional":
            pairs += [(self.answer_context, choice) for choice in example["choices"]]
        return pairs

    def choice_scores(
        self, example: Mapping[str, Any], scored: Sequence[tuple[float, int]]
    ) -> list[float]:
        """A number for each choice, the highest for the answer of the model.

        Args:
          example: the example.
          scored: (log-likelihood, number of tokens) of each of its `requests`.

        Raises:
          ValueError: there are more or fewer of them.
        """
        wanted = len(self.requests(example))
        if len(scored) != wanted:
            raise ValueError(
                f"An example of '{self.name}' has {wanted} requests, but {len(scored)} scores were given."
            )
        n = len(example["choices"])
        sums, counts = np.array([x[0] for x in scored], float), np.array([x[1] for x in scored], float)
        if self.scoring == "mean":
            sums = sums / np.maximum(counts, 1)
        return (sums[:n] - sums[n:] if len(sums) > n else sums).tolist()


class MultiRcTask(Gpt3Task):
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


def _prepared_example(record: Mapping[str, Any]) -> dict[str, Any]:
    example = example_of_record(record)
    if "contexts" in record:
        example["contexts"] = [context.decode() for context in record["contexts"]]
    return example


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are scored together, each on its own split.

    Attributes:
      name: name for messages.
      tasks: the tasks.
    """

    name: str
    tasks: tuple[Gpt3Task, ...]

    def evaluate(
        self,
        predictions: Mapping[str, Sequence[Any]],
        indices: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, float]:
        """`TASK/METRIC` of every task, and `average`, the mean of their headline metrics.

        Args:
          predictions: by name of the task, as its `evaluate` takes them.
          indices: by name of the task, which examples these are; None: all.

        Raises:
          ConfigError, ValueError: as the tasks' own, or predictions of a task are missing.
        """
        for task in self.tasks:
            if task.name not in predictions:
                raise ConfigError(f"'{self.name}' got no predictions of '{task.name}'; give all.")
        scores, headlines = {}, []
        for task in self.tasks:
            chosen = None if indices is None else indices.get(task.name)
            found = task.evaluate(task.split, predictions[task.name], chosen)
            scores |= {f"{task.name}/{metric}": value for metric, value in found.items()}
            headlines.append(found[task.headline])
        return scores | {"average": float(np.mean(headlines))}


# ------ Files


class _Articles:
    """The questions of RACE, several of each record, one after another."""

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


class _TfdsRecords:
    """TensorFlow Datasets' records as JSON would hold them: `a/b` is `b` of `a`, bytes are text."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in self._records[i].items():
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


def _open_jsonl(columns: Sequence[str], folder: str, split: str) -> Records:
    path = os.path.join(folder, f"{split}.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(None, "missing", path)
    records = JsonlRecords([path], columns)
    return _Articles(records) if "questions" in columns else records


def _open_tfds(records: Records, split: str) -> Records:
    nested = _TfdsRecords(records)
    return _Articles(nested) if "questions" in nested[0] else nested


# ------ Metrics of free answers


def first_word(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: predictions whose first word, without punctuation, is the reference."""
    words = [(x.split() or [""])[0].strip(string.punctuation) for x in predictions]
    return accuracy(targets, words)


def _of_first_line(metric: Metric) -> Metric:
    @functools.wraps(metric)
    def scored(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
        return metric(targets, [x.strip().partition("\n")[0].strip() for x in predictions])

    return scored


# ------ The tasks

_MEMBERS: dict[str, list[str]] = {"gpt3_rank": [], "gpt3_gen": []}


def suite(
    name: str,
    members: Sequence[str] | None = None,
    vocabulary: str | Vocabulary = "bytes",
    **options: Any,
) -> Suite:
    """`gpt3_rank` or `gpt3_gen`.

    Args:
      name: its name.
      members: names of some of its tasks, without `gpt3_`; None: all.
      vocabulary: see `famx.data.storage.text_files.as_vocabulary`.
      **options: other settings of every task, such as `data_dir` and `scoring`.

    Raises:
      ConfigError: there is no such task in the suite, or a setting is out of range.
    """
    for member in members or ():
        if member not in _MEMBERS[name]:
            near = difflib.get_close_matches(str(member), _MEMBERS[name], n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"'{name}' has no task '{member}'; the nearest name is '{near}', all are "
                f"{', '.join(_MEMBERS[name])}."
            )
    options["vocabulary"] = vocabulary
    chosen = members or _MEMBERS[name]
    return Suite(name, tuple(registry.get(f"gpt3_{member}", **options) for member in chosen))


def _add(
    name: str,
    prompt: Callable[[Mapping[str, Any]], Example],
    columns: str,
    tfds: str,
    split: str,
    splits: str = "train validation test",
    metrics: Sequence[Metric] = (text_exact_match,),
    kind: type[Gpt3Task] = Gpt3Task,
    **settings: Any,
) -> None:
    free = metrics != (text_exact_match,)
    register_task(
        kind(
            name=f"gpt3_{name}",
            kind="generation" if free else "rank",
            open_split=functools.partial(_open_jsonl, tuple(columns.split())),
            preprocess=prompt,
            metrics=tuple(_of_first_line(metric) for metric in metrics),
            splits=tuple(splits.split()),
            split=split,
            folders=(os.path.join("gpt3", name),),
            published=f"https://www.tensorflow.org/datasets/catalog/{tfds.split('/')[0]}",
            tfds=tfds,
            open_tfds=_open_tfds,
            **settings,
        )
    )
    _MEMBERS["gpt3_gen" if free else "gpt3_rank"].append(name)


for _k in (1, 2, 3):
    _add(f"anli_r{_k}", prompts.anli(_k), "context hypothesis label", f"anli/r{_k}", "test")
for _name in ("Challenge", "Easy"):
    _add(f"arc_{_name.lower()}", prompts.arc, "question choices answerKey", f"ai2_arc/ARC-{_name}",
         "test", scoring="unconditional")  # fmt: skip
_add("boolq", prompts.boolq, "question passage label", "super_glue/boolq", "validation")
_add("cb", prompts.cb, "premise hypothesis label", "super_glue/cb", "validation")
_add("copa", prompts.copa, "premise choice1 choice2 question label", "super_glue/copa", "validation")
_add("hellaswag", prompts.hellaswag, "context endings activity_label label", "hellaswag", "validation")
_add("multirc", prompts.multirc, "paragraph question answer label idx", "super_glue/multirc",
     "validation", kind=MultiRcTask)  # fmt: skip
_add("openbookqa", prompts.openbookqa, "question answerKey", "openbookqa", "test",
     scoring="unconditional")  # fmt: skip
_add("piqa", prompts.piqa, "goal sol1 sol2 label", "piqa", "validation", "train validation")
for _name in ("high", "middle"):
    _add(f"race_{_name}", prompts.race, "article questions answers options example_id", f"race/{_name}",
         "test", "train dev test", scoring="unconditional", answer_context="A:")  # fmt: skip
_add("record", prompts.record_cloze, "passage query entities answers", "super_glue/record", "validation")
_add("rte", prompts.rte, "premise hypothesis label", "super_glue/rte", "validation")
_add("story_cloze", prompts.story_cloze, "context endings label", "story_cloze/2016", "test",
     "validation test")  # fmt: skip
_add("wic", prompts.wic, "word sentence1 sentence2 label", "super_glue/wic", "validation")
_SCHEMA = "text option1_normalized option2_normalized pronoun_start pronoun_end label"
_add("winograd", prompts.winograd, _SCHEMA, "wsc273", "test", "test")
_add("winogrande", prompts.winogrande, "sentence option1 option2 label", "winogrande", "validation",
     "train_xl validation test")  # fmt: skip
_add("wsc273", prompts.winograd, _SCHEMA, "wsc273", "test", "test")

_add("lambada", prompts.lambada, "passage", "lambada", "test", "train test", (first_word,))
_add("natural_questions", prompts.closed_book, "question answer", "natural_questions_open", "validation",
     "train validation", (squad,), headline="em")  # fmt: skip
_add("squad_v2", prompts.squad_v2, "title context question answers", "squad/v2.0", "validation",
     "train validation", (squad,), headline="em")  # fmt: skip
_add("trivia_qa", prompts.trivia_qa, "question answer", "trivia_qa/unfiltered.nocontext", "validation",
     metrics=(trivia_qa,), headline="em")  # fmt: skip
_add("web_questions", prompts.closed_book, "question answers", "web_questions", "test", "train test",
     (squad,), headline="em")  # fmt: skip
for _name in _MEMBERS:
    registry.register(_name, functools.partial(suite, _name))
