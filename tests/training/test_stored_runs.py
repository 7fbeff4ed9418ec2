"""Runs whose MODEL_DIR is in a bucket: the same numbers as on a disk, killed or not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import ClassVar

import jax
import numpy as np
import pytest
from processes import start_process
from test_train_main import arguments, history
from tiny import make_model, make_run

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.gin_utils import gin_root
from famx.evaluation.checkpoints import evaluate
from famx.evaluation.text_answers import predictions_file
from famx.inference.conversation import load_with_vocabulary
from famx.lora import Lora
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.loading import load_model
from famx.model_dir.lock import StoredLock
from famx.model_dir.soundness import check
from famx.training import loop, optimizers
from famx.training.run import Every
from famx.training.run_log import read_metrics
from famx.training.trainable import Trainable

RUN = "gs://bucket/run"


@dataclasses.dataclass(frozen=True)
class Sum:
    """An evaluation that adds all parameters, and writes a prediction."""

    writes_predictions: ClassVar[bool] = True

    def __call__(self, model, params, step, folder):
        with predictions_file(folder, step) as write:
            write({"step": step})
        return {"sum": float(sum(np.asarray(x, np.float64).sum() for x in jax.tree.leaves(params)))}


def train(model_dir, steps, **changes):
    settings = dict(
        model_dir=str(model_dir), steps=steps, optimizer=optimizers.adamw(1e-2),
        every=Every(log=1, checkpoint=2),
    )  # fmt: skip
    return loop.train(make_run(**{**settings, **changes}))


def content(model_dir, step):
    """All that a checkpoint holds, as bytes by path, and its data state."""
    with Checkpointer(model_dir, read_only=True) as checkpointer:
        leaves = checkpointer.leaves(step)
        tree = {}
        for path, leaf in leaves.items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        tree, state, _ = checkpointer.restore(step, tree)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}, state


@pytest.mark.slow
def test_a_run_that_is_continued_is_that_on_a_disk(gcs, tmp_path):
    for model_dir in (tmp_path, RUN):
        train(model_dir, 3)
        train(model_dir, 6)
    (here, state), (there, stored_state) = content(tmp_path, 6), content(RUN, 6)
    assert here == there and len(here) > 10 and state == stored_state
    assert history(tmp_path) == history(RUN) and [x["step"] for x in read_metrics(RUN)] == [*range(1, 7)]
    names = set(gcs.names("bucket", "run/"))
    assert {f"run/{x}" for x in ("model.json", "vocabulary.json", "settings.json", "config.gin")} <= names
    assert sum(name.startswith("run/tensorboard/train/events") for name in names) == 2
    assert "run/run.lock" not in names
    assert len(json.loads(gcs.content("bucket", "run/settings.json"))["history"]) == 2
    findings = list(check(RUN))
    assert len(findings) == 5 and all(finding.sound for finding in findings)
    results = evaluate(RUN, {"sum": Sum()}, checkpoints="all")
    assert list(results["sum"]) == [3, 4, 6] and evaluate(str(tmp_path), {"sum": Sum()})["sum"][6] == (
        results["sum"][6]
    )
    written = json.loads(gcs.content("bucket", "run/eval/sum/6.json"))
    assert written["checkpoint"] == f"{RUN}/checkpoint_6" and written["scalars"] == results["sum"][6]
    assert gcs.content("bucket", "run/eval/sum/6.predictions.jsonl") == b'{"step": 6}\n'
    assert any(name.startswith("run/tensorboard/eval_sum/events") for name in gcs.names("bucket"))
    gcs.requests.clear()
    assert evaluate(RUN, {"sum": Sum()}) == {"sum": {6: results["sum"][6]}}, "it is not taken over"
    assert not any("/state/" in name for _, name in gcs.requests), "weights were read for nothing"


def test_a_damaged_checkpoint_is_set_aside(gcs):
    train(RUN, 4)
    name = max(gcs.names("bucket", "run/checkpoint_4/state"), key=lambda n: len(gcs.content("bucket", n)))
    data = gcs.content("bucket", name)
    gcs.put("bucket", name, data[:-1] + bytes([data[-1] ^ 1]))
    train(RUN, 5)
    assert [x["step"] for x in read_metrics(RUN)] == [1, 2, 3, 4, 5]
    assert gcs.names("bucket", "run/set_aside/checkpoint_4/")
    assert all(finding.sound for finding in check(RUN))


@pytest.mark.slow
def test_finetuning_from_a_bucket_into_a_bucket(gcs, tmp_path):
    train(RUN, 2)
    (source := as_path(RUN) / "source" / "config.json").write_text("{}")
    lora = dict(
        model=make_model(lora=Lora(rank=2)), trainable=Trainable("lora"), initial_checkpoint_path=RUN
    )
    for model_dir in (tmp_path, "gs://bucket/fine"):
        train(model_dir, 2, **lora)
    assert content(tmp_path, 2)[0] == content("gs://bucket/fine", 2)[0]
    assert gcs.content("bucket", "fine/source/config.json") == source.read_bytes()
    finetuned = load_model("gs://bucket/fine").params
    merged = load_model(RUN, adapter="gs://bucket/fine/adapter").params
    for a, b in zip(jax.tree.leaves(finetuned), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any("adapter" in str(finding) and finding.sound for finding in check("gs://bucket/fine"))
    assert load_with_vocabulary(f"{RUN}/checkpoint_2").step == 2


def test_what_cannot_be_used_is_a_sentence_before_anything_is_written(gcs):
    with pytest.raises(ConfigError, match="MODEL_DIR gs://another/run is not writable: there is no such"):
        train("gs://another/run", 1)
    gcs.refuse = lambda method, bucket, name: 401 if method != "GET" else None
    with pytest.raises(ConfigError, match="gcloud auth application-default login"):
        train(RUN, 1)
    assert not gcs.objects
    with pytest.raises(ConfigError, match="There is no checkpoint gs://bucket/none: nothing is in gs://buc"):
        load_model("gs://bucket/none")


@pytest.mark.slow
def test_the_main_job_killed_and_resumed(gcs, tmp_path):
    whole = tmp_path / "whole"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    few = ("TRAIN_STEPS=60", "Every.checkpoint=20", "PasskeyEvaluation.report_blocks=(4,)")

    def start(model_dir):
        return start_process(
            [sys.executable, "-m", "famx.train", *arguments(model_dir, *few)], cwd=gin_root(), env=env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    process = start(whole)
    assert process.communicate() and process.returncode == 0
    process = start(RUN)
    for line in process.stderr:
        if line.startswith("train step 50/"):
            break
    with pytest.raises(ConfigError, match=f"is in use by the run of process {process.pid} on host"):
        StoredLock(as_path(RUN)).acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert gcs.names("bucket", "run/run.lock") and not gcs.names("bucket", "run/passkey.json")

    process = start(RUN)
    _, text = process.communicate()
    assert process.returncode == 0, text
    assert f"Resuming from step 40 of {RUN}." in text or f"Resuming from step 20 of {RUN}." in text, text
    assert history(RUN) == history(whole)
    assert content(RUN, 60) == content(whole, 60)
    assert gcs.content("bucket", "run/passkey.json") == (whole / "passkey.json").read_bytes()
    assert gcs.content("bucket", "run/passkey.png").startswith(b"\x89PNG\r\n")
    assert all(finding.sound for finding in check(RUN))
