"""Evaluation of text tasks against dense forward passes over one example at a time."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import make_model, make_params, make_run
from trained import write_model_dir

import famx.data
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, TextTask, WordVocabulary
from famx.data.tasks.examples import Examples, encode_example
from famx.evaluation import TextTaskEvaluation, text_answers
from famx.evaluation.checkpoints import evaluate
from famx.evaluation.common import streamer_of
from famx.modules import Memory
from famx.training import loop

BYTES = ByteVocabulary()
NEW = 6  # tokens of an answer at most
WIDTH = 192  # tokens in the dense forward pass
QUESTION = "Who{}?\n\n (A) red\n (B) a cat\n (C) not (A)\n (D) both of these\n\n\nThe text {}."


@pytest.fixture(scope="module")
def model():
    return make_model(vocabulary=BYTES)


@pytest.fixture(scope="module")
def params(model):
    """Parameters under which a few letters and end of text are likely."""
    params = make_params(model.module, seed=6)
    embedding = np.array(params["embedding"])
    scale = np.full((len(embedding), 1), 0.3, np.float32)
    scale[[BYTES.eos_id, *BYTES.encode("abcd ")]] = 2.0
    return {**params, "embedding": embedding * scale}


reader = functools.cache(lambda module: jax.jit(module.apply))


def log_p(model, params, tokens):
    """Log-probability of every token given those before, from one dense pass over `[bos] + tokens`."""
    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(tokens) + 1] = [1, *tokens]
    logits, _ = reader(model.module)({"params": params}, row)
    return np.asarray(jax.nn.log_softmax(logits[0]), np.float64)[: len(tokens) + 1]


def greedy(model, params, inputs):
    prompt, written = BYTES.encode(inputs), []
    while len(written) < NEW and (not written or written[-1] != BYTES.eos_id):
        written.append(int(log_p(model, params, [*prompt, *written])[-1].argmax()))
    return BYTES.decode([i for i in written if i < BYTES.vocab_size])


def likelihood(model, params, inputs, target, end=False):
    """Log-likelihood of the target, with end of text if `end`, and its number of tokens."""
    tokens, weights = encode_example(inputs, target, BYTES)
    if not end:
        tokens, weights = tokens[:-1], weights[:-1]
    found = log_p(model, params, tokens)[np.arange(len(tokens)), tokens]
    return float((found * weights).sum()), int(weights.sum())


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """SCROLLS' Qasper and QuALITY, two languages of XL-Sum and PG-19, as they are published."""
    rng = np.random.default_rng(0)
    text = lambda size: " ".join(rng.choice(["ab", "cd", "a b", "dad", "é"], size))
    answer = lambda: " ".join(rng.choice(["ba", "aa", "d", "bbbbbb", "baaa", "dddddd"], 3))
    qasper, quality, answers = [], [], ["red", "a cat", "not (A)", "both of these"]
    for i in range(11):
        for k in range(1 + i % 3):
            row = {"id": f"q{i}", "pid": f"q{i}_{k}", "output": answer()}
            qasper.append({**row, "input": f"What {i}?\n\n{text(3 * i)}"} if not k else
                          {**row, "input": qasper[-1]["input"]})  # fmt: skip
        quality.append({"id": f"r{i}", "pid": f"r{i}_0", "output": answers[i % 4],
                        "input": QUESTION.format(i, text(2 * i + 1))})  # fmt: skip
    write(tmp_path / "scrolls" / "qasper" / "validation.jsonl", qasper)
    write(tmp_path / "scrolls" / "quality" / "validation.jsonl", quality)
    write(tmp_path / "scrolls" / "qasper" / "test.jsonl", [{**row, "output": None} for row in qasper])
    for language, count in (("french", 3), ("hausa", 5)):
        rows = [{"id": f"{language}{i}", "url": "u", "title": "t", "summary": answer(),
                 "text": text(i + 1)} for i in range(count)]  # fmt: skip
        write(tmp_path / "xlsum" / f"{language}_val.jsonl", rows)
    (tmp_path / "pg19" / "validation").mkdir(parents=True)
    for i, size in enumerate((40, 3, 17, 29, 11)):
        (tmp_path / "pg19" / "validation" / f"{i}.txt").write_text(text(size))
    return str(tmp_path)


