"""PassKey in any vocabulary: the paper's text, exact lengths, keys however digits are split."""

import dataclasses
import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import TOKENIZERS, write_byte_pair, write_tokenizer
from test_passkey import HEADER, QUESTION, statement

from famx.data import ByteVocabulary, PasskeyTask, WordVocabulary, open_vocabulary
from famx.data.probes.passkey_text import FILLER_WORDS, REPEATED_FILLER, passkey_words
from famx.data.probes.python_docs import python_docs_sentences
from famx.data.vocabularies import as_vocabulary

pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")
SPLIT_AT_WORDS = [name for name in TOKENIZERS if name != "byte_pair_none"]
FILLERS = ("repeated", "random_words", "mixed", "python_stdlib")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: as_vocabulary(write_tokenizer(folder / name, name)) for name in TOKENIZERS}


def options():
    return st.fixed_dictionaries(
        dict(
            filler=st.sampled_from(FILLERS),
            digits=st.integers(1, 8),
            depth=st.none() | st.floats(0, 1),
            second_key=st.sampled_from([0.0, 0.5, 1.0]),
            second_key_recent=st.booleans(),
            header=st.booleans(),
            block_size=st.none() | st.integers(150, 300),
            seed=st.integers(0, 3),
            split=st.sampled_from(["train", "eval"]),
        )
    )


def check_row(task, row, length):
    """Lengths, places, weights and texts of a row, found by decoding its tokens."""
    vocab, tokens, weights = task.vocab, row["tokens"], row["weights"]
    assert (tokens.shape, tokens.dtype) == ((length,), np.int32)
    assert (weights.shape, weights.dtype) == ((length,), np.float32)
    (key,) = row["references"]
    assert re.fullmatch(f"[0-9]{{{task.digits}}}", key)
    assert vocab.decode(row["answer"]).strip() == key and len(row["answer"]) <= task.answer_width
    np.testing.assert_array_equal(tokens[row["answer_start"] :], row["answer"])
    text = vocab.decode(tokens)
    assert text.endswith(QUESTION + key)
    assert text.startswith(HEADER.rstrip()) == task.header
    assert row["positions"] == sorted(row["positions"])
    expected, keys = np.zeros(length, np.float32), []
    expected[row["answer_start"] :] = 1.0
    weighing = np.flatnonzero(weights == 0.5)
    mentions = np.split(weighing, np.flatnonzero(np.diff(weighing) > 1) + 1)
    for start, mention in zip(row["positions"], mentions, strict=True):
        found = re.match(r" ?The pass key is (\d+)\.", vocab.decode(tokens[start : start + 60]))
        keys.append(found[1])
        after = vocab.decode(tokens[start : start + len(statement(keys[-1]))]).lstrip()
        assert after.startswith(statement(keys[-1]).rstrip())
        # The second mention is what weighs, no more and no less.
        assert vocab.decode(tokens[mention]).strip() == keys[-1]
        before = vocab.decode(tokens[start : mention[0]]).strip()
        assert before == f"The pass key is {keys[-1]}. Remember it."
        expected[mention] = 0.5
        if task.block_size:
            end = start + task._texts.statement_width
            assert start // task.block_size == end // task.block_size
    assert keys[-1] == key and len(set(keys)) == len(keys)
    np.testing.assert_array_equal(weights, expected)
    assert row["filler_tokens"] == length - sum(map(len, fixed_parts(task, keys)))
    return text, keys


def fixed_parts(task, keys):
    """The parts of a row that are not filler, each encoded behind another sentence."""
    behind = lambda text: task.vocab.encode(f"Yes. {text}")[len(task.vocab.encode("Yes.")) :]
    header = [task.vocab.encode(HEADER.rstrip())] if task.header else []
    return [*header, *(behind(statement(key).rstrip()) for key in keys), behind(QUESTION + keys[-1])]


@pytest.mark.parametrize("name", SPLIT_AT_WORDS)
@settings(max_examples=25, deadline=None)
@given(options(), st.integers(0, 10**6), st.integers(0, 900))
def test_any_row_is_the_text_and_the_text_is_the_row(vocabularies, name, kwargs, index, extra):
    vocab = vocabularies[name]
    task = PasskeyTask(vocabulary=vocab, **kwargs)
    length = task.min_length + extra
    row = task.example(index, length)
    text, keys = check_row(task, row, length)
    assert vocab.encode(text) == row["tokens"].tolist()
    again = dataclasses.replace(task).example(index, length)
    np.testing.assert_array_equal(again["tokens"], row["tokens"])
    # Without header, keys and question nothing but whole words of the filler is left.
    rest = text.removesuffix(QUESTION + keys[-1])
    for key in keys:
        rest = rest.replace(statement(key).rstrip(), "")
    words = set(rest.removeprefix(HEADER.rstrip()).split())
    known = {*REPEATED_FILLER.split(), *FILLER_WORDS}
    if task.filler == "python_stdlib":
        known |= set(" ".join(python_docs_sentences(task.split == "eval")).split())
    assert words <= known, words - known


@pytest.mark.parametrize("filler", FILLERS)
def test_where_tokens_span_words_the_text_still_is_right(vocabularies, filler):
    vocab = vocabularies["byte_pair_none"]
    assert any(" " in vocab.decode([i]).strip() for i in vocab.encode(HEADER))  # a token of two words
    task = PasskeyTask(vocabulary=vocab, filler=filler, second_key=1.0, depth=None)
    for index in range(5):
        row = task.example(index, task.min_length + 300)
        text = vocab.decode(row["tokens"])
        key = row["references"][0]
        assert text.startswith(HEADER.rstrip()) and text.endswith(QUESTION + key)
        assert statement(key).rstrip() in text and len(row["tokens"]) == task.min_length + 300


