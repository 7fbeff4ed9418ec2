"""All generated probes: rows are pure and of exact length; weights, batches, texts, errors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import ByteVocabulary, PasskeyTask
from famx.data.probes import PROBES, NeedleProbe, Probe
from famx.data.probes.fitting import largest
from famx.data.probes.haystacks import (
    cyclic_end,
    encode_units,
    insert,
    nearest_places,
    noise_units,
    real_text_units,
)
from famx.data.probes.python_docs import python_docs_sentences

NAMES = [name for name in PROBES if not name.startswith("passkey")]
LONGEST_UNIT = 1 + max(len(s) for split in (False, True) for s in python_docs_sentences(split))
IN_BYTES = [name for name in NAMES if name.startswith(("ruler", "babilong"))]


class PairVocabulary:
    """Two letters are one token: neither bytes nor words."""

    pad_id, bos_id, eos_id, unk_id, vocab_size = 0, 1, 2, None, 3 + 2**14 + 2**28

    def encode(self, text):
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        single, both = 3, 3 + 2**14
        return [single + ord(p) if len(p) == 1 else both + 2**14 * ord(p[0]) + ord(p[1]) for p in pairs]

    def decode(self, ids):
        letters = [divmod(i - 3 - 2**14, 2**14) if i >= 3 + 2**14 else (i - 3,) for i in ids]
        return "".join(chr(letter) for pair in letters for letter in pair)

    def __eq__(self, other):
        return isinstance(other, PairVocabulary)

    def __hash__(self):
        return 0


def length_of(probe, extra):
    """A length that the probe takes: probes of blocks want room in the last block."""
    size = getattr(probe, "block_size", 1) or 1
    return -(-(probe.min_length + extra) // size) * size


def check_row(probe, row, length):
    vocab, start = probe.vocab, row["answer_start"]
    assert (row["tokens"].shape, row["tokens"].dtype) == ((length,), np.int32)
    assert (row["weights"].shape, row["weights"].dtype) == ((length,), np.float32)
    expected = np.zeros(length, np.float32)
    expected[start:] = probe.answer_weight
    np.testing.assert_array_equal(row["weights"], expected)
    np.testing.assert_array_equal(row["answer"], row["tokens"][start:])
    assert 0 < len(row["answer"]) <= probe.answer_width
    assert row["inputs"] == vocab.decode(row["tokens"][:start])
    answer = vocab.decode(row["answer"])
    assert all(isinstance(r, str) and r in answer for r in row["references"])
    assert len(set(row["references"])) == len(row["references"]) > 0
    assert row["tokens"].min() > vocab.eos_id  # no padding, no bos, no eos


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(0, 3000), st.integers(0, 3),
    st.sampled_from(["train", "eval"]),
)  # fmt: skip
def test_any_row_of_any_probe(name, index, extra, seed, split):
    probe = PROBES[name](seed=seed, split=split, answer_weight=0.5)
    length = length_of(probe, extra)
    row = probe.example(index, length)
    check_row(probe, row, length)
    again = PROBES[name](seed=seed, split=split).example(index, length)
    np.testing.assert_array_equal(row["tokens"], again["tokens"])
    assert (row["references"], row["positions"]) == (again["references"], again["positions"])
    for reference in row["references"]:
        assert reference in row["inputs"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(PROBES)), st.integers(0, 10**6), st.integers(0, 300), st.integers(1, 90))
def test_a_padded_row_is_a_shorter_row_and_padding(name, index, extra, padding):
    probe = PROBES[name](text_weight=0.1)
    length = length_of(probe, extra)
    row = dataclasses.replace(probe, padding=padding).example(index, length)
    kept = length - np.argmin(row["tokens"][::-1] == probe.vocab.pad_id)
    assert length - kept <= padding and row["answer_start"] + len(row["answer"]) == kept
    assert not row["weights"][kept:].any() and (row["tokens"][kept:] == probe.vocab.pad_id).all()
    shorter = probe.example(index, kept)
    assert set(shorter) == set(row)
    for part, wanted in shorter.items():
        found = row[part][:kept] if part in ("tokens", "weights") else row[part]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_any_number_up_to_the_largest(name):
    probe = PROBES[name](padding=3)
    length = length_of(probe, 300)
    rows = [probe.example(i, length) for i in range(60)]
    ends = [row["answer_start"] + len(row["answer"]) for row in rows]
    assert set(ends) == {length - 3, length - 2, length - 1, length}
    batch = probe.batch(range(60), length)
    for i, (row, end) in enumerate(zip(rows, ends)):
        assert batch["answer"][i, : len(row["answer"])].tolist() == row["answer"].tolist()
        assert (batch["answer"][i, len(row["answer"]) :] == probe.vocab.pad_id).all()
        assert not batch["decoder_loss_weights"][i, end:].any()


def test_padding_takes_what_there_is_room_for():
    shortest = PasskeyTask(padding=40)
    assert shortest.example(0, shortest.min_length)["answer_start"] == shortest.min_length - 5
    recall = PROBES["associative_recall"](padding=1000, block_size=64)
    for index in range(50):
        start = recall.example(index, 256)["answer_start"]
        assert 192 < start - len(recall.vocab.encode("recall")) < 256


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(IN_BYTES), st.integers(0, 10**6), st.integers(0, 2000))
def test_a_prompt_in_bytes_is_the_same_as_text(name, index, extra):
    probe = PROBES[name]()
    row = probe.example(index, probe.min_length + extra)
    assert probe.vocab.encode(row["inputs"]) == row["tokens"][: row["answer_start"]].tolist()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(IN_BYTES), st.integers(0, 10**6), st.integers(0, 1500))
def test_another_vocabulary_makes_rows_of_exact_length_too(name, index, extra):
    probe = PROBES[name](vocabulary=PairVocabulary())
    length = probe.min_length + extra
    row = probe.example(index, length)
    check_row(probe, row, length)
    assert row["references"] == PROBES[name]().example(index, length + 4000)["references"]
    assert all(reference in row["inputs"] for reference in row["references"])


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_seed_split_and_index_differ(name):
    def prompts(**options):
        probe = PROBES[name](**options)
        return {probe.example(i, length_of(probe, 200))["inputs"] for i in range(15)}

    streams = [prompts(), prompts(split="eval"), prompts(seed=1), prompts(seed=1, split="eval")]
    assert len(set.union(*streams)) == 60


def test_needles_of_training_and_evaluation_are_disjoint():
    def keys(split):
        probe = NeedleProbe(keys="uuids", split=split)
        return {probe.example(i, 600)["references"][0] for i in range(200)}

    assert len(keys("train") | keys("eval")) == 400


@pytest.mark.parametrize("name", NAMES)
def test_min_length_holds_every_example_and_less_gets_a_sentence(name):
    for options in ({}, {"vocabulary": PairVocabulary()} if name in IN_BYTES else {"block_size": 64}):
        probe = PROBES[name](**options)
        for index in range(40):
            probe.example(index, probe.min_length)
        with pytest.raises(ValueError, match=f"at least {probe.min_length} tokens, but the length"):
            probe.example(0, probe.min_length - 1)


def test_min_length_in_bytes_is_tight_where_all_examples_have_one_length():
    for name in ("ruler_niah_multikey_3", "ruler_vt"):
        probe = PROBES[name]()
        assert probe.example(0, probe.min_length)["filler_tokens"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_its_rows_shifted(name):
    probe = PROBES[name]()
    length = length_of(probe, 100)
    batch = probe.batch([5, 2, 9], length)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "decoder_input_tokens": ((3, length), "int32"),
        "decoder_target_tokens": ((3, length), "int32"),
        "decoder_loss_weights": ((3, length), "float32"),
        "answer": ((3, probe.answer_width), "int32"),
        "answer_start": ((3,), "int32"),
    }
    for b, index in enumerate([5, 2, 9]):
        row = probe.example(index, length)
        np.testing.assert_array_equal(batch["decoder_target_tokens"][b], row["tokens"])
        np.testing.assert_array_equal(batch["decoder_loss_weights"][b], row["weights"])
        answer, size = batch["answer"][b], len(row["answer"])
        np.testing.assert_array_equal(answer[:size], row["answer"])
        assert (answer[size:] == probe.vocab.pad_id).all()
        assert batch["answer_start"][b] == row["answer_start"]
    np.testing.assert_array_equal(batch["decoder_input_tokens"][:, 0], [probe.vocab.bos_id] * 3)
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], batch["decoder_target_tokens"][:, :-1])


def test_every_probe_has_a_prompt_passkey_included():
    for name, factory in PROBES.items():
        probe = factory()
        length = length_of(probe, 200)
        texts = probe.prompt(3, length)
        assert all(reference in texts["inputs"] for reference in texts["references"]), name
        if isinstance(probe, PasskeyTask):
            assert texts["references"][0].isdigit()
            assert texts["inputs"].rstrip().endswith("The pass key is")
        assert isinstance(probe, Probe)
        row = probe.example(3, length)
        assert texts["references"] == row["references"]
        if name not in IN_BYTES:
            assert texts == dict(inputs=row["inputs"], references=row["references"])
        # A right answer is one that the row is trained on.
        answer = probe.vocab.decode(row["answer"])
        assert list(probe.score([texts], [answer]).values()) == [100.0], name
        assert list(probe.score([texts], ["nothing"]).values()) == [0.0], name


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(IN_BYTES), st.integers(0, 10**6), st.integers(0, 3000), st.integers(0, 200),
    st.booleans(),
)  # fmt: skip
def test_a_prompt_is_the_largest_that_fits(name, index, extra, room, pairs):
    probe = PROBES[name](**({"vocabulary": PairVocabulary()} if pairs else {}))
    length = probe.min_length + extra + room
    prompt = probe.prompt(index, length, room)
    size = 1 + len(probe.vocab.encode(prompt["inputs"])) + room
    assert size <= length
    if "sentences" in prompt:  # one more would not have fitted
        longest = {"noise": 90, "needles": 120}.get(probe.haystack, LONGEST_UNIT)
        assert length - size < longest
        more = probe.prompt(index, length + longest, room)
        assert more["sentences"] > prompt["sentences"] and more["references"] == prompt["references"]
    assert sorted(prompt["references"]) == sorted(probe.example(index, length)["references"])


def test_a_prompt_that_does_not_fit_gets_a_sentence():
    with pytest.raises(ValueError, match="into 300 tokens, of which 128 are for the answer"):
        PROBES["ruler_niah_single_1"]().prompt(0, 300, 128)
    with pytest.raises(ValueError, match="does not fit into 1000 tokens"):
        PROBES["ruler_cwe"]().prompt(0, 1000)
    with pytest.raises(ValueError, match="numbered from 0"):
        PROBES["ruler_niah_single_1"]().prompt(-1, 3000)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(0, 900), st.integers(0, 40))
def test_largest_finds_what_a_search_one_by_one_finds(steps, room, low):
    sizes = np.cumsum(steps)
    high = len(sizes) - 1
    low = min(low, high)
    fitting = [n for n in range(low, high + 1) if sizes[n] <= room]
    asked = []
    found = largest(lambda n: asked.append(n) or int(sizes[n]), room, low, high)
    assert found == max(fitting, default=None) and all(low <= n <= high for n in asked)
    assert len(asked) < 60


def test_examples_of_all_probes_have_one_shape():
    shape = {"tokens", "weights", "answer", "answer_start", "positions", "inputs", "references"}
    for name, factory in PROBES.items():
        probe = factory()
        row = probe.example(3, length_of(probe, 100))
        assert row.keys() >= shape, name
        assert all(0 <= start < row["answer_start"] for start in row["positions"])


@given(
    st.lists(st.integers(0, 60), min_size=1), st.lists(st.floats(0, 60, width=16), min_size=1)
)
def test_nearest_places_are_the_nearest(places, wanted):
    places = np.unique(places)
    found = nearest_places(places, np.array(wanted))
    for place, want in zip(found, wanted):
        assert place in places and abs(place - want) == min(abs(p - want) for p in places)


@given(st.lists(st.integers(0, 20), max_size=5), st.data())
def test_insert_keeps_the_filler_and_tells_the_starts(before, data):
    before = sorted(before)
    hidden = [
        np.full(data.draw(st.integers(1, 4)), 100 + i, np.int32) for i in range(len(before))
    ]
    filler = np.arange(20, dtype=np.int32)
    row, starts = insert(filler, before, hidden)
    np.testing.assert_array_equal(row[row < 100], filler)
    for place, text, start in zip(before, hidden, starts):
        np.testing.assert_array_equal(row[start : start + len(text)], text)
        assert (row[:start] < 100).sum() == place


@settings(deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(0, 40),
    st.data(),
)
def test_a_haystack_is_the_end_of_its_units_read_round_and_round(texts, count, data):
    vocab = ByteVocabulary()
    end = data.draw(st.integers(0, len(texts) - 1))
    units = encode_units(vocab, texts, "|")
    tokens, places = cyclic_end(units, end, count, np.array(vocab.encode("#"), np.int32))
    around = ["|" + text for text in [*texts * 41, *texts[:end]]]
    expected = "".join(around)
    cut = expected[len(expected) - count :]
    whole = count == 0 or cut[0] == "|"
    assert vocab.decode(tokens) == (cut if whole else "#" + cut[1:])
    assert places.tolist() == sorted({0, count, *(i for i, c in enumerate(cut) if c == "|")})


def test_real_text_is_pythons_documentation_and_evaluation_has_its_own_part():
    from pydoc_data.topics import topics

    docs = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(docs) * 4 // 5
    for evaluation, part in ((False, docs[:cut]), (True, docs[cut:])):
        text = " ".join(part.decode("ascii", errors="ignore").split())
        sentences = python_docs_sentences(evaluation)
        assert len(sentences) > 500 and all(s in text for s in sentences)
        assert sum(map(len, sentences)) > 0.8 * len(text)
        all_of_it = " ".join(sentences) + " "
        probe = PROBES["ruler_niah_single_2"](split="eval" if evaluation else "train")
        for index in range(5):
            row = probe.example(index, 5000)
            context = row["inputs"].split("\n")[1]
            filler = context.split("One of the special magic numbers for ")
            assert filler[0].lstrip()[1:] in 2 * all_of_it  # the first letter may be cut
            after = filler[1].split(". ", 1)
            assert len(after) == 1 or after[1] in 2 * all_of_it


def test_units_are_encoded_once_for_equal_vocabularies():
    assert noise_units(ByteVocabulary(), "\n") is noise_units(ByteVocabulary(), "\n")
    assert real_text_units(ByteVocabulary(), " ", True) is real_text_units(ByteVocabulary(), " ", True)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_may_be_learnt_too(name):
    probe, with_text = PROBES[name](), PROBES[name](text_weight=0.25)
    length = length_of(probe, 40)
    plain, row = (p.example(3, length) for p in (probe, with_text))
    start = row["answer_start"]
    np.testing.assert_array_equal(row["tokens"], plain["tokens"])
    np.testing.assert_array_equal(row["weights"][start:], plain["weights"][start:])
    np.testing.assert_array_equal(row["weights"][:start], np.maximum(plain["weights"][:start], 0.25))


def test_probes_are_values():
    for name in NAMES:
        probe = PROBES[name]()
        assert probe == PROBES[name]() != dataclasses.replace(probe, seed=1)
        assert hash(probe) == hash(PROBES[name]())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(vocabulary="letters"), "is not a vocabulary, and no such path exists; choose"),
        (dict(split="test"), "split must be one of 'train', 'eval'"),
        (dict(seed=-1), "at least 0"),
        (dict(answer_weight=-0.5), "answer_weight must be a number of at least 0, not -0.5"),
        (dict(text_weight=-0.5), "text_weight must be a number of at least 0, not -0.5"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_options_get_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PROBES[name](**options)


def test_a_vocabulary_without_bos_gets_a_sentence():
    vocabulary = PairVocabulary()
    vocabulary.bos_id = None
    with pytest.raises(ValueError, match="has no bos_id"):
        NeedleProbe(vocabulary=vocabulary)


def test_bad_arguments_get_a_sentence():
    probe = PROBES["ruler_niah_single_1"]()
    with pytest.raises(ValueError, match="numbered from 0"):
        probe.example(-1, 1000)
    with pytest.raises(ValueError, match="at least one index"):
        probe.batch([], 1000)


@pytest.mark.parametrize("name", IN_BYTES)
def test_a_vocabulary_that_cannot_spell_the_texts_is_refused(name):
    vocabulary = PROBES["copy_at_distance"]().vocab
    with pytest.raises(ValueError, match="The vocabulary cannot spell"):
        PROBES[name](vocabulary=vocabulary)
