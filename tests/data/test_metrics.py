"""Metrics of answers and ROUGE, against slow oracles, published figures and the stock scorer."""

import collections
import math
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from famx.data import metrics
from famx.data.metrics import english_tokens, lcs_length, rouge_l, rouge_n, unicode_tokens

TEXT_METRICS = [
    metrics.accuracy,
    metrics.passkey_accuracy,
    metrics.rouge,
    metrics.squad,
    metrics.string_match_all,
    metrics.string_match_part,
    metrics.text_exact_match,
    metrics.token_f1,
    metrics.trivia_qa,
]
WORDS = "the a An cat Cats running runs x1 e-mail theatre don't … Été".split() + [""]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
examples = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=5)


def best_mean(score, pairs):
    """The definition: per example the best reference, then the mean, times 100."""
    return 100 * sum(max(score(r, p) for r in refs) for refs, p in pairs) / len(pairs)


# ------ Texts


def slow_normalize(text, quotes):
    """Character by character; `quotes`: punctuation becomes a space, as in TriviaQA."""
    kept = ""
    for character in text.lower():
        if character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or quotes and character in "‘’´":
            kept += " " if quotes else ""
        else:
            kept += character
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def slow_f1(reference, prediction):
    left, common = list(reference), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=60, deadline=None)
@given(examples)
@example([(["…"], "...")])
@example([(["the"], "")])
def test_answers_match_the_definitions(pairs):
    targets, predictions = zip(*pairs)
    for metric, quotes in ((metrics.squad, False), (metrics.trivia_qa, True)):
        words = [
            ([slow_normalize(r, quotes) for r in refs], slow_normalize(p, quotes)) for refs, p in pairs
        ]
        em = best_mean(lambda r, p: float(r == p), words)
        f1 = best_mean(slow_f1, words)
        assert metric(targets, predictions) == pytest.approx({"em": em, "f1": f1})
    em, f1 = metrics.squad(targets, predictions).values()
    assert metrics.text_exact_match(targets, predictions) == {"exact_match": em}
    assert metrics.token_f1(targets, predictions) == {"f1": f1}
    exact = best_mean(lambda r, p: float(r == p), pairs)
    assert metrics.accuracy(targets, predictions) == pytest.approx({"accuracy": exact})


def test_normalisation_keeps_words_that_contain_an_article():
    assert metrics.normalize_squad("  The  Theatre, a play (an Ant)!\n") == "theatre play ant"
    assert metrics.normalize_squad("e-mail don't") == "email dont"
    assert metrics.normalize_trivia_qa("e-mail_don’t the ‘End’") == "e mail don t end"
    assert metrics.normalize_squad("don’t") == "don’t"


def test_scores_are_those_that_scrolls_documents():
    predictions = ["exact match example", "hello there", "general kenobi"]
    references = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]
    assert metrics.rouge(references, predictions) == pytest.approx(
        {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222, "geometric_mean": 55.8136}, abs=5e-5)
    assert metrics.text_exact_match(references, predictions) == pytest.approx({"exact_match": 100 / 3})
    assert metrics.token_f1(references, predictions) == pytest.approx({"f1": 72.2222}, abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(examples)
def test_ruler_looks_for_references_in_the_prediction(pairs):
    targets, predictions = zip(*pairs)

    def found(reference, prediction):
        return float(prediction.lower().find(reference.lower()) >= 0)

    part = best_mean(found, pairs)
    shares = [sum(found(r, p) for r in refs) / len(refs) for refs, p in pairs]
    assert metrics.string_match_part(targets, predictions) == pytest.approx({"string_match_part": part})
    assert metrics.string_match_all(targets, predictions) == pytest.approx(
        {"string_match_all": 100 * sum(shares) / len(shares)})


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("The most recent location of Mary is garden.", True),
        ("\nAnswer: GARDEN. The kitchen is next.", True),
        ("garden or kitchen", False),
        ("the kitchen", False),
        ("the office, and before it the garden", True),  # the question names the office
        ("nowhere", False),
        ("garden<example> kitchen", True),
        ("x. garden", False),
    ],
)
def test_babilong_wants_one_label_in_the_first_sentence(prediction, right):
    labels = ("kitchen", "garden", "office")
    question = "Where was Mary before the office?"
    score = metrics.babilong_accuracy(["garden"], [prediction], [question], labels)
    assert score == {"accuracy": 100.0 * right}


def test_babilong_needs_a_question_for_each_prediction():
    with pytest.raises(ValueError, match="1 predictions, but 0 questions"):
        metrics.babilong_accuracy(["garden"], ["garden"], [], ["garden"])


