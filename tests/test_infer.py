"""`famx.infer` compared with the dense model line by line, killed and restarted, and given bad input."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import gin
import jax
import numpy as np
import pytest
from absl import flags
from gin import config as gin_config
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start_process
from tiny import make_model, make_params
from trained import write_model_dir

from famx import infer as main
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data.vocabularies import ByteVocabulary
from famx.decoding import Sampling, Streamer
from famx.inference import infer
from famx.inference import lines as inference
from famx.inference.answers import Answers
from famx.inference.lines import LineProgress
from famx.inference.prompts import Example
from famx.model_dir import loading

ROOT = gin_utils.gin_root()
VOCAB = ByteVocabulary()
MODEL = make_model(vocab_size=259, dtype="float64", param_dtype="float64")
LENGTH = 72  # row length of the dense model
NEW = 6
PROMPTS = ["a", "one block", "A prompt of a few blocks, " * 2, "xy", "seven..", "eight...", "nine....."]


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Use float64, in which rounding decides no comparison, and compile each decoder once."""
    monkeypatch.setattr("famx.inference.lines.Streamer", _streamer)
    with jax.enable_x64(True):
        yield


_streamer = functools.cache(Streamer)


@functools.cache
def _params():
    params = make_params(MODEL.module)
    return {**params, "embedding": params["embedding"] / 2}  # flatter, so that sampling can choose


@functools.cache
def _dense():
    return jax.jit(lambda params, tokens: MODEL.module.apply({"params": params}, tokens)[0])


def log_p(ids):
    """Log-probabilities of every next token [n, V] of one sequence, by the whole model at once."""
    logits = _dense()(_params(), np.array([ids + [0] * (LENGTH - len(ids))], np.int32))
    return np.asarray(jax.nn.log_softmax(logits[0, : len(ids)]))


def likely(ids, target):
    """Log-likelihood of the target after the ids."""
    rows = log_p(ids + target)[len(ids) - 1 : -1]
    return rows[np.arange(len(target)), target].sum()


def greedy(ids):
    """The greedy continuation by the dense model."""
    new = []
    for _ in range(NEW):
        new.append(int(log_p(ids + new)[-1].argmax()))
    return new


def ids(text):
    return [VOCAB.bos_id, *VOCAB.encode(text)]


def examples(prompts, targets=()):
    return [
        Example(line, {"targets": ["several"]}, np.array(ids(text), np.int32), targets)
        for line, text in enumerate(prompts)
    ]


def answers(batch_size=3, sampling=Sampling(NEW), samples=1, seed=0, memory=None):
    streamer = _streamer(MODEL.module)
    return Answers(streamer, VOCAB, memory, batch_size, sampling, samples, seed)


def in_batches(method, some, size=3):
    found = []
    for i in range(0, len(some), size):
        found += method(_params(), some[i : i + size])[0]
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    with jax.enable_x64(True):
        model = make_model(vocab_size=259, dtype="float64", param_dtype="float64")
        return write_model_dir(tmp_path_factory.mktemp("model"), model, _params(), VOCAB, step=7)


