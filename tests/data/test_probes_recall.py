"""Copy and associative recall: exact blocks of writing and reading, answers that a replay finds."""

import functools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pretrained import TOKENIZERS, write_tokenizer

from famx.data import WordVocabulary
from famx.data.probes import CopyProbe, RecallProbe
from famx.data.probes.passkey_text import FILLER_WORDS, passkey_words
from famx.data.probes.recall import KEYS, SYMBOLS, joined_words, recall_words


def words_of(probe, row):
    """The row as a list of words, one per token."""
    return [probe.vocab.words[t - probe.vocab.num_special_ids] for t in row["tokens"].tolist()]


def writings(words):
    """(start, words between) of everything from a `remember` to its full stop."""
    starts = [i for i, word in enumerate(words) if word == "remember"]
    return [(i, words[i + 1 : words.index(".", i)]) for i in starts]


def check_blocks(probe, row, length, size, distance):
    """The first writing and the answer are `distance` blocks apart, none is cut by a block's edge."""
    words = words_of(probe, row)
    written = writings(words)
    assert row["positions"] == [start for start, _ in written]
    last = (length - 1) // size
    for start, text in written:
        end = start + len(text) + 1  # the full stop; as inputs, all stands one later
        assert start // size == end // size == (end + 1) // size
    question = len(words) - 1 - words[::-1].index("recall")
    assert question // size == (length - 1) // size
    first = written[0][0] // size
    assert first == (0 if distance is None else last - distance)
    hidden = {i for start, text in written for i in range(start, start + len(text) + 2)}
    rest = [w for i, w in enumerate(words[:question]) if i not in hidden]
    assert set(rest) <= set(FILLER_WORDS)
    return words, written, question


lengths = st.tuples(st.integers(1, 6), st.none() | st.integers(1, 6), st.integers(0, 40))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), lengths, st.integers(0, 10**6), st.booleans())
def test_copy_is_read_the_distance_after_it_was_written(symbols, spare, lengths, index, repeated):
    more, distance, cut = lengths
    size = symbols + 3 + spare
    probe = CopyProbe(
        num_symbols=symbols, block_size=size, distance=distance,
        filler="repeated" if repeated else "random_words",
    )  # fmt: skip
    length = size * ((distance or 1) + more) - cut
    assume(length >= probe.min_length and (length - 1) % size + 1 >= symbols + 1)
    row = probe.example(index, length)
    words, [(_, written)], question = check_blocks(probe, row, length, size, distance)
    assert words[question + 1 :] == written and len(written) == symbols
    assert set(written) <= set(SYMBOLS)
    assert row["references"] == [" ".join(written)] and row["answer_start"] == length - symbols
    if repeated:
        assert len(set(words[:question]) & set(FILLER_WORDS)) <= 1


def pairs_of(text, joined, asked=False):
    """Keys with their letters of a statement or a question, whose words between are as they should be."""
    if joined and not asked:
        text = [part for word in text for part in word.split("=")]
    elif not joined:
        assert set(text[1::4]) == {"is"} and set(text[3::4]) <= {","}
        text = [word for word in text if word not in ("is", ",")]
    pairs = list(zip(text[::2], text[1::2], strict=True))
    assert {key for key, _ in pairs} <= set(KEYS) and {value for _, value in pairs} <= set(SYMBOLS)
    return pairs


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9), lengths,
    st.integers(0, 10**6), st.booleans(), st.integers(0, 5), st.integers(6, len(KEYS)),
)  # fmt: skip
def test_recall_answers_with_the_last_value_of_the_key(
    pairs, overwrite, spare, lengths, index, joined, questions, num_keys
):
    more, distance, cut = lengths
    assume(not (overwrite and distance == 1) and questions < pairs)
    size = 4 * pairs + 2 + spare
    probe = RecallProbe(
        num_pairs=pairs, overwrite=overwrite, block_size=size, distance=distance, joined=joined,
        more_questions=questions, num_keys=num_keys,
    )  # fmt: skip
    length = size * ((distance or 2) + more) - cut
    assume(length >= probe.min_length and (length - 1) % size + 1 >= 4 * (questions + 1))
    row = probe.example(index, length)
    words, written, question = check_blocks(probe, row, length, size, distance)
    values, again = {}, []
    for _, text in written:
        for key, value in pairs_of(text, joined):
            assert values.get(key) != value
            again += [key] if key in values else []
            values[key] = value
    first = [key for key, _ in pairs_of(written[0][1], joined)]
    assert set(first) <= set(KEYS[:num_keys])
    asked = pairs_of(words[question + 1 :], joined, asked=True)
    assert all(values[key] == value for key, value in asked) and len(values) == pairs
    assert len(dict(asked)) == len(asked) == questions + 1
    key, value = asked[-1]
    assert row["answer_start"] == length - 1 and words[-1] == value
    assert row["references"] == [value] and row["overwritten"] == (key in again)
    weighted = [words[i] for i in row["weights"].nonzero()[0]]
    assert weighted == [value for _, value in asked] and set(row["weights"]) <= {0, 1}
    assert len(written) == len(again) + 1 and len(again) in {0.0: [0], 0.5: [0, 1], 1.0: [1]}[overwrite]
    if again:  # strictly between the blocks of the pairs and of the question
        assert written[0][0] // size < written[1][0] // size < (length - 1) // size