def make(data, task, **changes):
    settings = dict(task_options={"data_dir": data}, max_new_tokens=NEW, batch_size=4, health=False)
    return TextTaskEvaluation(task, **{**settings, **changes})


def predictions(folder, step=7):
    lines = (folder / f"{step}.predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- the kinds


def test_written_answers_equal_a_dense_greedy_loop(data, model, params, tmp_path):
    found = make(data, "scrolls_qasper")(model, params, 7, tmp_path / "out")
    task = famx.data.get("scrolls_qasper", data_dir=data)
    examples = task.examples("validation")
    expected = [greedy(model, params, example["inputs"]) for example in examples]
    rows = predictions(tmp_path / "out")
    assert [row["prediction"] for row in rows] == expected and len(set(expected)) > 2
    assert {row["finished"] for row in rows} == {True, False}
    assert [(row["task"], row["index"], row["id"], row["references"]) for row in rows] == [
        ("scrolls_qasper", i, f"q{i}", examples[i]["references"]) for i in range(11)
    ]
    assert {len(row["references"]) for row in rows} == {1, 2, 3}
    assert found == task.evaluate("validation", expected) and 0 < found["rougeL"] < 100, expected


@pytest.mark.parametrize("end", [False, True])
def test_choices_are_ranked_by_their_likelihood(data, model, params, tmp_path, end):
    examples = famx.data.get("scrolls_quality", data_dir=data).examples("validation")
    chosen = {}
    for how in (None, "sum", "mean", "unconditional"):
        folder = tmp_path / str(how)
        settings = dict(length_normalize=how, **({"score_end": True} if end else {}))
        found = make(data, "scrolls_quality", **settings)(model, params, 7, folder)
        rows, hits = predictions(folder), 0
        for example, row in zip(examples, rows, strict=True):
            scores = []
            for choice in example["choices"]:
                score, count = likelihood(model, params, example["inputs"], choice, end)
                bare, _ = likelihood(model, params, "", choice, end)
                scores.append({"mean": score / count, "unconditional": score - bare}.get(how, score))
            assert row["prediction"] == pytest.approx(scores, abs=1e-3)
            hits += int(np.argmax(scores)) in example["answer"]
        assert found == {"accuracy": pytest.approx(100 * hits / 11)}
        chosen[how] = [int(np.argmax(row["prediction"])) for row in rows]
    assert chosen[None] == chosen["sum"] and chosen["sum"] != chosen["mean"]


@pytest.mark.parametrize("longest", [None, 50])
def test_documents_are_read_to_their_end(data, model, params, longest):
    found = make(data, "pg19", batch_size=2, max_prompt_tokens=longest)(model, params, 0)
    task = famx.data.get("pg19", data_dir=data, split="validation", max_tokens=longest)
    nats, hits, count, size = 0.0, 0, 0, 0
    for tokens, _ in task:
        p = log_p(model, params, tokens)[: len(tokens)]
        nats -= p[np.arange(len(tokens)), tokens].sum()
        hits += (p.argmax(-1) == tokens).sum()
        count += len(tokens)
        size += len(BYTES.decode_bytes(tokens))
    assert longest is None or count == 50 * 3 + len(task[1][0]) + len(task[4][0])
    bits = nats / math.log(2)
    expected = {"next_token_accuracy": 100 * hits / count, "bits_per_token": bits / count,
                "bits_per_byte": bits / size}  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4) and size < count


def text_task(name, rows, **options):
    """Registers a task of these examples."""
    settings = dict(kind="documents", open_split=lambda folder, split: rows, preprocess=dict)
    task = TextTask(name, **{**settings, "folders": ("/",), **options})
    return famx.data.register(name, lambda **options: dataclasses.replace(task, **options))


