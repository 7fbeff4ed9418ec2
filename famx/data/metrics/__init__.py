"""Metrics of answers: digits, texts, ranked choices, and sums of next-token losses.

| task | as reported in | metric here |
|---|---|---|
| PassKey | TransformerFAM | `exact_match` on ids; `passkey_accuracy` on generated text |
| PG-19, Isabelle | TransformerFAM | `next_token_accuracy` |
| NarrativeQA, Qasper | TransformerFAM | `rouge`, key `rougeL` |
| NarrativeQA, Qasper | SCROLLS | `token_f1` |
| QuALITY | TransformerFAM | `rank_accuracy` |
| QuALITY, ContractNLI | SCROLLS | `text_exact_match` |
| GovReport, SummScreenFD, QMSum | SCROLLS | `rouge`, key `geometric_mean` |
| XLSum | TransformerFAM | `rouge` with `tokenize=unicode_tokens`, key `rougeL` |
| GPT-3 rank tasks (ARC, HellaSwag, ...) | GPT-3, T5 | `rank_accuracy`, some with `lengths` |
| SQuAD; Natural Questions, WebQuestions | T5 | `squad` |
| TriviaQA | T5 | `trivia_qa` |
| LAMBADA and other fixed answers | GPT-3 | `accuracy` |
| RULER: needles, variables, words | RULER | `string_match_all` |
| RULER: questions | RULER | `string_match_part` |
| any text | language modelling | `bits_per_byte`, `perplexity` |

The TransformerFAM paper names its metrics, not their tokenizers or normalisation; those are our choice.

Metrics of texts take `(targets, predictions)` as SeqIO does and return `{name: 0..100}`, not rounded.
`predictions` are strings, one per example; a target is a string or a collection of strings, the
references, of which the best counts unless said otherwise. An empty string is a valid text. They
raise ValueError, with a sentence, if the counts differ, if there is no example, if an example has no
reference, or if anything is not a string.
"""

import math
import re
import string
from collections.abc import Callable, Collection, Sequence

import numpy as np

from famx.data.metrics.rouge import english_tokens, rouge_l, rouge_n

Texts = Sequence[str | Collection[str]]


# ------ Digits