def put(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def get(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# ---------------------------------------------------------------- what is answered


def test_greedy_continuations_equal_the_dense_model():
    expected = [greedy(ids(text)) for text in PROMPTS]
    found = in_batches(answers().predict, examples(PROMPTS))
    for text, new, result in zip(PROMPTS, expected, found, strict=True):
        aux = result["aux"]
        assert aux["tokens"] == new and aux["num_tokens"] == NEW and not aux["finished"]
        assert result["prediction"] == VOCAB.decode(new)
        np.testing.assert_allclose(aux["scores"], likely(ids(text), new), rtol=1e-9)


def test_a_stop_token_ends_a_continuation_and_is_no_text():
    new = greedy(ids(PROMPTS[0]))
    end = max(new.index(token) for token in new)  # the first of the last kind of token
    stopping = answers(sampling=Sampling(NEW, stop_tokens=(new[end],)))
    (found,), tokens = stopping.predict(_params(), examples(PROMPTS[:1]))
    aux = found["aux"]
    assert tokens == len(ids(PROMPTS[0])) + end + 1
    assert aux["tokens"] == new[: end + 1] and aux["num_tokens"] == end + 1 and aux["finished"]
    assert found["prediction"] == VOCAB.decode(new[:end])
    np.testing.assert_allclose(aux["scores"], likely(ids(PROMPTS[0]), new[: end + 1]), rtol=1e-9)


def test_no_batch_size_changes_anything():
    sampling = Sampling(NEW, 1.0, stop_tokens=tuple(range(3, 40)))
    three, one = (
        in_batches(answers(size, sampling, samples=2).predict, examples(PROMPTS), size) for size in (3, 1)
    )
    assert len({str(result["aux"]["tokens"]) for result in three}) > 3
    for a, b in zip(three, one, strict=True):
        np.testing.assert_allclose(a["aux"].pop("scores"), b["aux"].pop("scores"), rtol=1e-9)
        assert a == b


def test_draws_follow_from_seed_line_and_sample_alone():
    sampling = Sampling(NEW, 1.0)
    same = [Example(line, {}, e.prompt) for line in (0, 1, 2**16) for e in examples(["a"])]
    draw = lambda seed: answers(3, sampling, 2, seed).predict(_params(), same)[0]
    texts = [tuple(ids) for result in draw(1) for ids in result["aux"]["tokens"]]
    assert len(set(texts)) == 6, "lines or samples share their draws"
    assert draw(1) == draw(1) != draw(2)


def test_scores_equal_score_batch_and_the_dense_model():
    targets = [np.array(VOCAB.encode(text), np.int32) for text in ("no", "y", "block by block")]
    some = examples(PROMPTS, targets)
    found = in_batches(answers().score, some)
    for text, result in zip(PROMPTS, found, strict=True):
        assert result["num_tokens"] == [2, 1, 14]
        rows = [ids(text) + target.tolist() for target in targets]
        expected = [likely(ids(text), target.tolist()) for target in targets]
        np.testing.assert_allclose(result["score"], expected, rtol=1e-9)
        tokens = np.array([row + [0] * (LENGTH + 1 - len(row)) for row in rows], np.int32)
        place = np.arange(1, LENGTH + 1)
        last = np.array([[len(row)] for row in rows])
        batch = {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": (place >= len(ids(text))) & (place < last),
        }
        np.testing.assert_allclose(result["score"], _score_batch()(_params(), batch), rtol=1e-4)


@functools.cache
def _score_batch():
    return jax.jit(MODEL.score)


def test_a_memory_stands_before_every_prompt():
    reader = _streamer(MODEL.module)
    start = reader.initial_state(_params(), 1)
    _, memory = reader.read(_params(), start, np.array([ids("Read before. ")], np.int32))
    some = [Example(i, {}, np.array(VOCAB.encode(text), np.int32)) for i, text in enumerate(PROMPTS)]
    whole = in_batches(answers().predict, examples(["Read before. " + text for text in PROMPTS]))
    found = in_batches(answers(memory=memory).predict, some)  # the same memory can be used again
    for a, b in zip(whole, found, strict=True):
        assert a["aux"]["tokens"] == b["aux"]["tokens"]
        np.testing.assert_allclose(a["aux"]["scores"], b["aux"]["scores"], rtol=1e-9)
    targets = [np.array(VOCAB.encode("no"), np.int32)]
    one = Example(0, {"targets": "no"}, np.array(VOCAB.encode("a"), np.int32), targets)
    (found,) = answers(memory=memory).score(_params(), [one])[0]
    expected = likely(ids("Read before. a"), VOCAB.encode("no"))
    np.testing.assert_allclose(found["score"], expected, rtol=1e-9)


def test_a_long_prompt_takes_no_more_of_the_device_than_a_short_one(monkeypatch):
    one = answers(1)
    read, peak = one.streamer._read_blocks, []

    def spy(*args, **kwargs):
        peak.append(sum(array.nbytes for array in jax.live_arrays()))
        return read(*args, **kwargs)

    monkeypatch.setattr(one.streamer, "_read_blocks", spy)
    peaks = []
    for tokens in (2000, 40_000):
        prompt = np.resize(np.arange(3, 100, dtype=np.int32), tokens)
        peak.clear()
        one.predict(_params(), [Example(0, {}, prompt)])
        peaks.append((len(peak), max(peak)))
    assert peaks[1][0] > 10 * peaks[0][0] and peaks[1][1] <= peaks[0][1] + 1000


def test_ids_that_are_no_text_leave_the_text():
    assert answers()._text([*VOCAB.encode("ab"), 400, *VOCAB.encode("c")]) == "abc"


# ---------------------------------------------------------------- a run


class Echo:
    """Replaces the model: answers at once, and raises like a killed process at batch `fail`."""

    def __init__(self, fail=None):
        self.fail, self.batches = fail, []

    def __call__(self, streamer, vocabulary, memory, batch_size, *args):
        self.batch_size = batch_size
        return self

    def predict(self, params, batch):
        if self.fail == len(self.batches):
            raise KeyboardInterrupt
        assert 1 <= len(batch) <= self.batch_size
        self.batches.append([example.line for example in batch])
        texts = [VOCAB.decode(example.prompt.tolist()) for example in batch]
        return [{"prediction": text[::-1], "aux": len(batch)} for text in texts], 1


@pytest.fixture(scope="module")
def echo(model_dir):
    """A function that runs `infer` with an `Echo`; the aux of a line tells the size of its batch."""
    with jax.enable_x64(True):
        trained = loading.load_model(model_dir)

    def run(source, output, fail=None, batch_size=2, mode="predict_with_aux", **kwargs):
        model = Echo(fail)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inference, "load_model", lambda *args: trained)
            patch.setattr(inference, "Answers", model)
            infer(model_dir, source, str(output), mode, batch_size, **kwargs)
        return model

    return run


texts = st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=30)


