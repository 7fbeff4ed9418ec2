"""Vocabularies: round trips, and special ids that nothing else shares."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import ByteVocabulary, WordVocabulary
from famx.data.passkey_text import FILLER_WORDS, HEADER, QUESTION, STATEMENT, passkey_words


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=50))
def test_bytes_round_trip_and_never_use_special_ids(data):
    vocab = ByteVocabulary()
    ids = vocab.encode(data)
    assert len(ids) == len(data) and all(3 <= i < vocab.vocab_size == 259 for i in ids)
    assert vocab.decode_bytes([vocab.bos_id, *ids, vocab.eos_id, vocab.pad_id]) == data


def test_byte_text():
    vocab = ByteVocabulary()
    assert vocab.decode(vocab.encode("Käse ✓")) == "Käse ✓"
    assert vocab.decode(vocab.encode(b"a\xff")) == "a\ufffd"
    assert vocab.unk_id is None and (vocab.pad_id, vocab.bos_id, vocab.eos_id) == (0, 1, 2)


def test_words_split_digits_and_punctuation():
    vocab = WordVocabulary(["0", "1", ".", "?", "key", "is"])
    assert vocab.encode("key is 10. what? 1") == [8, 9, 5, 4, 6, 3, 7, 5]
    assert vocab.decode([1, 8, 9, 5, 4, 6, 3, 7, 5, 2, 0]) == "key is 10. <unk>? 1"
    assert (vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.unk_id) == (0, 1, 2, 3)
    assert vocab.vocab_size == 10


@pytest.mark.parametrize("words", [["a", "b", "a"], ["two words"], ["12"], ["end."], [""]])
def test_word_list_must_be_single_tokens_once_each(words):
    with pytest.raises(ValueError):
        WordVocabulary(words)


@pytest.mark.parametrize("vocab", [ByteVocabulary(), passkey_words()])
@pytest.mark.parametrize("bad", [-1, 1000])
def test_ids_outside_are_refused(vocab, bad):
    with pytest.raises(ValueError, match="not in this vocabulary"):
        vocab.decode([bad])


def test_passkey_words_know_all_texts_and_filler_stays_apart():
    vocab = passkey_words()
    assert vocab.vocab_size < 128
    text = " ".join([HEADER, STATEMENT[0], "01234" + STATEMENT[1], "56789", STATEMENT[2], QUESTION])
    assert vocab.unk_id not in vocab.encode(text)
    assert vocab.decode(vocab.encode(text)) == text
    assert not set(vocab.encode(" ".join(FILLER_WORDS))) & set(vocab.encode(text))
    assert len(set(FILLER_WORDS)) == len(FILLER_WORDS) >= 39