def test_bytes_are_those_of_the_text_whatever_the_vocabulary(model, params):
    text_task("words_for_evaluation", [{"inputs": "", "targets": "the chat est là", "references": []}])
    words = WordVocabulary(["the", "chat", "est", "là"])
    evaluation = make("", "words_for_evaluation", task_options={"vocabulary": words})
    free = make_model()  # without a vocabulary of its own
    evaluation.check(free)
    found = evaluation(free, params, 0)
    assert found["bits_per_byte"] * 16 == pytest.approx(found["bits_per_token"] * 5)
    with pytest.raises(ConfigError, match="is not the one that the model was trained with"):
        evaluation.check(model)


# ---------------------------------------------------------------- several tasks


def test_a_mixture_has_each_task_and_their_mean(data, model, params, tmp_path):
    options = {"data_dir": data, "languages": ["french", "hausa"], "rates": {"french": 9, "hausa": 1}}
    evaluation = make(data, "xlsum", task_options=options)
    found = evaluation(model, params, 7, tmp_path / "out")
    alone = {name: make(data, f"xlsum_{name}")(model, params, 0) for name in ("french", "hausa")}
    for metric in ("rouge1", "rouge2", "rougeL", "geometric_mean"):
        assert [found.pop(f"xlsum_{name}/{metric}") for name in alone] == [
            scores[metric] for scores in alone.values()]  # fmt: skip
        assert found.pop(metric) == pytest.approx(np.mean([s[metric] for s in alone.values()]))
    rows = predictions(tmp_path / "out")
    assert not found and alone["french"] != alone["hausa"], rows
    assert [(row["task"], row["id"]) for row in rows] == [
        (f"xlsum_{name}", f"{name}{i}") for name, n in (("french", 3), ("hausa", 5)) for i in range(n)
    ]


def test_suites_of_gpt3_are_scored_as_they_say(tmp_path, model, params):
    """Each task is scored on its own split by its own rule."""
    option = lambda i: {"option1_normalized": "a", "option2_normalized": "bad", "label": i % 2}
    write(tmp_path / "gpt3" / "wsc273" / "test.jsonl", [
        {"text": f"Dad{i} saw it c", "pronoun_start": 9, "pronoun_end": 11, **option(i)}
        for i in range(5)])
    write(tmp_path / "gpt3" / "boolq" / "validation.jsonl", [
        {"question": f"is {i}", "passage": "abc" * i, "label": i % 2} for i in range(6)])
    write(tmp_path / "gpt3" / "arc_easy" / "test.jsonl", [
        {"question": f"a{i}", "choices": {"text": ["a", "b", "dad a"], "label": ["A", "B", "C"]},
         "answerKey": "ABC"[i % 3]} for i in range(5)])  # fmt: skip
    write(tmp_path / "gpt3" / "lambada" / "test.jsonl", [{"passage": f"a b c{i} d"} for i in range(3)])

    def answer(task, example):
        if task.kind == "generation":
            return greedy(model, params, example["inputs"])
        pairs = task.requests(example)
        return task.choice_scores(example, [likelihood(model, params, *pair) for pair in pairs])

    answers = lambda task: [answer(task, example) for example in task.examples(task.split)]
    for name, members in (("gpt3_rank", ["wsc273", "boolq", "arc_easy"]), ("gpt3_gen", ["lambada"])):
        options = {"data_dir": str(tmp_path), "members": members}
        found = make("", name, task_options=options)(model, params, 0)
        suite = famx.data.get(name, **options)
        expected = suite.evaluate({task.name: answers(task) for task in suite.tasks})
        assert found == pytest.approx(expected)
        assert "average" in found and len(found) > len(members)
    options = {"data_dir": str(tmp_path)}
    split = lambda **changes: make("", "gpt3_arc_easy", task_options=options, **changes)
    for scoring in ("sum", "mean"):
        split(length_normalize=scoring)(model, params, 7, tmp_path / scoring)
        expected = answers(famx.data.get("gpt3_arc_easy", scoring=scoring, **options))
        rows = predictions(tmp_path / scoring)
        assert np.ravel([x["prediction"] for x in rows]) == pytest.approx(np.ravel(expected), abs=1e-3)
    with pytest.raises(ConfigError, match="validation split of task 'gpt3_arc_easy' needs .*n.jsonl"):
        split(split="validation").check(model)


