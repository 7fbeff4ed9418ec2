"""Records of the GPT-3 suite as examples, in the zero-shot formats of the GPT-3 paper (appendix G).

Each function takes a record with the field names of TensorFlow Datasets. Answers begin with the space
between prompt and answer; `references` do not have it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from famx.data.tasks.examples import Example

Record = Mapping[str, Any]


def many(value: Any) -> list[Any]:
    """The value as a list; TensorFlow Datasets stores a list of one item as the item."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _label(value: Any, names: Sequence[str]) -> list[int]:
    """The index of a label given as index or name, in a list; empty if it is not published."""
    if isinstance(value, str):
        if value and value not in names:
            raise ValueError(f"'{value}' is no label; it must be one of {', '.join(names)}.")
        return [names.index(value)] if value else []
    if value is None or value < 0:
        return []
    if value >= len(names):
        raise ValueError(f"{value} is no label; there are {len(names)}, numbered from 0.")
    return [int(value)]


def _ranked(inputs: str, choices: Sequence[str], answer: Sequence[int], **extra: Any) -> Example:
    right = [choices[k] for k in answer]
    return {
        "inputs": inputs, "targets": right[0] if right else "", "references": [x.strip() for x in right],
        "choices": list(choices), "answer": list(answer), **extra,
    }  # fmt: skip


def _placed(before: str, options: Sequence[str], after: str, answer: Sequence[int]) -> Example:
    """Contexts with the same ending: the answer is the context after which the ending is likelier."""
    contexts = [before + option for option in options]
    return {
        "inputs": contexts[answer[0]] if answer else contexts[0],
        "targets": after,
        "references": [options[k] for k in answer],
        "choices": list(options),
        "answer": list(answer),
        "contexts": contexts,
    }


def _generated(inputs: str, references: Sequence[str]) -> Example:
    references = list(dict.fromkeys(references))
    targets = f" {references[0]}" if references else ""
    return {"inputs": inputs, "targets": targets, "references": references}


def _sentence(text: str) -> str:
    return text if text.rstrip().endswith((".", "?", "!")) else f"{text.rstrip()}."