@settings(max_examples=40)
@given(texts, st.integers(1, 4), st.lists(st.integers(0, 5), max_size=4), st.binary(max_size=20))
def test_killed_anywhere_any_number_of_times(echo, tmp_path_factory, prompts, size, kills, torn):
    folder = tmp_path_factory.mktemp("run")
    source = put(folder / "in.jsonl", [{"inputs": text, "id": i} for i, text in enumerate(prompts)])
    echo(source, folder / "whole.jsonl", batch_size=size)
    for fail in kills:
        try:
            echo(source, folder / "cut.jsonl", fail, size)
            break
        except KeyboardInterrupt:
            with open(folder / "cut.jsonl.partial", "ab") as file:
                file.write(torn.replace(b"\n", b""))
    echo(source, folder / "cut.jsonl", batch_size=size)
    found = get(folder / "cut.jsonl")
    assert [line["id"] for line in found] == list(range(len(prompts)))
    assert [line["prediction"] for line in found] == [text[::-1] for text in prompts]
    whole, cut = (folder / "whole.jsonl").read_bytes(), (folder / "cut.jsonl").read_bytes()
    assert whole == cut, "batches differ from those of a run without a kill"
    assert not (folder / "cut.jsonl.partial").exists()


def test_every_batch_completes_lines_and_none_of_them_is_made_again(echo, tmp_path):
    source = put(tmp_path / "in.jsonl", [{"inputs": "a" * n} for n in (9, 1, 8, 2, 7, 3, 6, 4, 5, 9)])
    with pytest.raises(KeyboardInterrupt):
        echo(source, tmp_path / "out.jsonl", fail=3)
    done = len(get(tmp_path / "out.jsonl.partial"))
    assert done >= 3
    rest = echo(source, tmp_path / "out.jsonl")
    assert all(max(batch) >= done for batch in rest.batches)


def test_a_run_goes_on_with_another_batch_size(echo, tmp_path):
    source = put(tmp_path / "in.jsonl", [{"inputs": "a" * n} for n in range(1, 20)])
    with pytest.raises(KeyboardInterrupt):
        echo(source, tmp_path / "out.jsonl", fail=5, mode="predict")
    echo(source, tmp_path / "out.jsonl", batch_size=3, mode="predict")
    found = get(tmp_path / "out.jsonl")
    assert found == [{"inputs": "a" * n, "prediction": "a" * n} for n in range(1, 20)]