def test_what_is_written_does_not_depend_on_length_distance_or_filler():
    for make in (CopyProbe, RecallProbe):
        base = make(block_size=32)
        for index in range(20):
            expected = base.example(index, 64)["references"]
            for probe, length in (
                (base, 320), (make(block_size=32, distance=3), 256), (make(filler="repeated"), 96),
            ):  # fmt: skip
                assert probe.example(index, length)["references"] == expected


def test_an_easier_form_of_recall_states_the_same_and_asks_for_the_same():
    for options in (dict(joined=True), dict(more_questions=3)):
        probe = RecallProbe(**options)
        for index in range(20):
            row, expected = probe.example(index, 96), RecallProbe().example(index, 96)
            assert row["references"] == expected["references"]
            said, right = (writings(words_of(probe, x))[0][1] for x in (row, expected))
            assert pairs_of(said, probe.joined) == pairs_of(right, False)


def test_a_joined_pair_is_one_token_and_the_question_has_key_and_letter():
    probe = RecallProbe(joined=True, more_questions=3, block_size=9)
    words = words_of(probe, probe.example(0, 18))
    statement, question = words[words.index("remember") :][:6], words[-9:]
    assert [word.count("=") for word in statement] == [0, 1, 1, 1, 1, 0]
    assert question[0] == "recall"
    asked = {f"{key}={letter}" for key, letter in zip(question[1::2], question[2::2])}
    assert asked == set(statement[1:5])


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 10**6), st.booleans(), st.integers(0, 3))
def test_spread_pairs_each_have_a_block_between_the_first_and_the_question(
    lengths, index, joined, questions
):
    more, distance, cut = lengths
    easier = dict(joined=joined, more_questions=questions, distance=distance)
    probe, together = (RecallProbe(spread=spread, **easier) for spread in (True, False))
    length = 32 * ((distance or 2) + more) - cut
    assume(length >= probe.min_length and (length - 1) % 32 + 1 >= 4 * (questions + 1))
    row, expected = (p.example(index, length) for p in (probe, together))
    words, last = words_of(probe, row), (length - 1) // 32
    written = writings(words)
    assert row["positions"] == [start for start, _ in written]
    blocks = [start // 32 for start, _ in written]
    assert blocks == sorted(set(blocks)) and blocks[-1] < last
    assert blocks[0] >= (0 if distance is None else last - distance)
    for block, (start, text) in zip(blocks, written):  # none is cut by a block's edge, also as inputs
        assert (start + len(text) + 2) // 32 == block
    pairs = [pair for _, text in written for pair in pairs_of(text, joined)]
    [(_, text)] = writings(words_of(together, expected))
    assert sorted(pairs) == sorted(pairs_of(text, joined))  # the same pairs, each once
    question = words[len(words) - words[::-1].index("recall") :]
    assert expected["references"] == row["references"]
    assert " ".join(question) == words_text(together, expected).rsplit("recall ", 1)[1]


def test_spread_pairs_are_everywhere_before_the_question():
    probe = RecallProbe(spread=True)
    rows = [probe.example(i, 32 * 5) for i in range(300)]
    counts = [len(row["positions"]) for row in rows]
    assert set(counts) == {1, 2, 3, 4}
    blocks = [start // 32 for row in rows for start in row["positions"]]
    assert all(0.2 < blocks.count(block) / len(blocks) < 0.3 for block in range(4))
    assert len({start % 32 for row in rows for start in row["positions"]}) > 10


def test_all_keys_are_asked_for_before_the_one_that_counts():
    probe = RecallProbe(more_questions=1)
    asked = [words_of(probe, probe.example(index, 96))[-7] for index in range(300)]
    assert set(asked) == set(KEYS) and max(map(asked.count, KEYS)) < 30


def test_places_within_the_block_vary_up_to_its_edges():
    probe = CopyProbe(num_symbols=2, block_size=8, distance=1)
    places = {probe.example(i, 24)["positions"][0] for i in range(200)}
    assert places == {8, 9, 10, 11}


def test_overwriting_hits_the_key_that_is_asked_for_in_half_of_the_rows():
    probe = RecallProbe(overwrite=1.0)
    rows = [probe.example(i, 128) for i in range(400)]
    assert 0.4 < sum(row["overwritten"] for row in rows) / 400 < 0.6
    assert all(r["overwritten"] for r in (RecallProbe(num_pairs=1, overwrite=1.0).example(i, 96)
                                          for i in range(20)))  # fmt: skip
    assert 0.15 < sum(
        len(RecallProbe(overwrite=0.25).example(i, 128)["positions"]) == 2 for i in range(400)
    ) / 400 < 0.35


def test_keys_and_answers_are_spread_evenly():
    rows = [RecallProbe().example(i, 96) for i in range(1000)]
    answers = [row["references"][0] for row in rows]
    assert set(answers) == set(SYMBOLS) and max(map(answers.count, SYMBOLS)) < 75
    asked = {row["inputs"].split()[-2] for row in rows}
    assert asked == set(KEYS)


def test_the_vocabulary_is_small_and_knows_every_word():
    assert recall_words().vocab_size < 128
    assert joined_words().vocab_size <= 768
    assert joined_words().words[: len(recall_words().words)] == recall_words().words
    assert not set(KEYS) & set(FILLER_WORDS) and not set(SYMBOLS) & set(FILLER_WORDS)
    larger = WordVocabulary([*recall_words().words, "more"])
    assert CopyProbe(vocabulary=larger).example(0, 64)["tokens"].max() < larger.vocab_size


@pytest.mark.parametrize(
    "make, options, sentence",
    [
        (CopyProbe, dict(num_symbols=0), "CopyProbe.num_symbols must be a whole number of at least 1"),
        (CopyProbe, dict(distance=0), "CopyProbe.distance must be a whole number of at least 1"),
        (CopyProbe, dict(filler="poem"), "CopyProbe.filler must be one of 'random_words', 'repeated'"),
        (CopyProbe, dict(block_size=10), "use a block_size of at least 11"),
        (CopyProbe, dict(vocabulary="bytes", num_symbols=12), "does not fit into a block of 32"),
        (CopyProbe, dict(vocabulary=passkey_words()), "cannot spell"),
        (RecallProbe, dict(num_pairs=0), "RecallProbe.num_pairs must be a whole number from 1 to 24,"),
        (RecallProbe, dict(num_pairs=99, block_size=999), "from 1 to 24, not 99"),
        (RecallProbe, dict(overwrite=1.5), "overwrite must be a number from 0 to 1"),
        (RecallProbe, dict(overwrite=0.5, distance=1), "set distance to 2"),
        (RecallProbe, dict(overwrite=0.5, spread=True), "overwrite needs all pairs in the first"),
        (RecallProbe, dict(num_keys=3), "num_pairs must be at most num_keys, which is 3, but it is 4"),
        (RecallProbe, dict(num_keys=25), "num_keys must be a whole number from 1 to 24, not 25"),
        (RecallProbe, dict(num_pairs=2, more_questions=2), "than num_pairs, which is 2, but it is 2"),
        (RecallProbe, dict(block_size=17), "use a block_size of at least 18"),
        (RecallProbe, dict(joined=True, block_size=6), "use a block_size of at least 7"),
        (RecallProbe, dict(joined=True, vocabulary=recall_words()), "cannot spell"),
    ],
)
def test_bad_options_get_a_sentence(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_a_row_whose_last_block_is_too_short_gets_a_sentence():
    with pytest.raises(ValueError, match="last block of a row of 70 tokens has 6.*multiple of"):
        CopyProbe(block_size=32).example(0, 70)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("make", [
    CopyProbe, functools.partial(RecallProbe, overwrite=0.5),
    functools.partial(RecallProbe, joined=True, more_questions=2),
])  # fmt: skip
def test_a_tokenizer_spells_the_same_words(tmp_path, name, make):
    """However many tokens a word is, writing and question are whole and each within its block."""
    probe = make(vocabulary=write_tokenizer(tmp_path, name), block_size=100)
    words = make(block_size=100)
    for index in range(10):
        row, expected = (p.example(index, 500) for p in (probe, words))
        assert row["references"] == expected["references"]
        text = probe.vocab.decode(row["tokens"])
        said, right = (re.findall(r"remember .*? \.", t) for t in (text, words_text(words, expected)))
        assert said == right and len(said) == len(row["positions"])
        assert text.endswith(f"{expected['inputs'][expected['inputs'].rindex('recall'):]} "
                             f"{row['references'][0]}")  # fmt: skip
        assert probe.vocab.decode(row["answer"]).strip() == row["references"][0]
        for start, writing in zip(row["positions"], said):
            behind = probe.vocab.decode(row["tokens"][start : start // 100 * 100 + 99]).lstrip()
            assert behind.startswith(writing)
        assert probe.vocab.decode(row["tokens"][400:]).endswith(text[text.rindex(" recall") :])
        assert len(row["answer"]) <= probe.answer_width


def words_text(probe, row):
    """The row's words with a space between any two, as the probe writes them."""
    return " ".join(words_of(probe, row))