def _question(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith("?") else f"{text}?"


# ------ Choices


def anli(number: int) -> Callable[[Record], Example]:
    """Round `number` of ANLI."""

    def preprocess(record: Record) -> Example:
        head = f"anli {number}: anli {number}: {record['context']}"
        inputs = f"{head}\nQuestion: {record['hypothesis']} True, False, or Neither?"
        return _ranked(inputs, [" True", " Neither", " False"], _label(record["label"], "enc"))

    return preprocess


def arc(record: Record) -> Example:
    """ARC: a question and up to five answers."""
    labels = [_label(label, "ABCDE") for label in many(record["choices"]["label"])]
    right = _label(record["answerKey"], "ABCDE")
    return _ranked(
        f"Question: {record['question']}\nAnswer:",
        [f" {text}" for text in many(record["choices"]["text"])],
        [k for k, label in enumerate(labels) if label == right and right],
    )


def boolq(record: Record) -> Example:
    """BoolQ: yes or no to a question about a passage."""
    question = record["question"].strip().rstrip("?")
    inputs = f"{record['passage']}\nquestion: {question}?\nanswer:"
    return _ranked(inputs, [" no", " yes"], _label(record["label"], ("False", "True")))


def cb(record: Record) -> Example:
    """CommitmentBank: whether the hypothesis follows, true, false or neither."""
    question = f"{_sentence(record['hypothesis'])} true, false, or neither?"
    answer = _label(record["label"], ("entailment", "contradiction", "neutral"))
    return _ranked(
        f"{record['premise']}\nquestion: {question}\nanswer:", [" true", " false", " neither"], answer)


def copa(record: Record) -> Example:
    """COPA: which sentence is the cause, or the effect."""
    premise = record["premise"].strip().rstrip(".")
    choices = [_lower_first(record[name].strip()) for name in ("choice1", "choice2")]
    return _ranked(
        f"{premise} {'because' if record['question'] == 'cause' else 'so'}",
        [f" {choice}" for choice in choices],
        _label(record["label"], ("choice1", "choice2")),
    )


def _lower_first(text: str) -> str:
    return text if re.match(r"I\b", text) else text[:1].lower() + text[1:]


def hellaswag(record: Record) -> Example:
    """HellaSwag: which ending continues the text."""
    endings = [f" {ending.strip()}" for ending in many(record["endings"])]
    answer = _label(record["label"], [str(k) for k in range(len(endings))])
    return _ranked(f"{record['activity_label']}: {record['context'].strip()}", endings, answer)


def multirc(record: Record) -> Example:
    """MultiRC: one answer to a question; all examples of a question have the same `id`."""
    inputs = f"READING COMPREHENSION ANSWER KEY\n\n{record['paragraph']}\n\n{record['question']}\n"
    choices = [f"- [{name}] {record['answer']}" for name in ("False", "True")]
    place = f"{record['idx']['paragraph']}/{record['idx']['question']}"
    return _ranked(inputs, choices, _label(record["label"], ("False", "True")), id=place)


def openbookqa(record: Record) -> Example:
    """OpenBookQA: four endings of a stem."""
    question = record["question"]
    choices = [f" {question[f'choice_{x}'].strip()}" for x in "ABCD"]
    return _ranked(question["stem"].strip(), choices, _label(record["answerKey"], "ABCD"))


def piqa(record: Record) -> Example:
    """PIQA: which of two ways reaches a goal."""
    choices = [f" {record[name].strip()}" for name in ("sol1", "sol2")]
    return _ranked(record["goal"].strip(), choices, _label(record["label"], ("0", "1")))


def race(record: Record) -> Example:
    """RACE: question `k` of an article; earlier questions are in the prompt, with their answers."""
    options = record["options"]
    if isinstance(options, Mapping):  # as TensorFlow Datasets stores lists of lists
        flat = iter(many(options["ragged_flat_values"]))
        options = [[next(flat) for _ in range(n)] for n in many(options["ragged_row_lengths_0"])]
    answers = [_label(answer, "ABCD") for answer in many(record["answers"])]
    questions = [f"Q: {question.strip()}\n\nA:" for question in many(record["questions"])]
    k = record["k"]
    earlier = [
        f"{question} {options[j][answers[j][0]].strip()}" for j, question in enumerate(questions[:k])]
    inputs = "\n\n".join([f"Article:\n\n{record['article'].strip()}", *earlier, questions[k]])
    return _ranked(
        inputs, [f" {x.strip()}" for x in options[k]], answers[k], id=f"{record['example_id']}/{k}")


def record_cloze(record: Record) -> Example:
    """ReCoRD: the query with each entity in place of the blank; several may be right."""
    passage = re.sub(r"\s*@highlight\s*", "\n- ", record["passage"].strip())
    entities = list(dict.fromkeys(many(record["entities"])))
    choices = [f"- {record['query'].replace('@placeholder', entity)}" for entity in entities]
    right = set(many(record["answers"]))
    return _ranked(f"{passage}\n", choices, [k for k, entity in enumerate(entities) if entity in right])


def rte(record: Record) -> Example:
    """RTE: whether the hypothesis follows, True or False."""
    question = f"{_sentence(record['hypothesis'])} True or False?"
    answer = _label(record["label"], ("entailment", "not_entailment"))
    return _ranked(
        f"{record['premise']}\nquestion: {question}\nanswer:", [" True", " False"], answer)


def story_cloze(record: Record) -> Example:
    """StoryCloze: which ending fits; published labels are 1 and 2."""
    endings = [f" {ending.strip()}" for ending in many(record["endings"])]
    label = int(record["label"])
    return _ranked(record["context"].strip(), endings, _label(label - 1 if label > 0 else -1, "12"))


def wic(record: Record) -> Example:
    """WiC: whether a word means the same in two sentences."""
    question = f"Is the word '{record['word']}' used in the same way in the two sentences above?"
    inputs = f"{record['sentence1']}\n{record['sentence2']}\nquestion: {question}\nanswer:"
    return _ranked(inputs, [" no", " yes"], _label(record["label"], ("False", "True")))


def winogrande(record: Record) -> Example:
    """Winogrande: each option in place of the blank."""
    before, gap, after = record["sentence"].partition("_")
    if not gap:
        raise ValueError(f"The sentence '{before[:60]}' has no gap _; use the published files.")
    options = [record["option1"].strip(), record["option2"].strip()]
    return _placed(before, options, after, _label(record["label"], ("1", "2")))


def winograd(record: Record) -> Example:
    """A Winograd schema: each option in place of the pronoun."""
    options = [record[f"option{k}_normalized"] for k in (1, 2)]
    text, start, end = record["text"], record["pronoun_start"], record["pronoun_end"]
    return _placed(text[:start], options, text[end:], _label(record["label"], ("0", "1")))


# ------ Answers in free words


def lambada(record: Record) -> Example:
    """LAMBADA: the passage without its last word, and without the blank of GPT-3's few-shot format."""
    words = record["passage"].strip().rsplit(None, 1)
    if len(words) < 2:
        raise ValueError(f"The passage '{record['passage'].strip()}' has fewer than two words.")
    return _generated(words[0], words[1:])


def closed_book(record: Record) -> Example:
    """Natural Questions and WebQuestions: a question without a passage."""
    answers = record["answers"] if "answers" in record else record["answer"]
    return _generated(f"Q: {_question(record['question'])}\n\nA:", many(answers))


def trivia_qa(record: Record) -> Example:
    """TriviaQA without documents; every alias is right."""
    answer = record["answer"]
    names = [answer["value"], *many(answer["aliases"]), *many(answer["normalized_aliases"])]
    references = [name for name in names if name and name != "<unk>"]
    return _generated(f"Q: {record['question'].strip()}\n\nA:", references)


def squad_v2(record: Record) -> Example:
    """SQuAD 2: for a question without an answer, `none` and the empty text are right; our choice."""
    title = record["title"].replace("_", " ")
    inputs = f"Title: {title}\n\nBackground: {record['context']}\n\nQ: {record['question'].strip()}\n\nA:"
    return _generated(inputs, many(record["answers"]["text"]) or ["none", ""])