def test_a_finished_run_is_not_made_again(echo, tmp_path):
    source = put(tmp_path / "in.jsonl", [{"inputs": "a"}])
    echo(source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").stat()
    assert echo(source, tmp_path / "out.jsonl").batches == []
    assert (tmp_path / "out.jsonl").stat() == before
    for changes, sentence in (
        (dict(mode="predict"), "differing in mode ('predict_with_aux' there, 'predict' here)"),
        (dict(sampling=Sampling(3)), "differing in max_new_tokens (256 there, 3 here)"),
        (dict(stop_at_eos=False), "differing in stop_tokens ([2] there, [] here)"),
        (dict(prompt_template="{inputs}!"), "differing in prompt_template ('{inputs}' there, "),
    ):
        with pytest.raises(ConfigError) as caught:
            echo(source, tmp_path / "out.jsonl", **changes)
        assert sentence in str(caught.value)
    put(tmp_path / "in.jsonl", [{"inputs": "b"}])
    with pytest.raises(ConfigError, match="differing in input_file .*: choose another file"):
        echo(source, tmp_path / "out.jsonl")


def test_a_termination_finishes_the_batch(echo, tmp_path, monkeypatch, capsys):
    source = put(tmp_path / "in.jsonl", [{"inputs": "a"}] * 9)
    answer = Echo.predict

    def predict(self, params, batch):
        if len(self.batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, params, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Echo, "predict", predict)
        assert len(echo(source, tmp_path / "out.jsonl").batches) == 2
    assert "Stopped after 4 of 9 lines; the same command resumes from there." in capsys.readouterr().err
    assert len(get(tmp_path / "out.jsonl.partial")) == 4 and not (tmp_path / "out.jsonl").exists()
    assert len(echo(source, tmp_path / "out.jsonl").batches) == 3
    assert len(get(tmp_path / "out.jsonl")) == 9


def test_a_run_with_template_ids_and_memory_file(model_dir, tmp_path, capsys):
    from famx.model_dir.memory_file import save_memory

    trained = loading.load_model(model_dir)
    reader = _streamer(MODEL.module)
    start = reader.initial_state(trained.params, 1)
    memory = reader.read(trained.params, start, np.array([ids("Read before. ")], np.int32))
    save_memory(tmp_path / "read.famem", trained, *memory)
    texts = ["a", "five", "seven..", "xy"]
    some = [*({"inputs": text} for text in texts), {"input_ids": [70, 80], "id": 5}]
    infer(
        model_dir, put(tmp_path / "in.jsonl", some), str(tmp_path / "out.jsonl"), "predict_with_aux", 3,
        memory_file=str(tmp_path / "read.famem"), prompt_template="Q: {inputs}\nA:",
        sampling=Sampling(NEW),
    )  # fmt: skip
    prompts = [*(ids(f"Read before. Q: {text}\nA:") for text in texts), ids("Read before. ") + [70, 80]]
    for line, prompt, found in zip(some, prompts, get(tmp_path / "out.jsonl"), strict=True):
        new = greedy(prompt)
        new = new[: new.index(VOCAB.eos_id) + 1] if VOCAB.eos_id in new else new
        assert found["aux"]["tokens"] == new
        assert found == {**line, "prediction": VOCAB.decode(new), "aux": found["aux"]}
    assert f"Written: {tmp_path / 'out.jsonl'}, 5 lines." in capsys.readouterr().err
    noted = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert noted["checkpoint"] == f"{model_dir}/checkpoint_7"
    assert noted["settings"]["step"] == 7 and noted["settings"]["stop_tokens"] == [VOCAB.eos_id]


def test_progress_is_lines_in_a_file_and_a_bar_on_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("famx.base.progress._monotonic", lambda: now[0])
    progress = LineProgress(10, 2)
    now[0] = 0.1
    progress.advance(6, 100)
    assert capsys.readouterr().err == ""  # too early for progress
    monkeypatch.setattr(progress, "_line_seconds", 0)
    progress.advance(8, 100)
    progress.advance(10, 100)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("infer 8/10 lines  tokens/s ") and "  eta 0:00:00" in first
    assert last.startswith("infer 10/10 lines  tokens/s ") and "  elapsed 0:00:00" in last
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = LineProgress(10, 2)
    now[0] = 0.2
    progress.advance(10, 100)
    progress.close()
    assert "infer: 100%" in terminal.getvalue() and "10/10" in terminal.getvalue()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "mode, line, sentence",
    [
        ("predict", {}, "has no 'inputs'; its fields are: none."),
        ("predict", {"input": "a"}, "has no 'inputs'; its fields are: input."),
        ("predict", {"inputs": ["a"]}, "has 'inputs' that is a list, not text."),
        ("predict", {"inputs": None}, "has 'inputs' that is null, not text."),
        ("predict", {"inputs": ""}, "has an empty prompt: it needs at least one token."),
        ("predict", {"inputs": "a", "prediction": 1}, "already has a field 'prediction', which mode"),
        ("score", {"inputs": "a", "targets": "b", "score": 1}, "already has a field 'score'"),
        ("predict", {"inputs": "a", "input_ids": [5]}, "has both 'input_ids' and 'inputs': keep one"),
        ("predict", {"input_ids": []}, "has an empty prompt: 'input_ids' is an empty list."),
        ("predict", {"input_ids": [5, 1.5]}, "has 'input_ids' that are not a list of integers."),
        ("predict", {"input_ids": [True]}, "has 'input_ids' that are not a list of integers."),
        ("predict", {"input_ids": "a"}, "has 'input_ids' that are not a list of integers."),
        ("predict", {"input_ids": [5, 259]}, "has the token id 259, which is outside the vocabulary"),
        ("predict", {"input_ids": [-1]}, "has the token id -1, which is outside the vocabulary: ids run"),
        ("score", {"inputs": "a"}, "has no 'targets', which mode score needs: add a"),
        ("score", {"inputs": "a", "targets": []}, "has an empty list of 'targets': add at least one"),
        ("score", {"inputs": "a", "targets": ["b", ""]}, "has an empty target: it needs at least one"),
        ("score", {"inputs": "a", "targets": 5}, "has 'targets' that contain a number instead of text."),
        ("score", {"inputs": "a", "targets": [{}]}, "has 'targets' that contain an object instead of"),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(
    model_dir, tmp_path, monkeypatch, mode, line, sentence
):
    monkeypatch.setattr(inference, "load_model", None)
    source = put(tmp_path / "in.jsonl", [{"inputs": "a", "targets": ["b"]}, line, {"inputs": 5}])
    with pytest.raises(ConfigError) as caught:
        infer(model_dir, source, str(tmp_path / "out.jsonl"), mode)
    assert str(caught.value).startswith(f"Line 2 of {source} {sentence}")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.fixture
def bad_input(monkeypatch, capsys, tmp_path, model_dir):
    """A function that runs famx.infer in this process and returns its error sentence."""

    def call(*bindings):
        _forget()
        bound = [
            f"CHECKPOINT_PATH='{model_dir}'",
            f"INPUT_FILE='{tmp_path / 'in.jsonl'}'",
            f"OUTPUT_FILE='{tmp_path / 'out.jsonl'}'",
            *bindings,
        ]
        args = ["--gin_file=gin_configs/runs/infer.gin", *(f"--gin.{binding}" for binding in bound)]
        monkeypatch.setattr(sys, "argv", ["infer", *args])
        with pytest.raises(SystemExit) as caught:
            gin_utils.run(main.main)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in error and "In call to" not in error, error
        last = error.strip().splitlines()[-1]
        assert last.startswith("famx: error: ")
        return last.removeprefix("famx: error: ")

    put(tmp_path / "in.jsonl", [{"inputs": "a"}])
    cache = jax.config.jax_compilation_cache_dir
    yield call
    jax.config.update("jax_compilation_cache_dir", cache)
    _forget()


def _forget():
    """Reset gin and the flags as in a new process."""
    gin.clear_config()
    gin_config._IMPORTS.clear()
    for name in ("gin_file", "gin_bindings", "gin_search_paths"):
        if name in flags.FLAGS:
            flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    "binding, sentence",
    [
        ("MODE='predct'", "MODE must be one of 'predict', 'predict_with_aux', 'score', not 'predct'."),
        ("BATCH_SIZE=0", "BATCH_SIZE must be a whole number of at least 1, not 0."),
        ("NUM_SAMPLES=1.5", "NUM_SAMPLES must be a whole number of at least 1, not 1.5."),
        ("NUM_SAMPLES=2", "At temperature 0 all 2 samples of a prompt are equal: raise TEMPERATURE."),
        ("RANDOM_SEED=-1", "RANDOM_SEED must be a whole number of at least 0, not -1."),
        ("MAX_NEW_TOKENS=0", "MAX_NEW_TOKENS must be a whole number of at least 1, not 0."),
        ("TEMPERATURE=-1", "TEMPERATURE must be a number of at least 0, not -1."),
        ("TOP_P=0", "TOP_P must be a number above 0 and at most 1, not 0."),
        ("STOP_TOKENS=(300,)", "STOP_TOKENS (300,) must be ids from 0 to 258."),
        ("PROMPT_TEMPLATE='{}'", "PROMPT_TEMPLATE '{}' must contain names of fields in braces, as in"),
        ("PROMPT_TEMPLATE='{q}'", "has no 'q'; its fields are: inputs."),
        ("INPUT_FILE='/no/such.jsonl'", "INPUT_FILE /no/such.jsonl is not a file."),
        ("OUTPUT_FILE='/no/such/out'", "/no/such/out cannot be written: /no/such must be an existing"),
        ("CHECKPOINT_PATH='/no/such'", "There is no checkpoint /no/such: /no/such is not a directory."),
        ("MEMORY_FILE='/no/such.famem'", "There is no memory file /no/such.famem."),
        ("MODE_='score'", "Nothing uses MODE_: it is set, but no binding reads it."),
        ("infer.batch_sice=2", "infer has no parameter batch_sice. Did you mean batch_size?"),
    ],
)  # fmt: skip
def test_bad_settings(bad_input, tmp_path, binding, sentence):
    assert sentence in bad_input(binding)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_checkpoints_that_cannot_be_used(bad_input, model_dir, tmp_path):
    missing = f"CHECKPOINT_PATH='{model_dir}/checkpoint_9'"
    assert f"There is no checkpoint of step 9 in {model_dir}" in bad_input(missing)
    assert "is not the directory of a trained model" in bad_input(f"CHECKPOINT_PATH='{tmp_path}'")
    without = write_model_dir(tmp_path / "model", make_model(), make_params(make_model().module), None)
    assert "has no vocabulary: put the vocabulary.json" in bad_input(f"CHECKPOINT_PATH='{without}'")
    with pytest.raises(ConfigError, match="holds another model, differing in embed_dim"):
        infer(model_dir, str(tmp_path / "in.jsonl"), str(tmp_path / "out"), model=make_model(embed_dim=8))


def test_an_empty_file(bad_input, tmp_path):
    put(tmp_path / "in.jsonl", [])
    assert bad_input() == f"{tmp_path / 'in.jsonl'} is empty: give at least one line."


# ---------------------------------------------------------------- as a user runs it


@pytest.mark.slow
def test_the_main_terminated_killed_and_whole(tmp_path):
    model = make_model(vocab_size=260)  # float32, as a user has it
    directory = write_model_dir(tmp_path / "model", model, make_params(model.module), VOCAB)
    some = [{"inputs": "ab" * (1 + i * 7 % 23), "id": i} for i in range(300)]
    source = put(tmp_path / "in.jsonl", some)

    def start(name):
        paths = dict(CHECKPOINT_PATH=directory, INPUT_FILE=source, OUTPUT_FILE=tmp_path / name)
        bindings = [f"--gin.{key}='{path}'" for key, path in paths.items()]
        settings = ["--gin.BATCH_SIZE=2", "--gin.MAX_NEW_TOKENS=40", "--gin.MODE='predict_with_aux'"]
        command = [sys.executable, "-m", "famx.infer", "--gin_file=gin_configs/runs/infer.gin"]
        return start_process(
            [*command, *bindings, *settings, "--gin.TEMPERATURE=0.7"], cwd=ROOT, text=True,
            stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def grow(process, size):
        partial = tmp_path / "cut.jsonl.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > size):
            time.sleep(0.01)
        return partial

    process = start("cut.jsonl")
    partial = grow(process, 0)
    process.terminate()
    text = process.communicate()[1]
    assert process.returncode == 0 and "the same command resumes from there." in text, text
    process = start("cut.jsonl")
    grow(process, partial.stat().st_size)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    assert 0 < len(partial.read_bytes().splitlines()) < 300 and not (tmp_path / "cut.jsonl").exists()

    for name in ("cut.jsonl", "whole.jsonl", "whole.jsonl"):
        process = start(name)
        text = process.communicate()[1]
        assert process.returncode == 0 and "Traceback" not in text, text
    assert text.splitlines()[-1] == f"{tmp_path / 'whole.jsonl'} is finished already."
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [line["id"] for line in get(tmp_path / "cut.jsonl")] == list(range(300))