@pytest.mark.parametrize("name", SPLIT_AT_WORDS)
def test_without_filler_the_text_is_the_papers(vocabularies, name):
    vocab = vocabularies[name]
    task = PasskeyTask(vocabulary=vocab)
    for index in range(20):
        key = task.example(index, 1000)["references"][0]
        text = HEADER + statement(key) + QUESTION + key
        size = len(vocab.encode(text))
        filler = len(vocab.encode("Yes. " + REPEATED_FILLER)) - len(vocab.encode("Yes."))
        if size + filler < task.min_length:
            continue
        row = task.example(index, size + filler)
        assert vocab.decode(row["tokens"]) == (
            HEADER + statement(key) + REPEATED_FILLER + " " + QUESTION + key)
        assert row["filler_tokens"] == filler


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("filler", FILLERS)
def test_batches_are_rows_shifted_and_answers_padded(vocabularies, name, filler):
    task = PasskeyTask(vocabulary=vocabularies[name], filler=filler, second_key=0.5)
    length = task.min_length + 77
    batch = task.batch(range(40, 52), length)
    assert batch["answer"].shape == (12, task.answer_width)
    for b, index in enumerate(range(40, 52)):
        row = task.example(index, length)
        np.testing.assert_array_equal(batch["decoder_target_tokens"][b], row["tokens"])
        np.testing.assert_array_equal(batch["decoder_input_tokens"][b, 1:], row["tokens"][:-1])
        assert batch["decoder_input_tokens"][b, 0] == task.vocab.bos_id
        np.testing.assert_array_equal(batch["decoder_loss_weights"][b], row["weights"])
        assert batch["answer_start"][b] == row["answer_start"]
        assert batch["answer"][b].tolist() == row["answer"].tolist() + [task.vocab.pad_id] * (
            task.answer_width - len(row["answer"]))


def test_keys_are_those_of_every_other_vocabulary(vocabularies):
    tasks = [PasskeyTask(vocabulary=v, seed=5) for v in (*vocabularies.values(), "words", "bytes")]
    for index in range(30):
        assert len({task.example(index, 1500)["references"][0] for task in tasks}) == 1


def test_real_text_of_training_and_evaluation_is_disjoint(vocabularies):
    vocab = vocabularies["byte_pair_digits"]
    for split, evaluation in (("train", False), ("eval", True)):
        docs = " ".join(python_docs_sentences(evaluation))
        task = PasskeyTask(vocabulary=vocab, filler="python_stdlib", header=False, split=split)
        for index in range(3):
            row = task.example(index, 4000)
            text = vocab.decode(row["tokens"])
            filler = text[text.index("is the pass key.") + 16 : text.rindex(" What is the")].strip()
            assert len(filler) > 3000 and filler.rsplit(" ", 9)[0] in f"{docs} {docs}"


def test_vocabulary_objects_of_words_and_bytes_make_the_same_rows():
    for name, vocab in (("words", passkey_words()), ("bytes", ByteVocabulary())):
        named, given_ = (PasskeyTask(v, filler="mixed", second_key=0.5) for v in (name, vocab))
        for key, value in named.batch(range(9), 700).items():
            np.testing.assert_array_equal(value, given_.batch(range(9), 700)[key])


@pytest.mark.parametrize(
    "vocabulary, digest", [("words", "ff19c6edc9fc8225"), ("bytes", "db906e4d0964af4f")]
)
def test_rows_of_words_and_bytes_never_change(vocabulary, digest):
    """A model that was trained on them must find them again."""
    sha = hashlib.sha256()
    for filler in ("repeated", "random_words", "mixed"):
        for block_size in (None, 128):
            task = PasskeyTask(
                vocabulary, filler=filler, second_key=0.5, depth=None, block_size=block_size, seed=3)
            for value in task.batch(range(8), 900).values():
                sha.update(np.ascontiguousarray(value).tobytes())
    assert sha.hexdigest()[:16] == digest


def test_the_prompt_names_the_key(vocabularies):
    task = PasskeyTask(vocabulary=vocabularies["byte_pair_digits"])
    form = task.prompt(4, 300)
    assert form["inputs"].endswith("The pass key is") and form["references"][0].isdigit()


def test_vocabularies_that_cannot_hold_the_task_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot spell PassKey's text .* give one that can"):
        PasskeyTask(vocabulary=WordVocabulary(["key", "pass"]))
    folder = write_byte_pair(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no bos_id, .* open it with one, such as its eos_id"):
        PasskeyTask(vocabulary=folder)
    assert PasskeyTask(vocabulary=open_vocabulary(tmp_path / "tokenizer.json", bos_id=1)).min_length
    with pytest.raises(ValueError, match="set vocabulary to 'bytes', or to a tokenizer's"):
        PasskeyTask(vocabulary=passkey_words(), filler="python_stdlib")


def test_the_tokenizers_path_needs_no_tensorflow_and_no_seqio(tmp_path):
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'seqio', 'gguf', 'sentencepiece', 'transformers', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "import famx.data\n"
        "task = famx.data.get('passkey', vocabulary=sys.argv[1])\n"
        "assert task.batch([0, 1], 900)['answer'].shape == (2, 6)\n"
    )
    folder = write_byte_pair(tmp_path)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
