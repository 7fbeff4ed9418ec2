"""Evaluations compared with slow direct computations, and the files of a report."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from modules.helpers import random_params
from pretrained import write_tokenizer
from tiny import make_model, make_params, make_run, make_tokens, passkey

from famx.analysis import MemoryMonitor
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, PasskeyTask, TextFiles
from famx.data.probes import CopyProbe
from famx.data.probes.passkey_text import passkey_words
from famx.data.vocabularies import WordVocabulary, as_vocabulary
from famx.decoding import Sampling
from famx.evaluation import (
    PROBES,
    STANDARD_PROBES,
    PasskeyEvaluation,
    TaskEvaluation,
    TextEvaluation,
    TextTaskEvaluation,
)
from famx.evaluation.common import streamer_of
from famx.evaluation.passkey import _scored
from famx.evaluation.text import _opening
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Memory
from famx.training import loop
from famx.training.run import Data
from famx.training.run_log import read_metrics

BLOCK = 16  # room for a statement
MODEL = make_model(block_size=BLOCK)
PARAMS = make_params(MODEL.module)
apply = jax.jit(MODEL.module.apply)


def make_evaluation(**changes):
    settings = dict(task=passkey(), blocks=(3, 5), report_blocks=(2, 3, 5), examples=8)
    return PasskeyEvaluation(**{**settings, **changes})


def probe_task(evaluation, probe):
    return dataclasses.replace(
        passkey(),
        **{"split": "eval", "seed": evaluation.seed, "depth": 0.0, "block_size": BLOCK, **PROBES[probe]},
    )


@pytest.fixture(scope="module")
def oracle_params():
    """Parameters under which some of the answers are right: the head prefers the digits."""
    digits = sorted({int(i) for i in passkey().batch(range(40), 40)["answer"].ravel()})
    embedding = np.array(PARAMS["embedding"])
    scale = np.full((len(embedding), 1), 0.05, np.float32)
    scale[digits] = 2.0
    return {**PARAMS, "embedding": embedding * scale}


def test_passkey_numbers_equal_a_direct_evaluation(oracle_params):
    evaluation = make_evaluation(examples=24)
    scores = evaluation(MODEL, oracle_params, 0)
    scores = {name: score for name, score in scores.items() if not name.startswith("memory/")}
    assert set(scores) == {f"{probe}/{blocks}" for probe in STANDARD_PROBES for blocks in (3, 5)}
    for name, score in scores.items():
        probe, blocks = name.split("/")
        batch = probe_task(evaluation, probe).batch(range(24), int(blocks) * BLOCK)
        logits, _ = apply({"params": oracle_params}, batch["decoder_input_tokens"])
        best = np.argmax(logits, axis=-1)
        right = [
            best[i, start : start + 1].tolist() == batch["answer"][i].tolist()
            for i, start in enumerate(batch["answer_start"])
        ]
        assert score == pytest.approx(np.mean(right))
    assert len(set(scores.values())) > 1 and max(scores.values()) > 0, scores


def test_probes_are_what_they_are_called():
    evaluation, length = make_evaluation(), 16 * BLOCK
    rows = {p: probe_task(evaluation, p).batch(range(8), length) for p in STANDARD_PROBES}
    examples = [probe_task(evaluation, "overwrite").example(i, length) for i in range(8)]
    for example in examples:
        first, second = example["positions"]
        assert first == 0 and BLOCK <= second < length
        assert example["answer"].tolist() != example["tokens"][first + 4 : first + 5].tolist()
    assert len(probe_task(evaluation, "hold").example(0, length)["positions"]) == 1
    filler = rows["hold_repeated"]["decoder_target_tokens"][:, 2 * BLOCK : 4 * BLOCK]
    assert (filler == filler[0]).all()
    filler = rows["hold"]["decoder_target_tokens"][:, 2 * BLOCK : 4 * BLOCK]
    assert not (filler == filler[0]).all()


def test_probes_for_what_a_run_trained_on():
    """Each differs from `hold` in one thing, also if the task draws it."""
    task = PasskeyTask("bytes", header=0.5, filler=("repeated", "python_stdlib"), depth=None, padding=99)
    evaluation = PasskeyEvaluation(task, probes=tuple(PROBES))
    model = make_model(block_size=512)
    rows = {
        probe: [evaluation._task(model, probe).example(i, 4096) for i in range(6)] for probe in PROBES
    }
    for probe, examples in rows.items():
        for example in examples:
            text = task.vocab.decode(example["tokens"])
            assert text.startswith("There is an important info") == (probe != "hold_headerless")
            assert ("The grass is green." in text) == (probe == "hold_repeated")
            assert len(example["positions"]) == (2 if probe == "overwrite" else 1)
    starts = {probe: {x["positions"][0] for x in examples} for probe, examples in rows.items()}
    asked = {probe: {x["answer_start"] for x in examples} for probe, examples in rows.items()}
    unaligned = asked.pop("hold_unaligned")
    assert len(unaligned) > 3 and 7 * 512 < min(unaligned) - task.asked_width
    assert set.union(*asked.values()) == {4096 - 5}
    assert starts["hold_headerless"] == {0} and len(starts["hold"]) == len(starts["hold_text"]) == 1
    assert len(starts["hold_anywhere"]) == 6 and max(starts["hold_anywhere"]) > 1000
    words = [set(task.vocab.decode(x["tokens"][1000:3000]).split()) for x in rows["hold_text"]]
    assert not any("anchor" in found and "basket" in found for found in words)
    with pytest.raises(ConfigError, match=r"probes\[0\] must be one of 'hold', .*, not 'holding'"):
        PasskeyEvaluation(probes=("holding",))
    with pytest.raises(ConfigError, match="'python_stdlib' is real text"):
        PasskeyEvaluation(passkey(), probes=("hold_text",)).check(MODEL)


def test_without_a_task_it_is_the_papers_in_the_models_vocabulary(tmp_path):
    vocabulary = as_vocabulary(write_tokenizer(tmp_path, "byte_pair_numbers"))
    model = make_model(vocabulary=vocabulary, vocab_size=vocabulary.vocab_size, block_size=64)
    probes = ("hold", "hold_unaligned")
    evaluation = PasskeyEvaluation(blocks=(8,), examples=2, health=False, probes=probes)
    evaluation.check(model)
    task = evaluation._task(model, "hold")
    assert task == PasskeyTask(vocabulary, filler="random_words", block_size=64, split="eval", seed=1)
    scores = evaluation(model, make_params(model.module), 0)
    assert set(scores) == {"hold/8", "hold_unaligned/8"}
    plain = make_model(vocab_size=128, block_size=64)
    assert evaluation._task(plain, "hold").vocab == PasskeyTask().vocab
    with pytest.raises(ConfigError, match="cannot spell PassKey's text"):
        evaluation.check(make_model(vocabulary=WordVocabulary("abc"), vocab_size=128, block_size=64))


def test_evaluation_never_reads_a_training_row():
    """Even with the seed and the indices of training, evaluation rows differ from training rows."""
    evaluation, length = make_evaluation(seed=0), 12 * BLOCK
    training = dataclasses.replace(probe_task(evaluation, "hold"), split="train")
    seen = {row.tobytes() for row in training.batch(range(200), length)["decoder_target_tokens"]}
    rows = probe_task(evaluation, "hold").batch(range(200), length)["decoder_target_tokens"]
    assert len(seen) == 200 and not seen & {row.tobytes() for row in rows}


def test_the_task_is_asked_in_its_eval_split(monkeypatch):
    from famx.data.probes.passkey import PasskeyTask

    asked, batch = [], PasskeyTask.batch

    def spy(task, indices, length):
        asked.append((task.split, task.seed, task.block_size, task.digits, len(indices)))
        return batch(task, indices, length)

    monkeypatch.setattr(PasskeyTask, "batch", spy)
    make_evaluation(blocks=(3,), seed=5)(MODEL, PARAMS, 0)
    assert asked == [("eval", 5, BLOCK, 1, 8)] * 3


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    evaluation = make_evaluation()
    monkeypatch.setattr(PasskeyEvaluation, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="Cannot write the report to .*/file/below: Not a directory"):
        evaluation.report(MODEL, PARAMS, str(tmp_path / "file" / "below"))


def test_report(tmp_path):
    tmp_path = tmp_path / "is" / "made"
    evaluation = make_evaluation(train_blocks=3)
    text = evaluation.report(MODEL, PARAMS, str(tmp_path))
    scores, losses = evaluation._measure(MODEL, PARAMS, (2, 3, 5))
    assert {k: v for k, v in scores.items() if k.startswith("memory/")} == {
        f"memory/{k}": v for k, v in json.loads((tmp_path / "passkey.json").read_text())["memory"].items()
    }
    assert "overwrite/2" not in scores  # two statements do not fit: no number is made up
    result = json.loads((tmp_path / "passkey.json").read_text())
    assert result["exact_match"]["hold"] == {str(b): scores[f"hold/{b}"] for b in (2, 3, 5)}
    assert set(result["exact_match"]["overwrite"]) == {"3", "5"}
    of_answers = result["answer_loss"]
    assert of_answers["kept"]["hold"] == {str(b): losses["kept"][f"hold/{b}"] for b in (2, 3, 5)}
    assert of_answers["kept"].keys() == of_answers["zeroed"].keys() == result["exact_match"].keys()
    assert of_answers["kept"]["hold"]["5"] != of_answers["zeroed"]["hold"]["5"]
    assert {k: result[k] for k in ("block_size", "train_blocks", "examples", "memory_config")} == {
        "block_size": 16, "train_blocks": 3, "examples": 8,
        "memory_config": Fam(2).to_dict()}  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "Exact match over 8 fresh documents per cell, streamed:"
    assert lines[1].split() == ["blocks", "tokens", "hold", "hold_repeated", "overwrite"]
    assert [line.split()[:2] for line in lines[2:5]] == [["2", "32"], ["3", "48"], ["5", "80"]]
    assert lines[2].split()[-1] == "-"
    assert lines[3].split()[2] == f"{scores['hold/3']:.3f}"
    from matplotlib import image

    picture = image.imread(tmp_path / "passkey.png")
    assert picture.ndim == 3 and picture.std() > 0.01


def test_a_sample_of_the_writing_and_the_command_to_chat(tmp_path):
    (tmp_path / "a.txt").write_text("The sun is yellow.\n\nThe sky is blue. " * 9)
    documents, vocabulary = TextFiles(str(tmp_path / "a.txt"), split="validation"), ByteVocabulary()
    model = make_model(vocab_size=259, block_size=BLOCK, vocabulary=vocabulary)
    params = make_params(model.module)
    report = lambda **changes: TextEvaluation(documents, **changes).report(model, params, "/tmp/my run")
    text = report(sample_tokens=120)
    assert text == report(sample_tokens=120) and all(len(line) <= 80 for line in text.splitlines())
    assert all(c.isprintable() or c == "\n" for c in text)
    begins, *lines, talk = text.splitlines()
    assert begins == "How a held-out document begins:"
    assert talk == "Talk to it: famx chat --checkpoint='/tmp/my run' --temperature=0.8"
    goes_on = lines.index("How the model continues (temperature 0.8):")
    tokens = _opening(documents, 64)
    begin = vocabulary.decode(tokens[0, 1:].tolist())
    assert "".join(begin.split()) == "".join("".join(lines[:goes_on]).split()) != ""
    streamer = streamer_of(model.module)
    logits, state = streamer.read(params, streamer.initial_state(params, 1), tokens)
    sampling = Sampling(120, 0.8, stop_tokens=tuple(vocabulary.end_ids))
    out = streamer.generate(params, logits, state, sampling)
    ids = [int(i) for i in np.asarray(out.tokens)[0, : int(out.lengths[0])]]
    expected = vocabulary.decode([i for i in ids if i not in {vocabulary.bos_id, *vocabulary.end_ids}])
    shown = [c for c in "".join(lines[goes_on + 1 :]) if c.isprintable() and c not in " \ufffd"]
    assert shown == [c for c in expected if c.isprintable() and c not in " \ufffd"]
    assert report(sample_tokens=0) == talk
    bare = dataclasses.replace(model, vocabulary=None)
    assert TextEvaluation(documents).report(bare, params, "/tmp/x") == ""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["byte_pair_numbers", "sentencepiece"])
def test_passkey_of_a_tokenizer_equals_a_direct_evaluation(tmp_path, name):
    """Answers have different numbers of tokens; one is right if all its tokens are."""
    vocabulary = as_vocabulary(write_tokenizer(tmp_path, name))
    task = PasskeyTask(vocabulary, digits=1, header=False)
    size, examples = 64, 24
    model = make_model(vocab_size=vocabulary.vocab_size, block_size=size)
    jitted = jax.jit(model.module.apply)
    params = dict(make_params(model.module))
    liked = {int(i) for row in task.batch(range(40), 4 * size)["answer"] for i in row}
    scale = np.full((vocabulary.vocab_size, 1), 0.05, np.float32)
    scale[sorted(liked - {vocabulary.pad_id})] = 2.0
    params["embedding"] = params["embedding"] * scale
    evaluation = PasskeyEvaluation(task, (3,), examples=examples, health=False, probes=tuple(PROBES))
    scores = evaluation(model, params, 0)
    assert set(scores) == {f"{probe}/3" for probe in PROBES}
    for probe, options in PROBES.items():
        common = dict(split="eval", seed=1, depth=0.0, block_size=size)
        if probe == "hold_unaligned":
            common["padding"] = size - task.asked_width
        batch = dataclasses.replace(task, **{**common, **options}).batch(range(examples), 3 * size)
        best = np.argmax(jitted({"params": params}, batch["decoder_input_tokens"])[0], axis=-1)
        right, expected = [], batch["answer"].copy()
        for i, start in enumerate(batch["answer_start"]):
            count = int(np.sum(batch["answer"][i] != vocabulary.pad_id))
            expected[i, :count] = best[i, start : start + count]
            right.append(expected[i].tolist() == batch["answer"][i].tolist())
        found = _scored(model, params, {**batch, "answer": expected}, vocabulary.pad_id)
        assert found.right.all() and not right == [True] * examples
        assert scores[f"{probe}/3"] == pytest.approx(np.mean(right))


# ---------------------------------------------------------------- text


class Documents(list):
    def num_tokens(self, i):
        return len(self[i])


@pytest.mark.parametrize("batch_size, length", [(2, 16), (8, 39), (3, 4)])
def test_bits_per_token_equal_a_direct_computation(batch_size, length):
    """Every document is read once and completely, also if there are fewer documents than lanes."""
    documents = Documents(make_tokens(size, seed=size) for size in (50, 16, 7, 33, 64))
    nats, hits = [], 0
    for document in documents:
        row = np.zeros((1, 64), np.int32)
        row[0, 0], row[0, 1 : len(document)] = 1, document[:-1]
        log_p = np.asarray(jax.nn.log_softmax(apply({"params": PARAMS}, row)[0]))
        log_p = log_p[0, : len(document)]
        nats.append(-log_p[np.arange(len(document)), document])
        hits += (log_p.argmax(-1) == document).sum()
    bits = lambda parts: pytest.approx(np.concatenate(parts).mean() / math.log(2), rel=1e-4)
    starts = (64, 20, 5, 33, 5)
    evaluation = TextEvaluation(documents, batch_size, length, max_tokens=None, distances=starts)
    got = evaluation(MODEL, PARAMS, 0)
    assert got["bits_per_token"] == bits(nats)
    assert got["accuracy"] == pytest.approx(hits / len(np.concatenate(nats)), abs=1e-6)
    for start, end in ((0, 5), (5, 20), (20, 33), (33, 64)):
        assert got[f"bits_per_token/from/{start}"] == bits([x[start:end] for x in nats])
    assert "bits_per_token/from/64" not in got, "no document is that long"
    assert "bits_per_token/from/0" not in dataclasses.replace(evaluation, distances=())(MODEL, PARAMS, 0)


def test_max_tokens_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("the grass is green. " * 40)
    model = make_model(vocab_size=260)
    params = make_params(model.module)
    evaluation = TextEvaluation(TextFiles(str(tmp_path / "a.txt"), split="validation"), length=16)
    whole = evaluation(model, params, 0)
    assert whole["bits_per_token"] > 0 and evaluation(model, params, 1) == whole
    some = dataclasses.replace(evaluation, max_tokens=16)(model, params, 0)
    assert some["bits_per_token"] != whole["bits_per_token"]


def test_a_model_is_compiled_once():
    evaluation = make_evaluation(blocks=(3,))
    evaluation(MODEL, PARAMS, 0)
    streamer = streamer_of(MODEL.module)
    before = streamer._read_blocks._cache_size()
    again = make_model(block_size=BLOCK)  # an equal model, as resuming makes it
    evaluation(again, PARAMS, 1)
    assert streamer_of(again.module) is streamer
    assert streamer._read_blocks._cache_size() == before


def test_what_training_adds_to_the_loss_is_no_part_of_the_bits():
    documents = Documents([make_tokens(50)])
    score = lambda **changes: TextEvaluation(documents, 1, 16, health=False)(
        DecoderModel(MODEL.module, **changes), PARAMS, 0
    )
    assert score(z_loss=1.0) == score()
    assert score(loss_chunk=5)["bits_per_token"] == pytest.approx(score()["bits_per_token"], rel=1e-5)


def test_lanes_begin_with_the_vocabularys_own_bos(monkeypatch):
    class Other(ByteVocabulary):
        bos_id = 2

    documents = Documents([make_tokens(50)])
    score = lambda: TextEvaluation(documents, 1, 64, health=False)(MODEL, PARAMS, 0)["bits_per_token"]
    first = score()
    documents.vocab = Other()
    row = np.zeros((1, 50), np.int32)
    row[0, 0], row[0, 1:] = 2, documents[0][:-1]
    log_p = np.asarray(jax.nn.log_softmax(apply({"params": PARAMS}, row)[0]))[0]
    nats = -log_p[np.arange(50), documents[0]].sum()
    assert score() == pytest.approx(nats / 50 / math.log(2), rel=1e-4) and score() != first


# ---------------------------------------------------------------- any task


reader = functools.cache(lambda module: jax.jit(module.apply))


def direct(model, params, batch, zero_memory=False):
    """Log-probabilities of the targets, whether each is the likeliest token, and of all tokens."""
    tokens, size = batch["decoder_input_tokens"], model.config.block_size
    state = model.initial_state(params, len(tokens))
    log_p = []
    for start in range(0, tokens.shape[1], size):
        if zero_memory:
            state = state.zero_memory()
        logits, state = reader(model.module)({"params": params}, tokens[:, start : start + size], state)
        log_p.append(np.asarray(jax.nn.log_softmax(logits)))
    log_p = np.concatenate(log_p, axis=1)
    targets = batch["decoder_target_tokens"]
    picked = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return picked, log_p.argmax(-1) == targets, log_p


def task_scores(log_p, right, _, batch):
    weights = batch["decoder_loss_weights"]
    loss = -(log_p * weights).sum() / weights.sum()
    matched = [row[start:].all() for row, start in zip(right | (weights == 0), batch["answer_start"])]
    return {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "accuracy": (right * weights).sum() / weights.sum(),
        "exact_match": np.mean(matched),
    }


def make_task_evaluation(**changes):
    options = {"digits": 1, "header": False, "filler": "random_words"}
    settings = dict(task="passkey_words", length=53, task_options=options, examples=10, batch_size=4)
    return TaskEvaluation(**{**settings, **changes})


def test_task_scores_equal_a_direct_computation(oracle_params):
    """The last batch is not full, and the length ends inside a block."""
    task = passkey(split="eval", seed=1)
    whole, first = task.batch(range(10), 53), task.batch(range(4), 53)
    got = make_task_evaluation(health_tokens=1)(MODEL, oracle_params, 0)
    expected = task_scores(*direct(MODEL, oracle_params, whole), whole)
    for how, zero in (("kept", False), ("zeroed", True)):
        scores = task_scores(*direct(MODEL, oracle_params, first, zero), first)
        expected |= {f"memory/{how}/{name}": value for name, value in scores.items()}
    figures = {k for k in got if "layer_" in k or "/update_" in k}
    assert figures and set(got) - figures == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert got["memory/zeroed/loss"] != pytest.approx(got["memory/kept/loss"], rel=1e-3)


def test_padding_after_an_answer_is_not_scored(oracle_params):
    """Answers that are right as a whole are found in rows with padding, too."""
    options = {"digits": 1, "header": False, "filler": "random_words", "padding": 30}
    evaluation = make_task_evaluation(task_options=options, health_tokens=1, examples=64)
    task = passkey(split="eval", seed=1, padding=30)
    batch = task.batch(range(64), 53)
    assert len(set(batch["answer_start"])) > 3
    log_p, right, likely = direct(MODEL, oracle_params, batch)
    expected = task_scores(log_p, right, likely, batch)
    assert 0 < expected["exact_match"] < 1
    got = evaluation(MODEL, oracle_params, 0)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("memory", [Fam(length=4), Memory()], ids=["fam", "none"])
def test_a_task_evaluation_may_have_another_window(memory):
    model = make_model(block_size=BLOCK, memory=memory, memory_segments=1)
    params = make_params(model.module)
    wider = make_model(block_size=BLOCK, memory=memory, memory_segments=3)
    evaluation = TaskEvaluation(passkey(), length=5 * BLOCK, examples=6, batch_size=3)
    asked = dataclasses.replace(evaluation, memory_segments=3)(model, params, 0)
    assert asked == evaluation(wider, params, 0)
    assert asked["loss"] != evaluation(model, params, 0)["loss"]


def test_more_health_tokens_compare_more_batches(oracle_params):
    got = make_task_evaluation(health_tokens=10**6, examples=8)(MODEL, oracle_params, 0)
    assert all(got[f"memory/kept/{name}"] == got[name] for name in ("loss", "accuracy", "exact_match"))


def test_a_task_without_an_answer_has_no_exact_match(monkeypatch):
    batch = CopyProbe.batch
    monkeypatch.setattr(CopyProbe, "batch", lambda *a: {k: v for k, v in batch(*a).items()
                                                        if k != "answer_start"})  # fmt: skip
    evaluation = make_task_evaluation(task="passkey_words", health=False)
    evaluation.__dict__["_task"] = CopyProbe(split="eval")
    evaluation = dataclasses.replace(evaluation, length=evaluation._task.min_length)
    evaluation.__dict__["_task"] = CopyProbe(split="eval")
    assert set(evaluation(MODEL, PARAMS, 0)) == {"loss", "bits_per_token", "accuracy"}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(task="passkey_wrods"), "The nearest name is 'passkey_words'"),
        (dict(task_options={"digit": 1}), "has no option 'digit'"),
        (dict(task_options={"digits": 0}), r"TaskEvaluation.task_options\['digits'\] must be a whole"),
        (dict(task="own_text", task_options={}), "use TextEvaluation, or choose another task"),
        (dict(length=20), "length is 20, but the task 'passkey_words' needs at least"),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_task_evaluation(**changes).check(MODEL)
    make_task_evaluation().check(MODEL)


@pytest.mark.parametrize("name", ["length", "examples", "batch_size"])
def test_sizes_of_a_task_evaluation_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"TaskEvaluation.{name} must be a whole number of at least"):
        make_task_evaluation(**{name: 0})


# ---------------------------------------------------------------- the memory


@pytest.mark.parametrize(
    "sizes", [dict(num_layers=2), dict(memory_segments=2, memory=Fam(2, positions="zero"), qkv_bias=True)]
)
def test_answers_without_memory_equal_an_obvious_loop(sizes):
    """Equal although only the tokens that the window can reach are read."""
    model = make_model(block_size=BLOCK, tied_embeddings=False, **sizes)
    params = random_params(model.config, seed=6)
    params["embedding"] = params["embedding"] / 50  # what is attended to decides, not the last token
    if model.config.qkv_bias:  # then a memory of zeros has keys, and where the tokens stand matters
        params["layers"]["key"]["bias"] = params["layers"]["key"]["bias"] * 20
        params["layers"]["value"]["bias"] = params["layers"]["value"]["bias"] * 5
    task = probe_task(make_evaluation(), "hold")
    for blocks in (3, 7):
        batch = task.batch(range(32), blocks * BLOCK)
        log_p = direct(model, params, batch, zero_memory=True)[2]
        best = log_p[:, -1:].argmax(-1)
        score = functools.partial(_scored, model, params, pad_id=task.vocab.pad_id, zero_memory=True)
        assert score({**batch, "answer": best.astype(np.int32)}).right.all()
        found, digits = score(batch), batch["answer"]
        np.testing.assert_array_equal(found.right, best[:, 0] == digits[:, 0])
        expected = -np.take_along_axis(log_p[:, -1], digits, axis=-1)[:, 0]
        np.testing.assert_allclose(found.loss, expected, rtol=1e-4)
        assert len(set(best.ravel())) > 5


def test_passkey_reports_the_memory_of_the_longest_documents():
    evaluation = make_evaluation(examples=6)
    scores = evaluation(MODEL, PARAMS, 0)
    names = {f"{probe}/{blocks}" for probe in STANDARD_PROBES for blocks in (3, 5)}
    assert {f"memory/zeroed/{name}" for name in names} <= set(scores)
    tokens = probe_task(evaluation, "hold").batch(range(4), 5 * BLOCK)["decoder_input_tokens"]
    figures = MemoryMonitor(MODEL.module).measure(PARAMS, tokens).scalars()
    assert len(figures) == 4 + 4 and {k: scores[k] for k in figures} == pytest.approx(figures)
    short = dataclasses.replace(evaluation, health_tokens=4 * 2 * BLOCK)(MODEL, PARAMS, 0)
    assert "memory/rms/update_2" in short and "memory/rms/update_4" not in short


def test_text_without_memory_equals_an_obvious_loop():
    documents = Documents(make_tokens(size, seed=size) for size in (50, 33))
    row = np.zeros((2, 64), np.int32)
    targets, weights = row.copy(), np.zeros((2, 64), np.float32)
    for i, document in enumerate(documents):
        row[i, 0], row[i, 1 : len(document)] = 1, document[:-1]
        targets[i, : len(document)], weights[i, : len(document)] = document, 1
    batch = dict(decoder_input_tokens=row, decoder_target_tokens=targets)
    got = TextEvaluation(documents, 2, 32, max_tokens=None)(MODEL, PARAMS, 0)
    for how, zero in (("kept", False), ("zeroed", True)):
        log_p, right, _ = direct(MODEL, PARAMS, batch, zero)
        bits = -(log_p * weights).sum() / weights.sum() / math.log(2)
        assert got[f"memory/{how}/bits_per_token"] == pytest.approx(bits, rel=1e-4)
        accuracy = (right * weights).sum() / weights.sum()
        assert got[f"memory/{how}/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert got["memory/kept/bits_per_token"] == got["bits_per_token"]
    figures = MemoryMonitor(MODEL.module).measure(PARAMS, row[:1, :50]).scalars()
    assert {k: got[k] for k in figures} == pytest.approx(figures)  # those of the longest document
    assert "memory/rms/update_3" in figures


def test_only_the_first_tokens_of_a_text_are_read_without_memory():
    documents = Documents([make_tokens(64)])
    evaluation = TextEvaluation(documents, 1, 16, max_tokens=None, health_tokens=20)
    got = evaluation(MODEL, PARAMS, 0)
    start = dataclasses.replace(evaluation, documents=Documents([documents[0][:32]]))(MODEL, PARAMS, 0)
    for how in ("kept", "zeroed"):
        name = f"memory/{how}/bits_per_token"
        assert got[name] == pytest.approx(start[name], rel=1e-6)
    assert got["bits_per_token"] != start["bits_per_token"] and "memory/rms/update_1" in got


@pytest.mark.parametrize(
    "model, health", [(make_model(block_size=BLOCK, memory=Memory()), True), (MODEL, False)]
)
def test_without_memory_or_health_only_scores_are_reported(model, health):
    params = make_params(model.module)
    documents = Documents([make_tokens(40)])
    for evaluation in (
        make_evaluation(blocks=(3,), health=health),
        TextEvaluation(documents, 1, 16, health=health),
        make_task_evaluation(health=health),
    ):
        scores = evaluation(model, params, 0)
        assert scores and not any(name.startswith("memory/") for name in scores)


# ---------------------------------------------------------------- checks before the run


def test_another_vocabulary_is_refused():
    words = DecoderModel(MODEL.module, vocabulary=passkey_words())
    make_evaluation().check(words)
    documents = Documents([make_tokens(5)])
    documents.vocab = ByteVocabulary()
    with pytest.raises(ConfigError, match=r"\(bytes\) is not the one that .* trained with \(words\)"):
        TextEvaluation(documents).check(words)
    small = make_model(block_size=BLOCK, vocab_size=50)
    for evaluation in (make_evaluation(), TextEvaluation(documents), make_task_evaluation()):
        with pytest.raises(ConfigError, match="tokens, the model's only 50: choose an evaluation with"):
            evaluation.check(small)
    TextEvaluation(Documents([make_tokens(5)])).check(MODEL)  # a plain list has no vocabulary to check


def test_blocks_too_small_for_the_probes_are_refused_before_the_run():
    with pytest.raises(ConfigError, match="does not fit into a block of 8"):
        make_evaluation().check(make_model(block_size=8))
    make_evaluation().check(MODEL)


def test_training_logs_the_memory_and_shows_the_scores(tmp_path, capsys):
    scores = {"score": 0.5, "memory/zeroed/score": 0.25}
    loop.train(make_run(model_dir=str(tmp_path), evaluation=lambda model, params, step: scores))
    assert "Step 1: score 0.5\n" in capsys.readouterr().err
    assert read_metrics(str(tmp_path), "eval")[0]["memory/zeroed/score"] == 0.25


# ---------------------------------------------------------------- the task of a run


def test_an_evaluation_without_a_task_takes_that_of_the_run(tmp_path):
    options = {"digits": 1, "header": False}
    keys = Data("passkey_words", {"targets": 32}, 2, options=options).make_task
    assert PasskeyEvaluation().with_task(keys).task == passkey(filler="repeated")
    task = TaskEvaluation(length=40).with_task(keys)._task
    assert (task.digits, task.split, task.seed) == (1, "eval", 1)
    task = TaskEvaluation(length=40, task_options={"digits": 2}).with_task(keys)._task
    assert (task.digits, task.header) == (2, False)
    for evaluation in (
        PasskeyEvaluation(passkey(digits=2)), TaskEvaluation("passkey_words", 40),
        TextTaskEvaluation("own_records"), TextEvaluation(Documents([make_tokens(5)])),
    ):  # fmt: skip
        assert evaluation.with_task(keys) is evaluation

    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}.")
    texts = Data("own_text", {"targets": 32}, 2, options={"files": str(tmp_path / "*.txt")}).make_task
    own = TextTaskEvaluation(task_options={"files": str(tmp_path / "3.txt")})
    assert len(own.with_task(texts).task.paths) < len(texts().paths)
    held_out = TextEvaluation().with_task(texts).documents
    assert held_out.paths and not set(held_out.paths) & set(texts().paths)
    with pytest.raises(ConfigError, match="measures PassKey, but the run trains on TextFiles: set"):
        PasskeyEvaluation().with_task(texts)
    with pytest.raises(ConfigError, match="has no option 'splt'"):
        keys(splt="eval")


@pytest.mark.parametrize("evaluation", [TaskEvaluation(length=8), TextTaskEvaluation(), TextEvaluation()])
def test_an_evaluation_without_any_task_is_refused(evaluation):
    with pytest.raises(ConfigError, match=r"(task|documents) is not set: name the"):
        evaluation.check(make_model(vocabulary=passkey().vocab))
