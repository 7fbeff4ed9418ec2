"""Metrics of answers in text, each compared with its references."""

import math
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from famx.data.metrics.averaging import Texts, mean_over_examples
from famx.data.metrics.rouge_scores import rouge_l, rouge_n
from famx.data.metrics.text_tokens import english_tokens


def passkey_first_integer(text: str) -> str | None:
    """The first run of the digits 0-9, leading zeros included; None if there is none."""
    match = re.search("[0-9]+", text)
    return match and match.group()


def passkey_accuracy(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: predictions whose first integer is the key, digit by digit.

    Raises:
      ValueError: a key has other characters than the digits 0-9, or as `mean_over_examples`.
    """

    def same(key, prediction):
        if not re.fullmatch("[0-9]+", key):
            raise ValueError(f"The pass key {key!r} can never match; give a string of digits 0-9.")
        return (passkey_first_integer(prediction) == key,)

    return mean_over_examples(["accuracy"], same, targets, predictions)


def normalize_squad(text: str) -> str:
    """Lower-case `text` without ASCII punctuation, articles (a, an, the) and extra white space."""
    return _without_articles(text.lower().translate(_NO_PUNCTUATION))


def normalize_trivia_qa(text: str) -> str:
    """Like `normalize_squad`, but punctuation and the quotes ‘ ’ ´ become spaces."""
    return _without_articles(text.lower().translate(_SPACED_PUNCTUATION))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = {ord(mark): " " for mark in string.punctuation + "‘’´"}


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def accuracy(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: predictions that equal a reference, character by character."""
    same = lambda reference, prediction: (reference == prediction,)
    return mean_over_examples(["accuracy"], same, targets, predictions)


def text_exact_match(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"exact_match"}` of SCROLLS: predictions that equal a reference after `normalize_squad`."""
    return {"exact_match": squad(targets, predictions)["em"]}


def token_f1(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"f1"}` of SCROLLS: F-measure of the words shared with a reference after `normalize_squad`."""
    return {"f1": squad(targets, predictions)["f1"]}


def squad(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"em", "f1"}` of SQuAD 1.1: exact match and F-measure of the words, after `normalize_squad`.

    Each of the two takes the reference that is best for it. Texts that are both empty after
    normalisation match exactly, but have an F1 of 0, as in the original script.
    """
    return _question_answering(targets, predictions, normalize_squad)


def trivia_qa(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"em", "f1"}` like `squad`, but after `normalize_trivia_qa`."""
    return _question_answering(targets, predictions, normalize_trivia_qa)


def _question_answering(targets, predictions, normalize) -> dict[str, float]:
    def score(reference, prediction):
        reference, prediction = normalize(reference), normalize(prediction)
        return reference == prediction, rouge_n(reference.split(), prediction.split(), 1)

    return mean_over_examples(["em", "f1"], score, targets, predictions)


def string_match_all(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"string_match_all"}` of RULER: the share of references that the prediction contains.

    Case is ignored. The score of an example is the mean over its references.
    """
    return mean_over_examples(["string_match_all"], _contained, targets, predictions, np.mean)


def string_match_part(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"string_match_part"}` of RULER: predictions that contain a reference; case is ignored."""
    return mean_over_examples(["string_match_part"], _contained, targets, predictions)


def babilong_accuracy(
    targets: Texts, predictions: Sequence[str], questions: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """`{"accuracy"}` of BABILong: predictions whose first sentence names the target and no other label.

    The first sentence ends at the first full stop, or where an example or a context begins. Labels that
    the question names do not count, and case is ignored.

    Args:
      targets: the label that is right, of each example.
      predictions, questions: one string per example.
      labels: all possible answers.

    Raises:
      ValueError: as `mean_over_examples`.
    """
    if len(questions) != len(predictions):
        raise ValueError(f"There are {len(predictions)} predictions, but {len(questions)} questions.")

    def named(text: str) -> set[str]:
        return {label for label in labels if label.lower() in text.lower()}

    first = [re.split(r"\.|<context>|<example>", text.lower())[0] for text in predictions]
    left = [" ".join(sorted(named(x) - named(question))) for x, question in zip(first, questions)]
    return accuracy(targets, left)


def _contained(reference: str, prediction: str) -> tuple[bool]:
    return (reference.lower() in prediction.lower(),)


def rouge(
    targets: Texts,
    predictions: Sequence[str],
    tokenize: Callable[[str], Sequence[str]] = english_tokens,
) -> dict[str, float]:
    """`{"rouge1", "rouge2", "rougeL", "geometric_mean"}` of SCROLLS.

    Each ROUGE takes the reference that is best for it and is averaged over the examples; the
    geometric mean is that of the three averages (`rouge/geometric_mean` of SCROLLS). These are plain
    means, while T5 reports the median of a random bootstrap.

    Args:
      targets: one or several strings per example.
      predictions: one string per example.
      tokenize: text to tokens; use `unicode_tokens` for languages other than English. As in SCROLLS
        and T5 nothing is stemmed; for stemming, give a tokenizer that stems.
    """

    def score(reference, prediction):
        texts = tokenize(reference), tokenize(prediction)
        return rouge_n(*texts, 1), rouge_n(*texts, 2), rouge_l(*texts)

    scores = mean_over_examples(["rouge1", "rouge2", "rougeL"], score, targets, predictions)
    return scores | {"geometric_mean": math.cbrt(math.prod(scores.values()))}
