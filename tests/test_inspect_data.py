"""`python -m famx.inspect_data` shows every token once, with its weight, and writes nothing else."""

import json
import os
import re
import subprocess
import sys
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import famx.data
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data.formats import gpt3
from famx.data.tools.inspect import Row, Rows, inspect, numbers, open_rows, plot, render, sizes, visible
from famx.data.vocabularies import ByteVocabulary

VOCAB = ByteVocabulary()


def row(text, weights=None):
    tokens = np.array(VOCAB.encode(text), np.int32)
    return Row(tokens, np.full(len(tokens), 0 if weights is None else weights, np.float32))


# ------ Text


@given(st.text())
def test_only_characters_that_print_in_place_are_printed(text):
    shown = visible(text)
    for char in shown.replace("\\n\n", ""):
        assert unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029"
        assert unicodedata.bidirectional(char) not in ("R", "AL", "AN")
    assert shown.replace("\\n\n", "\\n").encode("latin-1", "backslashreplace").decode(
        "unicode_escape") == text  # fmt: skip


def test_escapes_are_those_of_python():
    assert visible("a\x1b[31m\t\\ \u202eשa\u200d\xa0🙂é好\r\n") == (
        "a\\x1b[31m\\t\\\\ \\u202e\\u05e9a\\u200d\\xa0🙂é好\\r\\n\n")


@given(st.text(st.characters(max_codepoint=126, min_codepoint=32, exclude_characters="[]|\\<>")),
       st.integers(1, 9), st.randoms())  # fmt: skip
