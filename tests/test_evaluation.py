"""Evaluations against slow and direct ones, and what a report writes."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny import make_model, make_params, make_tokens, passkey

from famx.data import TextFiles
from famx.errors import ConfigError
from famx.evaluation import PROBES, PasskeyEvaluation, TextEvaluation

BLOCK = 16  # room for a statement
MODEL = make_model(block_size=BLOCK)
PARAMS = make_params(MODEL.module)
apply = jax.jit(MODEL.module.apply)


def make_evaluation(**changes):
    settings = dict(task=passkey(), blocks=(3, 5), report_blocks=(2, 3, 5), examples=8)
    return PasskeyEvaluation(**{**settings, **changes})


def probe_task(evaluation, probe):
    return dataclasses.replace(
        passkey(), split="eval", seed=evaluation.seed, depth=0.0, block_size=BLOCK, **PROBES[probe]
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
    assert set(scores) == {f"{probe}/{blocks}" for probe in PROBES for blocks in (3, 5)}
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
    rows = {p: probe_task(evaluation, p).batch(range(8), length) for p in PROBES}
    examples = [probe_task(evaluation, "overwrite").example(i, length) for i in range(8)]
    for example in examples:
        first, second = example["key_positions"]
        assert first == 0 and BLOCK <= second < length
        assert example["answer"].tolist() != example["tokens"][first + 4 : first + 5].tolist()
    assert len(probe_task(evaluation, "hold").example(0, length)["key_positions"]) == 1
    filler = rows["hold_repeated"]["decoder_target_tokens"][:, 2 * BLOCK : 4 * BLOCK]
    assert (filler == filler[0]).all()
    filler = rows["hold"]["decoder_target_tokens"][:, 2 * BLOCK : 4 * BLOCK]
    assert not (filler == filler[0]).all()


def test_evaluation_never_reads_a_training_row():
    """Even with the seed and the indices of training, the rows are others."""
    evaluation, length = make_evaluation(seed=0), 12 * BLOCK
    training = dataclasses.replace(probe_task(evaluation, "hold"), split="train")
    seen = {row.tobytes() for row in training.batch(range(200), length)["decoder_target_tokens"]}
    rows = probe_task(evaluation, "hold").batch(range(200), length)["decoder_target_tokens"]
    assert len(seen) == 200 and not seen & {row.tobytes() for row in rows}


def test_the_task_is_asked_in_its_eval_split(monkeypatch):
    from famx.data.passkey import PasskeyTask

    asked, batch = [], PasskeyTask.batch

    def spy(task, indices, length):
        asked.append((task.split, task.seed, task.block_size, task.digits, len(indices)))
        return batch(task, indices, length)

    monkeypatch.setattr(PasskeyTask, "batch", spy)
    make_evaluation(blocks=(3,), seed=5)(MODEL, PARAMS, 0)
    assert asked == [("eval", 5, BLOCK, 1, 8)] * 3


def test_report(tmp_path):
    evaluation = make_evaluation(train_blocks=3)
    text = evaluation.report(MODEL, PARAMS, str(tmp_path))
    scores = evaluation._measure(MODEL, PARAMS, (2, 3, 5))
    assert "overwrite/2" not in scores  # two statements do not fit: no number is made up
    result = json.loads((tmp_path / "passkey.json").read_text())
    assert result["exact_match"]["hold"] == {str(b): scores[f"hold/{b}"] for b in (2, 3, 5)}
    assert set(result["exact_match"]["overwrite"]) == {"3", "5"}
    assert {k: result[k] for k in ("block_size", "train_blocks", "examples", "fam_length")} == {
        "block_size": 16, "train_blocks": 3, "examples": 8, "fam_length": 2}  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "Exact match over 8 fresh documents per cell, streamed:"
    assert lines[1].split() == ["blocks", "tokens", "hold", "hold_repeated", "overwrite"]
    assert [line.split()[:2] for line in lines[2:5]] == [["2", "32"], ["3", "48"], ["5", "80"]]
    assert lines[2].split()[-1] == "-"
    assert lines[3].split()[2] == f"{scores['hold/3']:.3f}"
    from matplotlib import image

    picture = image.imread(tmp_path / "passkey.png")
    assert picture.ndim == 3 and picture.std() > 0.01


# ---------------------------------------------------------------- text


class Documents(list):
    def num_tokens(self, i):
        return len(self[i])


@pytest.mark.parametrize("batch_size, length", [(2, 16), (8, 39), (3, 4)])
def test_bits_per_token_equal_a_direct_computation(batch_size, length):
    """Every document once and to its end, also with fewer documents than lanes."""
    documents = Documents(make_tokens(size, seed=size) for size in (50, 16, 7, 33, 64))
    nats, hits, count = 0.0, 0, 0
    for document in documents:
        row = np.zeros((1, 64), np.int32)
        row[0, 0], row[0, 1 : len(document)] = 1, document[:-1]
        log_p = np.asarray(jax.nn.log_softmax(apply({"params": PARAMS}, row)[0]))
        log_p = log_p[0, : len(document)]
        nats -= log_p[np.arange(len(document)), document].sum()
        hits += (log_p.argmax(-1) == document).sum()
        count += len(document)
    got = TextEvaluation(documents, batch_size, length, max_tokens=None)(MODEL, PARAMS, 0)
    assert got["bits_per_token"] == pytest.approx(nats / count / math.log(2), rel=1e-4)
    assert got["accuracy"] == pytest.approx(hits / count, abs=1e-6)


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
    streamer = evaluation._streamers.of(MODEL)
    before = streamer._advance._cache_size()
    again = make_model(block_size=BLOCK)  # an equal model, as resuming makes it
    evaluation(again, PARAMS, 1)
    assert evaluation._streamers.of(again) is streamer
    assert streamer._advance._cache_size() == before


def test_blocks_too_small_for_the_probes_are_refused_before_the_run():
    with pytest.raises(ConfigError, match="does not fit into a block of 8"):
        make_evaluation().check(make_model(block_size=8))
    make_evaluation().check(MODEL)