def test_ruler_counts_all_or_one():
    targets, predictions = [["12", "Blue", "x"], ["7"]], ["it is BLUE, 123", "none"]
    assert metrics.string_match_all(targets, predictions) == pytest.approx({"string_match_all": 100 / 3})
    assert metrics.string_match_part(targets, predictions) == {"string_match_part": 50.0}


def test_the_pass_key_is_the_first_integer_with_its_zeros():
    assert metrics.passkey_first_integer("The pass key is 00471. Remember 5.") == "00471"
    assert metrics.passkey_first_integer("v12 or ٣٤") == "12"
    assert metrics.passkey_first_integer("٣٤ none") is None
    assert metrics.passkey_first_integer("") is None
    predictions = [" 00471.", "471", "004712", "key 1 00471", "", "00471 9"]
    assert metrics.passkey_accuracy(["00471"] * 6, predictions) == pytest.approx({"accuracy": 100 / 3})
    with pytest.raises(ValueError, match="'4a' can never match; give a string of digits"):
        metrics.passkey_accuracy(["4a"], ["4"])


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_any_collection_of_references_is_welcome_and_scores_are_floats(metric):
    expected = metric([["12", "34"], ["5"]], ["34", "6"])
    assert all(type(value) is float for value in expected.values())
    assert max(expected.values()) > 0
    for several in (tuple, frozenset, np.array):
        assert metric([several(["12", "34"]), "5"], np.array(["34", "6"])) == expected
    assert set(metric(["1"], [""]).values()) == {0.0}


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize(
    "targets, predictions, sentence",
    [
        (["1", "2"], ["1"], "got 2 targets, 1 predictions; give one of each"),
        ([], [], "got no targets and no predictions; give at least one"),
        ("12", ["1", "2"], "targets are one text"),
        (["1", "2"], "12", "predictions are one text"),
        (["1", []], ["1", "2"], "Example 1 has no reference"),
        ([None], ["1"], "Example 0 has None in place of a string"),
        ([["1", 2]], ["1"], "Example 0 has 2 in place of"),
        ([{"answers": "1"}], ["1"], "Example 0 has {'answers': '1'} in place of"),
        (["1"], [b"1"], "Example 0 has b'1' in place of"),
        (["1"], [None], "Example 0 has None in place of"),
    ],
)
def test_bad_texts_get_a_sentence(metric, targets, predictions, sentence):
    with pytest.raises(ValueError, match=sentence):
        metric(targets, predictions)


# ------ ROUGE


def stock(use_stemmer=False):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)


def porter_tokens(text):
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    return [porter.stem(word) if len(word) > 3 else word for word in english_tokens(text)]


@settings(max_examples=60, deadline=None)
@given(examples)
def test_rouge_is_the_stock_scorers(pairs):
    targets, predictions = zip(*pairs)
    for stems, tokenize in ((False, english_tokens), (True, porter_tokens)):
        scorer = stock(stems)
        scores_of = {(r, p): scorer.score(r, p) for refs, p in pairs for r in refs}
        scores = metrics.rouge(targets, predictions, tokenize)
        product = 1.0
        for name in ("rouge1", "rouge2", "rougeL"):
            best = [max(scores_of[r, p][name].fmeasure for r in refs) for refs, p in pairs]
            expected = 100 * sum(best) / len(best)
            assert scores[name] == pytest.approx(expected)
            product *= expected
        assert scores["geometric_mean"] == pytest.approx(product ** (1 / 3))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
@example("İstanbul ①²")
def test_english_tokens_are_the_stock_tokenizers(text):
    tokenize = pytest.importorskip("rouge_score.tokenize")
    assert english_tokens(text) == tokenize.tokenize(text, None)


def test_each_measure_takes_its_own_best_reference():
    scores = metrics.rouge([["c b a d", "a b"]], ["a b c d"])
    assert scores["rouge1"] == 100.0
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (1 + 3))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 2 / (2 + 4))


def slow_lcs(first, second):
    table = collections.defaultdict(int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i, j] = table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
    return table[len(first) - 1, len(second) - 1] if first and second else 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=80), st.lists(st.integers(0, 4), max_size=80))
def test_lcs_is_that_of_the_table(first, second):
    expected = slow_lcs(first, second)
    assert lcs_length(first, second) == lcs_length(second, first) == expected
    size = len(first) + len(second)
    assert rouge_l(first, second) == pytest.approx(2 * expected / size if size else 0)


def test_lcs_of_long_texts_is_right_and_quick():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, (2, 8000))
    row = np.zeros(len(second) + 1, int)
    for token in first:
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (second == token)))
    first, second = first.tolist(), second.tolist()
    start = time.process_time()
    assert lcs_length(first, second) == row[-1]
    assert time.process_time() - start < 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_rouge_n_is_the_f1_of_the_runs(n, first, second):
    runs = [[tuple(s[i : i + n]) for i in range(len(s) - n + 1)] for s in (first, second)]
    assert rouge_n(first, second, n) == pytest.approx(slow_f1(*runs))