def test_without_marks_and_brackets_a_row_is_its_text(text, block_size, random):
    weights = [random.choice([0, 0.1, 1]) for _ in text]
    shown = render(row(text, weights), VOCAB, block_size)
    starts = [int(x) for x in re.findall(r"<block (\d+)>", shown)]
    assert starts == list(range(-(-len(text) // block_size)))
    blocks = re.split(r"<block \d+>", shown)[1:]
    for i, block in enumerate(blocks):
        parts = re.findall(r"\[([0-9.]+)\|(.)(.*?)\]|(.)", block)
        letters = "".join(second + third + plain for _, second, third, plain in parts)
        assert letters == text[i * block_size : (i + 1) * block_size]
        found = [float(w or 0) for w, second, third, _ in parts for _ in (second + third or "x")]
        assert found == weights[i * block_size : (i + 1) * block_size]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", render(row(text, weights), VOCAB, block_size, True))
    assert plain == re.sub(r"\[[0-9.]+\||\]", "", shown)


def test_special_tokens_have_names_and_colours_follow_the_weights():
    tokens = np.array([1, *VOCAB.encode("ab"), 2, 0, 0, 0], np.int32)
    weights = np.array([0, 1, 0.5, 1, 0, 0, 0], np.float32)
    assert render(Row(tokens, weights), VOCAB) == "<bos>[1|a][0.5|b][1|<eos>]<pad>*3"
    assert render(Row(tokens, weights), VOCAB, color=True) == (
        "<bos>\x1b[30;42ma\x1b[0m\x1b[30;43mb\x1b[0m\x1b[30;42m<eos>\x1b[0m<pad>*3")
    assert render(Row(tokens[:0], weights[:0]), VOCAB, 4) == ""


def test_long_rows_show_their_ends():
    weights = [0] * 50 + [1] * 20 + [0] * 49
    shown = render(row("a" * 10 + "b" * 100 + "c" * 9, weights), VOCAB, 16, show=10)
    assert shown == "<block 0>aaaaa\n... 109 tokens left out, 20 of them weighted ...\nccccc"
    shown = render(row("a" * 20), VOCAB, 8, show=9)
    assert shown == "<block 0>aaaaa\n... 11 tokens left out, 0 of them weighted ...\n<block 2>aaaa"


def test_numbers_of_a_row():
    assert numbers(row("abcdefgh", [0] * 6 + [1, 0.5]), 16) == (
        "8 tokens, 0.5 blocks of 16, 2 weighted (25.0%), sum of weights 1.5")
    assert numbers(row("")) == "0 tokens, 0 weighted (0.0%), sum of weights 0"


# ------ Tasks


def shown(rows, **options):
    lines = []
    found = inspect(rows, message=lines.append, **options)
    return found, "\n".join(lines)


def test_tasks_made_by_index_show_what_training_reads():
    task = famx.data.get("passkey_bytes", digits=3)
    found, text = shown(open_rows("passkey_bytes", {"digits": 3}, None, 512), examples=3, first=5)
    for i in (5, 6, 7):
        example = task.example(i, 512)
        assert f"example {i}: 512 tokens, " in text
        answer = VOCAB.decode(example["tokens"][example["answer_start"] :])
        assert f"is [1|{answer}]" in text
    assert found == dict(examples=3, tokens=1536, weighted_tokens=found["weighted_tokens"],
                         share=found["weighted_tokens"] / 1536)  # fmt: skip
    assert text.endswith(f"3 shown: 1536 tokens, {found['weighted_tokens']} weighted "
                         f"({found['share']:.1%}).")  # fmt: skip
    other = open_rows("passkey_bytes", {"digits": 3}, "eval", 512)[5].tokens
    assert not np.array_equal(other, task.example(5, 512)["tokens"])
    assert open_rows("passkey_words").length == 1024
    assert len(open_rows("ruler_vt", length=2000)[0].tokens) == 2000


def test_documents_and_packed_rows(tmp_path):
    for i, text in enumerate(["erste", "zweite 🙂", "dritte"]):
        (tmp_path / f"{i}.txt").write_text(text)
    options = {"files": str(tmp_path / "*.txt"), "validation_fraction": 0}
    found, text = shown(open_rows("own_text", options), examples=5)
    assert found["examples"] == 3 and "[1|zweite 🙂]" in text and found["share"] == 1
    packed = open_rows("own_text", options, None, 7, packed=True)
    found, text = shown(packed, examples=4, first=1)
    lanes = famx.data.PackedRows(famx.data.get("own_text", **options), 1, 7)
    batches = [next(lanes) for _ in range(5)]
    for i in range(1, 5):
        names = ("decoder_target_tokens", "decoder_loss_weights")
        expected = Row(*(batches[i][name][0] for name in names))
        assert f"row {i}: 7 tokens" in text and render(expected, VOCAB) in text
    rows = open_rows("own_text", {"files": options["files"]}, "validation")
    assert rows.size == 1


def test_text_tasks_and_mixtures_show_inputs_and_targets(tmp_path):
    (tmp_path / "qasper").mkdir()
    line = {"id": "a", "pid": "b", "input": "Wer?\n\nسلام", "output": "Er"}
    for split in ("train", "validation"):
        (tmp_path / "qasper" / f"{split}.jsonl").write_text(json.dumps({**line, "output": f"Er {split}"}))
    for split, part in ((None, "train"), ("validation", "validation")):
        _, text = shown(open_rows("scrolls_qasper", {"data_dir": str(tmp_path)}, split))
        assert f"Wer?\\n\n\\n\n\\u0633\\u0644\\u0627\\u0645\\n\n\\n\n[1|Er {part}<eos>]".replace(
            "<eos>]", "][1|<eos>]") in text  # fmt: skip


def test_histograms_are_of_examples_spread_over_all(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * (i + 1))
    rows = open_rows("own_text", {"files": str(tmp_path / "*.txt"), "validation_fraction": 0})
    assert list(sizes(rows)) == [(i + 1, i + 1) for i in range(20)]
    assert list(sizes(rows, 5)) == [(i, i) for i in (1, 5, 9, 13, 17)]
    plot(list(sizes(rows)), str(tmp_path / "x.png"), "own_text")
    plot([(1, 0), (3, 1), (100_000, 2)], str(tmp_path / "long.png"), "a long tail")
    for name in ("x.png", "long.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert list(sizes(open_rows("passkey_words", length=128), 2))[0][0] == 128


# ------ Bad input


def test_bad_input_gets_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="The nearest name is 'passkey_words'"):
        open_rows("paskey_words")
    with pytest.raises(ConfigError, match="has no option 'digit'"):
        open_rows("passkey_words", {"digit": 3})
    with pytest.raises(ConfigError, match="no split 'dev'; the nearest name"):
        open_rows("scrolls_qasper", split="dev")
    with pytest.raises(ConfigError, match="split must be one of 'train', 'eval', not 'dev'"):
        open_rows("passkey_words", split="dev")
    with pytest.raises(ConfigError, match="qasper/train.jsonl, which is not there. Published: https"):
        open_rows("scrolls_qasper", {"data_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="'gpt3_gen' is a suite; .* tasks: gpt3_lambada, "):
        open_rows("gpt3_gen")
    with pytest.raises(ConfigError, match="Rows.length must be a whole number of at least 1"):
        open_rows("passkey_words", length=0)
    with pytest.raises(ConfigError, match="generates its own rows; leave out --packed"):
        open_rows("passkey_words", packed=True)
    with pytest.raises(ConfigError, match="add --packed for rows of one length"):
        open_rows("python_stdlib", length=10)
    with pytest.raises(ConfigError, match="SeqIO's tasks cannot be shown here"):
        Rows(types.SimpleNamespace(name="theirs", output_features={}))
    with pytest.raises(ConfigError, match="documents have no attribute vocab"):
        Rows([np.arange(3)])
    rows = open_rows("own_text", {"files": [__file__, gpt3.__file__], "validation_fraction": 0})
    for options, sentence in ((dict(examples=0), "least 1, not 0"), (dict(first=-1), "least 0, not"),
                              (dict(block_size=0), "or None, not 0"), (dict(show=1), "at least 2"),
                              (dict(first=2), "There are 2 examples, numbered from 0, and no number 2")):
        with pytest.raises(ConfigError, match=sentence):
            inspect(rows, **options)
    with pytest.raises(ConfigError, match="x.png cannot be written: No such file"):
        plot([(1, 1)], str(tmp_path / "none" / "x.png"), "x")


@pytest.mark.slow
def test_the_command(tmp_path):
    (tmp_path / "a.txt").write_text("one \x1b two שלום")
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "famx.inspect_data", *arguments], cwd=gin_utils.gin_root(),
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    options = json.dumps({"files": str(tmp_path / "a.txt"), "validation_fraction": 0})
    result = run("--task=own_text", f"--task_options={options}", "--block_size=8", "--color=always",
                 f"--plot={tmp_path / 'x.png'}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "<block 1>" in result.stdout and "\\x1b t" in result.stdout and "\\u05e9" in result.stdout
    assert "\x1b[30;42m" in result.stdout and (tmp_path / "x.png").exists()
    result = run("--task=own_text", "--task_options={")
    assert result.returncode == 2 and "famx: error: --task_options is not JSON" in result.stderr