def exact_match(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """float32 [B]: 1 where all digits of int [B, digits] `predicted` equal those of `answer`."""
    return _hits(predicted, answer).all(axis=-1).astype(np.float32)


def digit_accuracy(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """float32 [B]: the share of right digits of int [B, digits] `predicted`."""
    return _hits(predicted, answer).mean(axis=-1, dtype=np.float32)


def _hits(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    predicted, answer = np.asarray(predicted), np.asarray(answer)
    if predicted.ndim != 2 or predicted.shape != answer.shape:
        raise ValueError(
            f"Predicted digits of shape {predicted.shape} cannot be compared with answers of shape "
            f"{answer.shape}; both must be [batch, digits]."
        )
    return predicted == answer


def passkey_first_integer(text: str) -> str | None:
    """The first run of the digits 0-9, with its leading zeros, or None if there is none."""
    found = re.search("[0-9]+", text)
    return found and found.group()


def passkey_accuracy(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: how often the first integer of the prediction is the key, digit by digit.

    Raises:
      ValueError: a key is not made of the digits 0-9 alone, or as the module says.
    """

    def same(key, prediction):
        if not re.fullmatch("[0-9]+", key):
            raise ValueError(f"The pass key {key!r} can never be found; give a string of digits 0-9.")
        return (passkey_first_integer(prediction) == key,)

    return _metric(["accuracy"], same, targets, predictions)


# ------ Answers


def normalize_squad(text: str) -> str:
    """Lower case without ASCII punctuation, articles (a, an, the) and spare white space."""
    return _without_articles(text.lower().translate(_NO_PUNCTUATION))


def normalize_trivia_qa(text: str) -> str:
    """As `normalize_squad`, but punctuation and the quotes ‘ ’ ´ become spaces."""
    return _without_articles(text.lower().translate(_SPACED_PUNCTUATION))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = {ord(mark): " " for mark in string.punctuation + "‘’´"}


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def accuracy(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy"}`: predictions that equal a reference, character by character."""
    return _metric(["accuracy"], lambda reference, text: (reference == text,), targets, predictions)


def text_exact_match(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"exact_match"}` of SCROLLS: predictions that equal a reference after `normalize_squad`."""
    return {"exact_match": squad(targets, predictions)["em"]}


def token_f1(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"f1"}` of SCROLLS: F-measure of the words shared with a reference after `normalize_squad`."""
    return {"f1": squad(targets, predictions)["f1"]}


def squad(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"em", "f1"}` of SQuAD 1.1: exact match and F-measure of the words, after `normalize_squad`.

    Each takes its own best reference. Two texts that are both empty after normalisation match
    exactly, but have an F1 of 0, as in the original.
    """
    return _question_answering(targets, predictions, normalize_squad)


def trivia_qa(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"em", "f1"}` as `squad`, after `normalize_trivia_qa`."""
    return _question_answering(targets, predictions, normalize_trivia_qa)


def _question_answering(targets, predictions, normalize) -> dict[str, float]:
    def score(reference, prediction):
        reference, prediction = normalize(reference), normalize(prediction)
        return reference == prediction, rouge_n(reference.split(), prediction.split(), 1)

    return _metric(["em", "f1"], score, targets, predictions)


def string_match_all(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"string_match_all"}` of RULER: the share of references that the prediction contains.

    Upper and lower case are the same. The mean over the references counts, not the best.
    """
    return _metric(["string_match_all"], _contained, targets, predictions, over_references=np.mean)


def string_match_part(targets: Texts, predictions: Sequence[str]) -> dict[str, float]:
    """`{"string_match_part"}` of RULER: predictions that contain a reference, in upper or lower case."""
    return _metric(["string_match_part"], _contained, targets, predictions)


def _contained(reference: str, prediction: str) -> tuple[bool]:
    return (reference.lower() in prediction.lower(),)


def rouge(
    targets: Texts,
    predictions: Sequence[str],
    tokenize: Callable[[str], Sequence[str]] = english_tokens,
) -> dict[str, float]:
    """`{"rouge1", "rouge2", "rougeL", "geometric_mean"}` of SCROLLS.

    Each of the three takes its own best reference and is averaged over the examples; the geometric
    mean is that of the three averages (`rouge/geometric_mean` of SCROLLS). These are plain means: T5
    reports the median of a random bootstrap, which differs from them by chance.

    Args:
      targets: string or strings per example.
      predictions: string per example.
      tokenize: text to tokens; `famx.data.metrics.rouge.unicode_tokens` for other languages than English.
        There is no stemming, as in SCROLLS and T5; for it, give a tokenizer that stems.
    """

    def score(reference, prediction):
        texts = tokenize(reference), tokenize(prediction)
        return rouge_n(*texts, 1), rouge_n(*texts, 2), rouge_l(*texts)

    scores = _metric(["rouge1", "rouge2", "rougeL"], score, targets, predictions)
    return scores | {"geometric_mean": math.cbrt(math.prod(scores.values()))}


def _metric(names, score, targets, predictions, over_references=np.max) -> dict[str, float]:
    """`score(reference, prediction)` gives a tuple, one number 0..1 per name; their means times 100."""
    examples = [
        over_references([score(reference, prediction) for reference in references], axis=0)
        for references, prediction in _pairs(targets, predictions)
    ]
    return dict(zip(names, (100 * np.mean(examples, axis=0)).tolist()))


def _pairs(targets: Texts, predictions: Sequence[str]) -> list[tuple[list[str], str]]:
    """References and prediction of every example, checked."""
    _check_counts(targets=targets, predictions=predictions)
    pairs = []
    for i, (target, prediction) in enumerate(zip(targets, predictions)):
        several = isinstance(target, (list, tuple, set, frozenset, np.ndarray))
        references = list(target) if several else [target]
        if not references:
            raise ValueError(f"Example {i} has no reference; give at least one per example.")
        for text in (*references, prediction):
            if not isinstance(text, str):
                raise ValueError(
                    f"Example {i} holds {text!r} where a string belongs; a target is a string or a "
                    "list of strings, a prediction is a string."
                )
        pairs.append((references, prediction))
    return pairs


def _check_counts(**sequences) -> None:
    for name, values in sequences.items():
        if isinstance(values, (str, bytes)):
            raise ValueError(f"The {name} are one text; give a sequence with one entry per example.")
    counts = {name: len(values) for name, values in sequences.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"A metric got {listed}; give one of each per example.")
    if not any(counts.values()):
        raise ValueError(f"A metric got no {' and no '.join(counts)}; give at least one example.")


# ------ Ranked choices


def rank_accuracy(scores, targets, lengths=None) -> dict[str, float]:
    """`{"accuracy"}`, 0..100: how often the choice of the highest score is a right one.

    Examples may differ in their number of choices. Of equal scores the first counts, as in T5.

    Args:
      scores: float [B, choices], or a list of lists: log-likelihood of each choice.
      targets: int [B], the right choice; or per example a collection of ints, all of them right.
      lengths: like `scores`: number of tokens or characters of each choice, by which its score is
        divided; None compares the sums.

    Raises:
      ValueError: counts differ or are 0, an example has no choice, a score is NaN, a target is no
        choice, or a length is not above 0.
    """
    _check_counts(scores=scores, targets=targets)
    if lengths is not None:
        _check_counts(scores=scores, lengths=lengths)
    hits = []
    for i, (row, target) in enumerate(zip(scores, targets)):
        row = np.asarray(row, np.float64)
        if row.ndim != 1 or not row.size or np.isnan(row).any():
            raise ValueError(
                f"The scores of example {i} are {row.tolist()}; give one number per choice, not NaN."
            )
        right = np.atleast_1d(list(target) if isinstance(target, (set, frozenset)) else target)
        if not right.size or right.dtype.kind not in "iu" or right.min() < 0 or right.max() >= row.size:
            raise ValueError(
                f"The target of example {i} is {target!r}; give the index of a right choice, 0 to "
                f"{row.size - 1}, or several."
            )
        if lengths is not None:
            length = np.asarray(lengths[i], np.float64)
            if length.shape != row.shape or not (length > 0).all():
                raise ValueError(
                    f"The lengths of example {i} are {length.tolist()}; give one above 0 for each of "
                    f"its {row.size} choices."
                )
            row = row / length
        hits.append(row.argmax() in right)
    return {"accuracy": 100 * float(np.mean(hits))}


# ------ Sums over tokens


def next_token_accuracy(correct: float, count: float) -> float:
    """0..100: `correct` of `count` tokens (or of their weights) were predicted right.

    Raises:
      ValueError: count is not above 0, or correct does not lie between 0 and count.
    """
    _check_above_zero("count", count)
    if not 0 <= correct <= count:
        raise ValueError(f"{correct} of {count} tokens cannot be right; give sums over the same tokens.")
    return 100 * float(correct) / float(count)


def perplexity(nats: float, count: float) -> float:
    """exp(nats / count) of a sum of losses over `count` tokens; infinite where float64 ends.

    Raises:
      ValueError: count is not above 0, or nats is negative.
    """
    _check_above_zero("count", count)
    _check_nats(nats)
    try:
        return math.exp(float(nats) / float(count))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Sum of losses in bits, per byte of the text that the tokens stand for.

    Comparable between vocabularies, as loss per token is not.

    Raises:
      ValueError: num_bytes is not above 0, or nats is negative.
    """
    _check_above_zero("num_bytes", num_bytes)
    _check_nats(nats)
    return float(nats) / math.log(2) / float(num_bytes)


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; a mean needs at least one, so it must be above 0.")


def _check_nats(nats: float) -> None:
    if nats < 0:
        raise ValueError(f"A sum of losses cannot be {nats}; give minus the log-likelihood.")
