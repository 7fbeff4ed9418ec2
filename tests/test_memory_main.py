"""`famx.memory`: files of any length read piece by piece, and the program as a user runs it."""

import functools
import io
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_close, assert_identical, make_model, make_params
from trained import write_model_dir

from famx import memory
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.data.probes.passkey_text import passkey_words
from famx.data.vocabularies import open_vocabulary
from famx.decoding import Streamer
from famx.inference import conversation as module
from famx.inference import memorize
from famx.inference.conversation import Conversation
from famx.inference.memorize import describe, make_memory
from famx.inference.reading import ReadProgress, encode_file
from famx.model_dir.loading import TrainedModel, load_model
from famx.model_dir.memory_file import load_memory, read_header, restore_memory

MODEL = make_model()
PARAMS = make_params(MODEL.module)
shared_streamer = functools.cache(Streamer)


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Conversations share one reader, so that each program is compiled once."""
    monkeypatch.setattr(module, "Streamer", shared_streamer)


def make_trained(vocabulary) -> TrainedModel:
    model = make_model(vocabulary=vocabulary)
    return TrainedModel(model, PARAMS, 1, pathlib.Path("/model/checkpoint_1"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model_dir(tmp_path_factory.mktemp("model"), MODEL, PARAMS, ByteVocabulary())


# ---------------------------------------------------------------- files in pieces


def pieces(path, vocabulary, size):
    found = list(encode_file(str(path), vocabulary, size))
    assert [done for done, _ in found] == sorted(done for done, _ in found)
    assert found[-1][0] == path.stat().st_size
    return [ids for _, ids in found]


def joined(path, vocabulary, size):
    return list(itertools.chain(*pieces(path, vocabulary, size)))


class Characters:
    """A vocabulary with an id per character, which shows what was encoded."""

    def encode(self, text):
        return [ord(character) for character in text]


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    text = ["the cat sat.\n\n  on the mat\n", "a dog, and  another\tdog\n"] * 20
    tokenizer.train_from_iterator(text, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return open_vocabulary(path)


words = st.lists(
    st.tuples(
        st.sampled_from(["the", "cat", "pass", "key", "12", "is.", "ä", "梦", "dog,"]),
        st.sampled_from([" ", "\n"]),
        st.sampled_from(["the", "sat.", "?", "7", "mat", "\u0301"]),
        st.sampled_from([" ", "\n", "\n\n", "  ", "\r\n", "\n\n  ", " \t", "\n \n"]),
    ),
    max_size=40,
).map(lambda parts: "".join(itertools.chain(*parts)))


@settings(max_examples=50)
@given(text=words, size=st.integers(40, 300))
def test_words_and_byte_pairs_are_encoded_as_at_once(tmp_path_factory, byte_pairs, text, size):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    for vocabulary in (passkey_words(), byte_pairs):
        assert joined(path, vocabulary, size) == vocabulary.encode(text)


@settings(max_examples=50)
@given(data=st.binary(max_size=200), size=st.integers(1, 50))
def test_bytes_are_taken_as_they_are(tmp_path_factory, data, size):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(data)
    assert joined(path, ByteVocabulary(), size) == ByteVocabulary().encode(data)


@settings(max_examples=50)
@given(data=st.binary(max_size=100) | st.text(max_size=100).map(str.encode), size=st.integers(1, 50))
def test_no_character_is_lost_or_cut(tmp_path_factory, data, size):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(data)
    try:
        text = data.decode("utf-8-sig")
        assert not data.startswith((b"\xff\xfe", b"\xfe\xff"))
    except UnicodeDecodeError as error:
        with pytest.raises(ConfigError, match=f"is not UTF-8 at byte {error.start}:|is encoded in UTF-"):
            joined(path, Characters(), size)
    else:
        assert "".join(map(chr, joined(path, Characters(), size))) == text


def test_pieces_stay_small_whatever_the_lines(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("x" * 5000, "line\n" * 700, "word " * 1000, "\n" * 5000, "x" * 150 + "\n" + "y" * 4000):
        path.write_text(text)
        assert max(map(len, pieces(path, Characters(), 100))) <= 200


def test_a_piece_ends_where_a_line_begins(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("One line here.\nAnother one there.\n\n  And a third one, longer than those.")
    found = ["".join(map(chr, ids)) for ids in pieces(path, Characters(), 30)]
    assert found[0] == "One line here.\n" and found[1].startswith("Another one there.\n\n  And")
    assert all(piece.startswith(" ") for piece in found[2:])


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("size, blocks", [(7, 1), (100, 2), (1 << 16, 64)])
def test_a_file_is_read_as_if_at_once(tmp_path, monkeypatch, size, blocks):
    monkeypatch.setattr(module, "encode_file", functools.partial(encode_file, size=size))
    monkeypatch.setattr(module, "_FILE_BLOCKS", blocks)
    texts = ["A first text of some length. " * 12, "x", "And another one. " * 9]
    conversation, reports = Conversation(make_trained(ByteVocabulary())), []
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.txt"
        path.write_text(text)
        count = conversation.read_file(str(path), lambda *report: reports.append(report))
        assert count == len(text) + (i == 0)  # begin of text once
        assert reports[-1][0] == len(text) and reports[-1][1] <= count
    ids = [1, *ByteVocabulary().encode("".join(texts))]
    streamer = shared_streamer(MODEL.module)
    logits, state = streamer.read(PARAMS, streamer.initial_state(PARAMS, 1), np.array([ids], np.int32))
    assert_close((conversation._logits, conversation._state), (logits, state), 1e-4)
    assert conversation.tokens == len(ids) and conversation.sources == ["0.txt", "1.txt", "2.txt"]


def test_the_state_keeps_its_size(tmp_path):
    conversation, sizes = Conversation(make_trained(ByteVocabulary())), set()
    for count in (10, 1000, 30_000):
        (tmp_path / "x.txt").write_text("x" * count)
        conversation.read_file(str(tmp_path / "x.txt"))
        conversation.save(str(tmp_path / "x.famem"), overwrite=True)
        sizes.add(conversation.num_bytes)
    assert len(sizes) == 1 and conversation.updates == conversation.tokens // 8


def test_memories_are_built_upon(directory, tmp_path, capsys):
    texts = ["The first book. " * 20, "The second book! " * 20]
    for name, text in zip("ab", texts):
        (tmp_path / name).write_text(text)
    a, b, ab, out = (str(tmp_path / name) for name in ("a", "b", "ab.famem", "out.famem"))
    make_memory(directory, [a, b], ab)
    make_memory(directory, [a], out)
    make_memory(directory, [b], out, memory=out)  # replaces the file that it resumes from
    trained = load_model(directory)
    assert_close(restore_memory(out, trained), restore_memory(ab, trained), 1e-4)
    assert read_header(ab).sources == read_header(out).sources == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{a}: 321 tokens", f"{b}: 340 tokens"]
    size = load_memory(ab, trained).num_bytes()
    assert lines[2].startswith(
        f"{ab}: 661 tokens read, 82 memory updates, {size:,} bytes of state, "
    ) and lines[2].endswith(" tokens/s")
    assert lines[5:] == [lines[5]] + [lines[6]] and lines[6].startswith(f"{out}: 661 tokens read, 82 ")


def test_what_a_memory_says_about_itself(directory, tmp_path):
    (tmp_path / "book.txt").write_text("Once upon a time. " * 500)
    make_memory(directory, [str(tmp_path / "book.txt")], str(tmp_path / "x.famem"))
    lines = describe(str(tmp_path / "x.famem")).splitlines()
    header = read_header(tmp_path / "x.famem")
    assert lines[0] == str(tmp_path / "x.famem")
    assert lines[1:5] == [
        "  texts: book.txt",
        "  tokens read: 9,001",
        "  memory updates: 1,125",
        f"  state: {header.num_bytes:,} bytes",
    ]
    assert f"  vocabulary: {ByteVocabulary().fingerprint}" in lines and "  embed_dim: 16" in lines


# ---------------------------------------------------------------- progress


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    class Terminal(io.StringIO):
        isatty = staticmethod(lambda: True)

    (tmp_path / "book.txt").write_text("x" * 1000)
    stream = Terminal()
    with ReadProgress(str(tmp_path / "book.txt"), stream) as progress:
        progress._bar.mininterval = 0
        progress(500, 400)
    assert "book.txt:  50%" in stream.getvalue() and "400 tokens" in stream.getvalue()


def test_progress_elsewhere_is_a_line_now_and_then(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("x" * 1000)
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("famx.base.progress._monotonic", lambda: now[0])
    with ReadProgress(str(tmp_path / "book.txt"), stream) as progress:
        for i in range(1, 31):
            now[0] = float(i)
            progress(10 * i, 20 * i)
    assert stream.getvalue().splitlines() == [
        f"book.txt: {i * 10} bytes ({i}%), {i * 20} tokens, 20 tokens/s" for i in (10, 20, 30)
    ]


# ---------------------------------------------------------------- bad input


def test_what_is_wrong_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(memorize, "load_with_vocabulary", _never)
    text, old, link = (tmp_path / name for name in ("x.txt", "old.famem", "link.famem"))
    text.write_text("text")
    old.write_text("not a memory")
    link.symlink_to(text)
    out = str(tmp_path / "out.famem")
    x = str(text)
    cases = [
        (([], out), "There is nothing to read: add --read=FILE."),
        (([x], None), "There is nowhere to write to: add --out=FILE.famem."),
        (([x, "/no/such"], out), "There is no file /no/such."),
        (([str(tmp_path)], out), f"{tmp_path} is not a file that can be read."),
        (([x], str(tmp_path)), f"{tmp_path} cannot be written: "),
        (([x], "/no/such/x"), "/no/such/x cannot be written: /no/such must be a folder where you"),
        (([x], x, None, True), f"{x} is itself one of the texts to read"),
        (([x], str(link), None, True), f"{link} is itself one of the texts to read"),
        (([x], str(old)), f"{old} exists: choose another name, or add --overwrite."),
        (([x], out, str(old)), f"{old} is not a whole memory file"),
        (([x], out, "/no/such"), "There is no memory file /no/such."),
    ]
    for arguments, sentence in cases:
        with pytest.raises(ConfigError) as caught:
            make_memory("/model", *arguments)
        assert str(caught.value).startswith(sentence)
    assert sorted(os.listdir(tmp_path)) == ["link.famem", "old.famem", "x.txt"]
    assert old.read_text() == "not a memory"


def _never(*args):
    raise AssertionError("the model was loaded in spite of bad input")


def test_a_text_without_text_leaves_the_old_memory(directory, tmp_path):
    good, empty, out = (str(tmp_path / name) for name in ("good", "empty", "x.famem"))
    pathlib.Path(good).write_text("text")
    pathlib.Path(empty).write_text("")
    make_memory(directory, [good], out)
    before = pathlib.Path(out).read_bytes()
    with pytest.raises(ConfigError, match="empty contains no text."):
        make_memory(directory, [good, empty], out, overwrite=True)
    assert pathlib.Path(out).read_bytes() == before
    make_memory(directory, [good, good], out, overwrite=True)
    assert read_header(out).position == [9]


def test_a_memory_of_many_texts_cannot_be_built_upon(directory, tmp_path):
    trained = load_model(directory)
    streamer = shared_streamer(MODEL.module)
    logits, state = streamer.read(
        PARAMS, streamer.initial_state(PARAMS, 2), np.full((2, 3), 5, np.int32)
    )
    module.save_memory(tmp_path / "two.famem", trained, logits, state)
    assert_identical(load_memory(tmp_path / "two.famem", trained), state)
    (tmp_path / "x").write_text("text")
    with pytest.raises(ConfigError, match="two.famem holds 2 memories"):
        make_memory(
            directory, [str(tmp_path / "x")], str(tmp_path / "y"), str(tmp_path / "two.famem")
        )


# ---------------------------------------------------------------- the program


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "famx.memory", *args],
        cwd=gin_utils.gin_root(), capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_program(directory, tmp_path):
    (tmp_path / "a.txt").write_text("The grass is green. " * 50)
    (tmp_path / "b.txt").write_text("The sky is blue. ")
    out = tmp_path / "x.famem"
    texts = (f"--read={tmp_path / 'a.txt'}", "--read", str(tmp_path / "b.txt"))
    result = run("--checkpoint", directory, *texts, "--out", str(out))
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert f"{out}: 1,018 tokens read, 127 memory updates, " in result.stdout
    before = out.read_bytes()
    again = run("--checkpoint", directory, *texts, "--out", str(out))
    assert again.returncode == 2 and again.stderr.splitlines()[-1] == (
        f"famx: error: {out} exists: choose another name, or add --overwrite."
    )
    assert out.read_bytes() == before


def test_show_and_stray_arguments(directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("The grass is green. ")
    make_memory(directory, [str(tmp_path / "a.txt")], str(tmp_path / "x.famem"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["memory", f"--show={tmp_path / 'x.famem'}"])
    with pytest.raises(SystemExit) as caught:
        gin_utils.run(memory.main, memory.define_flags, gin_flags=False)
    assert not caught.value.code and "  tokens read: 21\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["memory", "book.txt"])
    with pytest.raises(SystemExit) as caught:
        gin_utils.run(memory.main, memory.define_flags, gin_flags=False)
    sentence = "famx: error: Unknown argument book.txt: see --help.\n"
    assert caught.value.code == 2 and capsys.readouterr().err == sentence
