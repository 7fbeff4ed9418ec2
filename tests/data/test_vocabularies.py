"""Vocabularies: round trips, special ids that nothing else shares, files beside checkpoints."""

import io
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, WordVocabulary
from famx.data.probes.passkey_text import FILLER_WORDS, HEADER, QUESTION, STATEMENT, passkey_words
from famx.data.vocabularies import (
    KINDS,
    ByT5Vocabulary,
    fingerprint,
    load_vocabulary,
    open_vocabulary,
    save_vocabulary,
)


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


def small_sentencepiece(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat", "a dog ran"] * 20), model_writer=model,
        vocab_size=16, minloglevel=2)  # fmt: skip
    path.write_bytes(model.getvalue())
    return open_vocabulary(path, bos_id=16)


def small_byte_pair(path):
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cat sat"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<end>"], initial_alphabet=byte_level.alphabet(),
        show_progress=False))  # fmt: skip
    tokenizer.save(str(path))
    config = {"chat_template": "{{ text }}", "eos_token": "<end>"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return open_vocabulary(path)


MAKERS = {
    "bytes": lambda path: ByteVocabulary(),
    "byt5_bytes": lambda path: ByT5Vocabulary(extra_ids=4),
    "words": lambda path: WordVocabulary(["Käse", "is", "."]),
    "sentencepiece": small_sentencepiece,
    "byte_pair": small_byte_pair,
}


@pytest.fixture(params=MAKERS)
def saved(request, tmp_path):
    """(vocabulary, directory into which it was saved)."""
    vocabulary = MAKERS[request.param](tmp_path / "tokenizer.any")
    save_vocabulary(vocabulary, tmp_path / "new" / "saved")
    return vocabulary, tmp_path / "new" / "saved"


def test_every_kind_can_be_saved():
    assert MAKERS.keys() == KINDS.keys()


def test_a_saved_vocabulary_comes_back_equal(saved, tmp_path):
    vocabulary, directory = saved
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    again = load_vocabulary(directory)
    assert again == vocabulary and type(again) is type(vocabulary)
    assert fingerprint(again) == fingerprint(vocabulary) and hash(again) == hash(vocabulary)
    for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "unk_id", "chat_template"):
        assert getattr(again, name) == getattr(vocabulary, name)
    text = "the cat sat . Käse"
    assert again.encode(text) == vocabulary.encode(text)
    assert again.decode(again.encode(text)) == vocabulary.decode(vocabulary.encode(text))
    names = {path.name for path in directory.iterdir()}
    assert names == {"vocabulary.json", vocabulary.file_name} - {None}, "nothing else is left behind"


def test_a_directory_holds_the_vocabulary_saved_last(saved):
    vocabulary, directory = saved
    other = WordVocabulary(["other"])
    save_vocabulary(other, directory)
    assert load_vocabulary(directory) == other != vocabulary
    save_vocabulary(vocabulary, directory)
    assert load_vocabulary(directory) == vocabulary


def test_a_write_that_stops_leaves_the_saved_one(saved, monkeypatch):
    vocabulary, directory = saved

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_vocabulary(WordVocabulary(["other"]), directory)
    assert load_vocabulary(directory) == vocabulary and not list(directory.glob(".*"))


def test_fingerprints_tell_vocabularies_apart(tmp_path):
    vocabularies = [
        *(make(tmp_path / f"{kind}.file") for kind, make in MAKERS.items()),
        WordVocabulary(["is", "Käse", "."]),
        WordVocabulary([]),
        open_vocabulary(tmp_path / "sentencepiece.file"),
        open_vocabulary(tmp_path / "byte_pair.file", pad_id=0, eos_id=262),
    ]
    assert len({fingerprint(v) for v in vocabularies}) == len(set(vocabularies)) == len(vocabularies)
    assert all(len(bytes.fromhex(fingerprint(v))) == 32 for v in vocabularies)
    assert fingerprint(ByteVocabulary()) == fingerprint(ByteVocabulary()) and vocabularies[0] != 0


def test_missing_files_are_named(saved, tmp_path):
    vocabulary, directory = saved
    with pytest.raises(ConfigError, match="no vocabulary.json in .*name a directory"):
        load_vocabulary(tmp_path)
    if vocabulary.file_name:
        (directory / vocabulary.file_name).unlink()
        with pytest.raises(ConfigError, match=f"'{vocabulary.file_name}' .* is missing; copy it"):
            load_vocabulary(directory)


def test_every_altered_field_is_noticed(saved):
    """Except the chat template, which may be changed by hand."""
    vocabulary, directory = saved
    path = directory / "vocabulary.json"
    description = json.loads(path.read_text())
    for name, value in description.items():
        if name == "chat_template":
            continue
        for new in (7, "x", ["x", "x"], None):
            if new == value:
                continue
            path.write_text(json.dumps({**description, name: new}))
            if name == "file" and vocabulary.file_name is None:
                if new is None or isinstance(new, str):
                    assert load_vocabulary(directory) == vocabulary  # names nothing that is read
                    continue
            with pytest.raises(ConfigError):
                load_vocabulary(directory)
        path.write_text(json.dumps({k: v for k, v in description.items() if k != name}))
        with pytest.raises(ConfigError):
            load_vocabulary(directory)
    path.write_text(json.dumps({**description, "kind": "letters"}))
    with pytest.raises(ConfigError, match="kind 'letters'; known here are bytes, words, "):
        load_vocabulary(directory)
    path.write_text(json.dumps({**description, "pad_id": 9}))
    with pytest.raises(ConfigError, match="is not as it was saved"):
        load_vocabulary(directory)
    for text in ("", "{", "[]", "1"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="vocabulary.json is damaged"):
            load_vocabulary(directory)


def test_an_altered_tokenizer_file_is_noticed(saved):
    vocabulary, directory = saved
    if vocabulary.file_name is None:
        pytest.skip(f"{vocabulary.kind} has no tokenizer file")
    path = pathlib.Path(directory / vocabulary.file_name)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="is not the file that was saved .* SHA-256 differs"):
        load_vocabulary(directory)