# ---------------------------------------------------------------- what changes nothing


@pytest.mark.sampled(3)
@pytest.mark.parametrize("task", ["scrolls_qasper", "scrolls_quality", "pg19"])
def test_neither_order_nor_batch_size_changes_the_scores(data, model, params, task, tmp_path):
    first = make(data, task)(model, params, 7, tmp_path / "a")
    if task != "pg19":
        path = os.path.join(data, "scrolls", task.removeprefix("scrolls_"), "validation.jsonl")
        rows = open(path).read().splitlines()
        open(path, "w").write("\n".join(reversed(rows)) + "\n")
    for batch_size in (3, 16):
        folder = tmp_path / str(batch_size)
        again = make(data, task, batch_size=batch_size)(model, params, 7, folder)
        assert again == pytest.approx(first, rel=1e-4)
        if task == "scrolls_qasper":
            by_id = [{x["id"]: x["prediction"] for x in predictions(f)} for f in (tmp_path / "a", folder)]
            assert by_id[0] == by_id[1]
        assert folder.exists() == (task != "pg19")


def test_some_examples_are_drawn_with_the_seed(data, model, params, tmp_path):
    seen = {}
    for seed in (0, 1):
        make(data, "scrolls_qasper", examples=5, seed=seed)(model, params, 7, tmp_path / str(seed))
        seen[seed] = [row["index"] for row in predictions(tmp_path / str(seed))]
        assert seen[seed] == sorted(set(seen[seed])) and len(seen[seed]) == 5
    assert seen[0] != seen[1]
    whole = make(data, "scrolls_qasper", examples=99)(model, params, 7, tmp_path / "all")
    assert len(predictions(tmp_path / "all")) == 11
    assert whole == make(data, "scrolls_qasper")(model, params, 0)


def test_prompts_are_cut_as_the_task_cuts_them(data, model, params, tmp_path):
    examples = famx.data.get("scrolls_qasper", data_dir=data).examples("validation")
    found = {}
    for cut in ("left", "middle"):
        folder, options = tmp_path / cut, {"data_dir": data, "cut": cut}
        make(data, "scrolls_qasper", task_options=options, max_prompt_tokens=9)(model, params, 7, folder)
        found[cut] = [row["prediction"] for row in predictions(folder)]
        again = make(data, "scrolls_qasper", task_options={**options, "max_tokens": 9})
        again(model, params, 8, folder)
        assert [row["prediction"] for row in predictions(folder, 8)] == found[cut]
        for example, prediction in zip(examples, found[cut]):
            data_ = example["inputs"].encode()
            kept = data_ if len(data_) <= 9 else data_[-9:] if cut == "left" else data_[:5] + data_[-4:]
            assert prediction == greedy(model, params, kept)
    assert found["left"] != found["middle"]