def test_rouge_of_no_tokens_gets_a_sentence():
    with pytest.raises(ValueError, match="at least 1 token, but n is 0"):
        rouge_n("ab", "ab", 0)


# ------ Scripts

SENTENCES = {
    "Arabic": ("قالَ الرئيسُ، «نعم»؟", ["قالَ", "الرئيسُ", "نعم"]),
    "Persian": ("می‌خواهم بروم", ["میخواهم", "بروم"]),
    "Hindi": ("हिन्दी में क्या है?", ["हिन्दी", "में", "क्या", "है"]),
    "Bengali": ("আপনার সাথে দেখা।", ["আপনার", "সাথে", "দেখা"]),
    "Chinese": ("中国2024年，二〇〇四。", ["中", "国", "2024", "年", "二", "〇", "〇", "四"]),
    "Japanese": ("カﾞラスがコーヒー・", ["ガ", "ラ", "ス", "が", "コ", "ー", "ヒ", "ー"]),
    "Thai": ("ผู้ที่ ๒๕๖๖", ["ผู้", "ที่", "๒๕๖๖"]),
    "Lao": ("ພາສາ", ["ພ", "າ", "ສ", "າ"]),
    "Khmer": ("ភាសា។", ["ភា", "សា"]),
    "Burmese": ("မြန်မာစာ။", ["မြ", "န်", "မာ", "စာ"]),
    "Amharic": ("ሰላም፡ለዓለም። ፳፩", ["ሰላም", "ለዓለም", "፳፩"]),
    "Russian": ("Приве́т, МИР — ещё", ["приве́т", "мир", "ещё"]),
    "Korean": ("한국어 뉴스", ["한국어", "뉴스"]),
    "stray marks": ("\u0301b 中\u0301b", ["\u0301b", "中\u0301", "b"]),
    "mixed": ("iPhone15を買う＿ＡＢＣ co\u00adop", ["iphone15", "を", "買", "う", "abc", "coop"]),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_words_of_any_script_are_tokens(language):
    text, tokens = SENTENCES[language]
    tokens = [unicodedata.normalize("NFKC", token) for token in tokens]
    assert unicode_tokens(text) == tokens
    assert unicode_tokens(unicodedata.normalize("NFD", text)) == tokens


@pytest.mark.parametrize("language", sorted(SENTENCES.keys() - {"Chinese", "mixed", "stray marks"}))
def test_rouge_of_other_scripts_is_not_zero(language):
    text, tokens = SENTENCES[language]
    shorter = " ".join(tokens[:-1])
    assert metrics.rouge([text], [shorter]) == dict.fromkeys(
        ["rouge1", "rouge2", "rougeL", "geometric_mean"], 0.0)
    scores = metrics.rouge([text], [shorter], tokenize=unicode_tokens)
    expected = 200 * (len(tokens) - 1) / (2 * len(tokens) - 1)
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(expected)
    if len(tokens) > 2:
        assert scores["rouge2"] == pytest.approx(200 * (len(tokens) - 2) / (2 * len(tokens) - 3))


def test_vowel_signs_make_a_difference():
    assert rouge_l(unicode_tokens("कि"), unicode_tokens("की")) == 0
    assert rouge_l(unicode_tokens("ที่"), unicode_tokens("ที")) == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
@example("\u0301 a\u0301中\u0301b")
def test_unicode_tokens_lose_no_letter_and_need_no_form(text):
    tokens = unicode_tokens(text)
    normal = unicodedata.normalize("NFKC", text).lower()
    letters = [c for c in normal if unicodedata.category(c)[0] in "LMN"]
    assert "".join(tokens) == "".join(letters) and all(tokens)
    if text.isascii():
        assert tokens == english_tokens(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert unicode_tokens(unicodedata.normalize(form, text)) == tokens


# ------ Ranked choices


@st.composite
def ranked(draw):
    """Scores, lengths and right choices of examples with different numbers of choices."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    number = st.floats(-50, 0) | st.just(-math.inf)
    scores = [draw(st.lists(number, min_size=n, max_size=n)) for n in counts]
    lengths = [draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) for n in counts]
    targets = [draw(st.integers(0, n - 1) | st.sets(st.integers(0, n - 1), min_size=1)) for n in counts]
    return scores, lengths, targets


@settings(max_examples=100, deadline=None)
@given(ranked())
def test_rank_accuracy_counts_the_best_choices_that_are_right(rows):
    scores, lengths, targets = rows
    for divide in (False, True):
        hits = 0
        for row, length, target in zip(scores, lengths, targets):
            row = [s / n for s, n in zip(row, length)] if divide else row
            hits += row.index(max(row)) in (target if isinstance(target, set) else {target})
        result = metrics.rank_accuracy(scores, targets, lengths if divide else None)
        assert result == pytest.approx({"accuracy": 100 * hits / len(scores)})


def test_lengths_change_the_choice_and_arrays_are_welcome():
    scores, targets = np.array([[-4.0, -3.0], [-1.0, -2.0]], np.float32), np.array([0, 1])
    assert metrics.rank_accuracy(scores, targets) == {"accuracy": 0.0}
    assert metrics.rank_accuracy(scores, targets, np.array([[4, 1], [1, 4]])) == {"accuracy": 100.0}
    assert metrics.rank_accuracy(scores, [[0, 1], (0,)]) == {"accuracy": 100.0}
    assert metrics.rank_accuracy([[-1.0, -1.0]], [1]) == {"accuracy": 0.0}


@pytest.mark.parametrize(
    "scores, targets, lengths, sentence",
    [
        ([[0.0]], [0, 0], None, "got 1 scores, 2 targets"),
        ([], [], None, "got no scores and no targets"),
        ([[0.0]], [0], [], "got 1 scores, 0 lengths"),
        ([[]], [0], None, r"scores of example 0 are \[\]; give one number per choice"),
        ([[0.0], [1.0, math.nan]], [0, 0], None, "example 1 are .*not NaN"),
        ([[0.0, 1.0]], [2], None, "target of example 0 is 2; give the index of a right choice, 0 to 1"),
        ([[0.0, 1.0]], [-1], None, "target of example 0 is -1"),
        ([[0.0, 1.0]], [set()], None, "target of example 0 is set()"),
        ([[0.0, 1.0]], [np.array([], int)], None, "target of example 0 is array"),
        ([[0.0, 1.0]], ["a"], None, "target of example 0 is 'a'"),
        ([[0.0, 1.0]], [0], [[1, 0]], "lengths of example 0 are .* above 0 for each of its 2 choices"),
        ([[0.0, 1.0]], [0], [[1]], "lengths of example 0 are"),
    ],
)
def test_bad_choices_get_a_sentence(scores, targets, lengths, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.rank_accuracy(scores, targets, lengths)


# ------ Digits and sums


def test_digits_are_counted_per_row():
    answer = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    predicted = np.array([[1, 2, 3, 4], [5, 0, 7, 0]])
    np.testing.assert_array_equal(metrics.exact_match(predicted, answer), [1.0, 0.0])
    np.testing.assert_array_equal(metrics.digit_accuracy(predicted, answer), [1.0, 0.5])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=20), st.integers(1, 4))
def test_sums_give_the_means_of_language_modelling(probabilities, bytes_per_token):
    nats = np.float32(sum(-math.log(p) for p in probabilities))
    count = len(probabilities)
    inverse = math.prod(probabilities) ** (-1 / count)
    assert metrics.perplexity(nats, count) == pytest.approx(inverse, rel=1e-5)
    bits = sum(-math.log2(p) for p in probabilities) / (count * bytes_per_token)
    assert metrics.bits_per_byte(nats, count * bytes_per_token) == pytest.approx(bits, rel=1e-5, abs=1e-9)
    right = sum(p > 0.5 for p in probabilities)
    assert metrics.next_token_accuracy(right, count) == pytest.approx(100 * right / count)


def test_sums_at_their_limits():
    assert metrics.perplexity(1e6, 1) == math.inf
    assert metrics.perplexity(0.0, 3) == 1.0
    assert metrics.bits_per_byte(math.log(2) * 8, 4) == pytest.approx(2.0)
    assert metrics.next_token_accuracy(np.float32(1.5), np.float32(2.0)) == 75.0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: metrics.next_token_accuracy(0, 0), "count is 0; .* above 0"),
        (lambda: metrics.next_token_accuracy(3, 2), "3 of 2 tokens cannot be right"),
        (lambda: metrics.next_token_accuracy(-1, 2), "-1 of 2 tokens cannot be right"),
        (lambda: metrics.perplexity(1.0, -1), "count is -1; .* above 0"),
        (lambda: metrics.perplexity(-1.0, 1), "cannot be -1.0; give minus the log-likelihood"),
        (lambda: metrics.bits_per_byte(1.0, math.nan), "num_bytes is nan; .* above 0"),
        (lambda: metrics.bits_per_byte(-1.0, 1), "cannot be -1.0; give minus the log-likelihood"),
    ],
)
def test_bad_sums_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_metrics_need_only_numpy():
    code = (
        "import sys\n"
        "for name in ('jax', 'tensorflow', 'seqio', 'rouge_score', 'nltk', 'sklearn', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "from famx.data import metrics\n"
        "print(metrics.rouge(['a b'], ['a b'])['rougeL'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "100.0\n"), result.stderr