def test_only_a_few_batches_of_examples_are_read_at_once(data, model, params, monkeypatch):
    read, most = [], []
    get, answer = Examples.__getitem__, text_answers.TextAnswers.__call__

    def spy_answer(self, params, examples):
        most.append(len(read))
        found = answer(self, params, examples)
        read.clear()
        return found

    monkeypatch.setattr(Examples, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    monkeypatch.setattr(text_answers.TextAnswers, "__call__", spy_answer)
    make(data, "scrolls_qasper", batch_size=1)(model, params, 0)
    assert most == [4, 4, 3]


def test_a_model_is_compiled_once(data, model, params):
    evaluation = make(data, "scrolls_qasper")
    evaluation(model, params, 0)
    answers = text_answers.answers_of(model.module, ByteVocabulary(), 4, NEW)
    assert answers.streamer is streamer_of(model.module)
    before = answers._write._cache_size(), answers.streamer._read_part._cache_size()
    assert before[0] == 1
    again = make_model(vocabulary=ByteVocabulary())
    make(data, "scrolls_qasper")(again, params, 1)
    assert (answers._write._cache_size(), answers.streamer._read_part._cache_size()) == before


# ---------------------------------------------------------------- the memory


def answer_scores(model, params, documents, zero_memory):
    """Bits per token and share of right tokens of the answers, block by block."""
    size, sums = model.config.block_size, np.zeros(3)
    for tokens, weights in documents:
        row = np.zeros((1, WIDTH), np.int32)
        row[0, : len(tokens)] = [1, *tokens[:-1]]
        state = model.initial_state(params, 1)
        for start in range(0, len(tokens), size):
            if zero_memory:
                state = state.zero_memory()
            piece = row[:, start : start + size]
            logits, state = reader(model.module)({"params": params}, piece, state)
            p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
            for k, token in enumerate(tokens[start : start + size]):
                right = p[k].argmax() == token
                sums += weights[start + k] * np.array([-p[k, token], right, 1])
    return {"bits_per_token": sums[0] / sums[2] / math.log(2), "accuracy": sums[1] / sums[2]}


@pytest.mark.parametrize("task, limit, cut", [("scrolls_qasper", 60, 60), ("pg19", 10**5, None)])
def test_the_memory_is_judged_by_the_answers(data, model, params, task, limit, cut):
    found = make(data, task, health=True, health_tokens=limit)(model, params, 0)
    documents, size = [], 0
    for document in famx.data.get(task, data_dir=data).documents("validation", max_tokens=cut):
        documents.append(document)
        size += len(document[0])
        if size >= limit:
            break
    for how, zero in (("kept", False), ("zeroed", True)):
        for name, value in answer_scores(model, params, documents, zero).items():
            assert found[f"memory/{how}/{name}"] == pytest.approx(value, rel=1e-4), (how, name)
    assert found["memory/zeroed/bits_per_token"] != pytest.approx(found["memory/kept/bits_per_token"])
    assert any("layer_" in name for name in found)
    scores = {name: value for name, value in found.items() if not name.startswith("memory/")}
    assert scores == make(data, task)(model, params, 0)


def test_a_mixture_has_one_memory_and_a_model_without_has_none(data, model, params):
    options = {"data_dir": data, "languages": ["french", "hausa"]}
    found = make(data, "xlsum", task_options=options, health=True, examples=1)(model, params, 0)
    assert "memory/kept/bits_per_token" in found and not any("/memory/" in name for name in found)
    plain = make_model(memory=Memory(), vocabulary=BYTES)
    found = make(data, "scrolls_qasper", health=True, examples=1)(plain, make_params(plain.module), 0)
    assert not any("memory" in name for name in found)


# ---------------------------------------------------------------- where it is called


def test_checkpoints_are_evaluated_and_their_predictions_written(data, model, params, tmp_path):
    directory = tmp_path / "model"
    for step in (3, 4):
        write_model_dir(directory, model, params, BYTES, step)
    evaluations = {
        "qasper": make(data, "scrolls_qasper", examples=3),
        "pg19": make(data, "pg19", examples=2),
    }
    found = evaluate(str(directory), evaluations, checkpoints="all")
    out = directory / "eval"
    names = {path.name for path in (out / "qasper").iterdir()}
    assert names == {f"{step}{end}" for step in (3, 4) for end in (".json", ".predictions.jsonl")}
    assert {path.name for path in (out / "pg19").iterdir()} == {"3.json", "4.json"}
    result = json.loads((out / "qasper" / "4.json").read_text())
    assert result["scalars"] == found["qasper"][4]
    assert result["settings"]["task_options"] == {"data_dir": data}
    assert "writes_predictions" not in result["settings"]
    assert [len(predictions(out / "qasper", step)) for step in (3, 4)] == [3, 3]
    assert not list(out.glob("*/.*"))


def test_it_is_the_evaluation_of_a_training_run(data, tmp_path):
    made = make_model(vocabulary=BYTES)
    write(tmp_path / "own.jsonl", [{"inputs": "ab? ", "targets": ["abba", "baab"]}] * 40)
    options = {"files": str(tmp_path / "own.jsonl")}
    evaluation = make("", "own_records", task_options=options, max_new_tokens=4)
    loop.train(make_run(
        model_dir=str(tmp_path / "run"), model=made, task="own_records", lengths={"targets": 16},
        options=options, evaluation=evaluation,
    ))  # fmt: skip
    from famx.training.run_log import read_metrics

    lines = [line for line in read_metrics(str(tmp_path / "run")) if line.get("split") == "eval"]
    assert lines and {"rougeL", "f1", "accuracy"} <= set(lines[-1])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "task, changes, sentence",
    [
        ("scrolls_qaspr", {}, "task 'scrolls_qaspr': .* nearest name is 'scrolls_qasper'"),
        ("scrolls_qasper", dict(task_options={"data": "x"}), "has no option 'data'"),
        ("scrolls_qasper", dict(task_options={"data_dir": "/no"}), "needs /no/scrolls/qasper/valid"),
        ("scrolls_qasper", dict(split="tets"), "has no split 'tets'; the nearest name is 'test'"),
        ("scrolls_qasper", dict(split="test"), "Example 0 of the test split of 'scrolls_qasper' has no"),
        ("passkey_words", dict(task_options={}), "is not a text task: use TaskEvaluation or"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_evaluated_are_refused(data, model, task, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(data, task, **changes).check(model)


def test_vocabularies_that_do_not_fit_are_refused(data):
    evaluation, plain = make(data, "scrolls_qasper"), make_model()
    with pytest.raises(ConfigError, match="needs a vocabulary, and the model has none: name one in"):
        evaluation.check(plain)
    make(data, "scrolls_qasper", task_options={"data_dir": data, "vocabulary": "bytes"}).check(plain)
    small = make_model(vocab_size=258, vocabulary=BYTES)
    with pytest.raises(ConfigError, match="has 259 tokens, the model's only 258"):
        evaluation.check(small)

    class WithoutBegin(ByteVocabulary):
        bos_id = None

    plain = make_model(vocabulary=WithoutBegin())
    with pytest.raises(ConfigError, match="has no token that begins a text"):
        evaluation.check(plain)


def test_examples_without_an_answer_are_left_out_and_counted(model, params, tmp_path, capsys):
    good = {"inputs": "a", "targets": "b", "references": ["b"]}
    lost = [{**good, "references": []}, {**good, "references": ["  "]}, {**good, "targets": 3.5}]
    settings = dict(kind="generation", splits=("validation",), split="validation")
    text_task("answers_lost_for_evaluation", [lost[0], good, good, lost[1], good, lost[2]], **settings)
    text_task("answers_there_for_evaluation", [good, good, good], **settings)
    evaluation = make("", "answers_lost_for_evaluation", task_options={}, batch_size=1)
    evaluation.check(model)
    found = evaluation(model, params, 7, tmp_path / "out")
    whole = make("", "answers_there_for_evaluation", task_options={}, batch_size=1)(model, params, 7)
    assert found == {**whole, "left_out": 3.0}
    assert [row["index"] for row in predictions(tmp_path / "out")] == [1, 2, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert "answers_lost_for_evaluation, validation: 3 of 6 examples left out; the first is" in line
    assert "example 0: Record 0 has no answer." in line


def test_documents_that_cannot_be_read_are_left_out(model, params, tmp_path, capsys):
    rows = [{"text": "a cat"}, {"text": None}, {"text": "dad"}]
    for name, kept in (("all", rows), ("good", [rows[0], rows[2]])):
        write(tmp_path / f"{name}.jsonl", kept)
    scores = {}
    for name in ("all", "good"):
        path = str(tmp_path / f"{name}.jsonl")
        options = {"files": path, "validation_files": path}
        scores[name] = make("", "own_records", task_options=options)(model, params, 0)
    assert scores["all"].pop("left_out") == 1 and scores["all"] == scores["good"]
    assert f"Line 2 of {tmp_path / 'all.jsonl'}: Column 'text'" in capsys.readouterr().err


def test_predictions_are_kept_when_an_evaluation_fails(model, params, tmp_path, monkeypatch):
    good = {"inputs": "a", "targets": "b", "references": ["b"]}
    settings = dict(kind="generation", splits=("validation",), split="validation")
    text_task("answers_for_failing_evaluation", [good] * 9, **settings)
    evaluation, answer, calls = make("", "answers_for_failing_evaluation", task_options={}), None, []
    answer = text_answers.TextAnswers.__call__

    def fail_later(self, params, examples):
        calls.append(len(examples))
        if len(calls) > 1:
            raise RuntimeError("the machine is on fire")
        return answer(self, params, examples)

    monkeypatch.setattr(text_answers.TextAnswers, "__call__", fail_later)
    evaluation.batch_size = 1
    with pytest.raises(RuntimeError, match="on fire"):
        evaluation(model, params, 7, tmp_path / "out")
    (kept,) = (tmp_path / "out").iterdir()
    assert kept.name == "7.predictions.jsonl.partial"
    assert len(kept.read_text().splitlines()) == 4


def test_a_record_of_wrong_type_is_named(model, params, tmp_path):
    write(tmp_path / "own.jsonl", [{"inputs": "a", "targets": 3}] * 9)
    own = make("", "own_records", task_options={"files": str(tmp_path / "own.jsonl")})
    with pytest.raises(ConfigError, match="Column 'targets' contains '3', which is not text"):
        own.check(model)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        *((({name: 0}, f"TextTaskEvaluation.{name} must be a whole number of at least 1( or None)?,"))
          for name in ("examples", "max_new_tokens", "batch_size", "max_prompt_tokens", "health_tokens")),
        (dict(length_normalize="means"), "must be one of 'sum', 'mean', 'unconditional', or None, not"),
        (dict(seed=-1), "TextTaskEvaluation.seed must be a whole number of at least 0, not -1."),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextTaskEvaluation("scrolls_qasper", **changes)


@pytest.mark.slow
def test_the_main_evaluates_text_tasks(data, model, params, tmp_path):
    directory = write_model_dir(tmp_path / "model", model, params, BYTES, 5)

    def run(*bindings):
        given = (
            f"CHECKPOINT_PATH='{directory}'",
            "EVALUATIONS={'qasper': @TextTaskEvaluation()}",
            "TextTaskEvaluation.task='scrolls_qasper'",
            f"TextTaskEvaluation.task_options={{'data_dir': '{data}'}}",
            "TextTaskEvaluation.max_new_tokens=6",
            *bindings,
        )
        flags = ["--gin_file=gin_configs/runs/eval.gin", *(f"--gin.{x}" for x in given)]
        return subprocess.run(
            [sys.executable, "-m", "famx.eval", *flags], cwd=gin_utils.gin_root(), text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True,
        )  # fmt: skip

    done = run()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    scalars = json.loads((tmp_path / "model" / "eval" / "qasper" / "5.json").read_text())["scalars"]
    assert shown["rougeL"] == [f"{scalars['rougeL']:.4f}"]
    assert "memory/zeroed/bits_per_token" in shown
    rows = predictions(tmp_path / "model" / "eval" / "qasper", 5)
    examples = famx.data.get("scrolls_qasper", data_dir=data).examples("validation")
    assert [row["prediction"] for row in rows] == [greedy(model, params, x["inputs"]) for x in examples]

    refused = run("TextTaskEvaluation.split='test'", "RE_EVALUATE=True")
    last = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode == 2 and last.startswith("famx: error: Example 0 of the test split"), last
