"""Runs on sequences of words and vectors: exact resumption, microbatches, devices, evaluation, memory."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import xla_flags
from processes import start_process
from test_loop import Probe, history, run, saved
from tiny import BLOCK, assert_close, assert_identical, make_model, make_run

import famx
from famx.base.errors import ConfigError
from famx.base.features import KINDS, Feature
from famx.data import PasskeyTask, SequenceTask
from famx.decoding import Streamer
from famx.evaluation import TaskEvaluation
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import restore_memory, save_memory
from famx.modules.frontends import Frontend, Mixed, Vectors
from famx.modules.heads import Values
from famx.training.curriculum import Curriculum
from famx.training.feeds import AgedFeed
from famx.training.source import Source
from famx.training.state_passing import Aged
from famx.training.step import make_initializer, make_train_step

WORDS = ("low", "high")


@dataclasses.dataclass(frozen=True)
class Sensor(SequenceTask):
    """Two channels, some words among them; the next reading is predicted, and a word at the end."""

    features = (Feature("channels", 2), KINDS)
    value_width = 2
    words = WORDS
    min_length = 4

    def row(self, rng, length):
        channels = rng.standard_normal((length, 2)).astype(np.float32)
        kinds = (rng.random(length) < 0.8).astype(np.int32)
        following = np.concatenate([channels[1:], channels[:1]])
        last = np.arange(length) == length - 1
        answer = WORDS[int(channels[0, 0] > 0)]
        return dict(
            features={"channels": channels, "kinds": kinds}, answer=[answer], values=following,
            value_weights=0.5 * kinds * ~last,
        )  # fmt: skip


MODEL = make_model(frontend=Mixed((Frontend(), Vectors("channels", 2))), values=Values(2), vocab_size=6)
PLAIN = dict(model=MODEL, task=Sensor(), options=None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "continuous", "aged"])
def test_stopped_and_resumed_is_the_same_run(mode, tmp_path):
    run(tmp_path / "whole", mode, probe=Probe(), **PLAIN)
    probe = Probe(stop_after=(7,))
    for _ in range(2):
        run(tmp_path / "resumed", mode, probe=probe, **PLAIN)
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    assert_identical(saved(tmp_path / "resumed"), saved(tmp_path / "whole"))
    lines = history(tmp_path / "whole")
    assert all(line["value_loss"] > 0 and np.isfinite(line["loss"]) for line in lines)
    if mode == "aged":
        assert saved(tmp_path / "whole")["lanes"]["position"].max() > 0  # the pool has read features
    own = saved(tmp_path / "whole")["target"]
    assert np.abs(own["frontend"]["parts_1"]["kernel"]).max() > 0


def steps(microbatches):
    ready = make_run(
        **PLAIN, batch_size=4, microbatches=microbatches, optimizer=optax.sgd(0.3),
        lengths={"targets": 3 * BLOCK},
    ).ready()  # fmt: skip
    initialize, abstract = make_initializer(ready)
    state = initialize(jax.random.key(0))
    batch = Sensor().batch(range(4), 3 * BLOCK)
    batch["decoder_value_weights"][0] = 0  # a mean of means would be another number
    specs = ready.abstract_batch()
    del batch["answer_start"]
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in specs.items()
    }
    state, metrics = make_train_step(ready, abstract)(state, batch)
    return state.params, {name: float(metrics[name].total) for name in ("loss", "value_loss")}


@pytest.mark.slow
def test_microbatches_change_no_number():
    assert_close(steps(1), steps(2), 1e-5)


@pytest.mark.slow
def test_the_evaluation_scores_every_length(tmp_path):
    run(tmp_path, "none", steps=2, probe=None, **PLAIN)
    params = jax.tree.map(np.asarray, saved(tmp_path, 2)["target"])
    evaluation = TaskEvaluation(
        Sensor(), length=12, more_lengths=(20,), examples=3, batch_size=2, health_tokens=64
    )
    evaluation.check(MODEL)
    scores = evaluation(MODEL, params, 2)
    names = {"loss", "accuracy", "exact_match", "value_loss", "memory/zeroed/value_loss"}
    assert names | {f"{name}/20" for name in names} <= scores.keys()
    batch = Sensor(split="eval", seed=1).batch(range(3), 20)
    _, metrics, _ = jax.jit(MODEL.loss)(params, batch)
    for name in ("accuracy", "value_loss"):
        mean = float(metrics[name].total / metrics[name].count)
        assert scores[f"{name}/20"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
    with pytest.raises(ConfigError, match="more_lengths is 2, but the task 'Sensor' needs at least 4"):
        dataclasses.replace(evaluation, more_lengths=(20, 2)).check(MODEL)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(model=make_model()), r"The task Sensor has 'channels' \(2 float32\), .* tokens alone"),
        (
            dict(task=PasskeyTask(vocabulary="words", digits=1, header=False), model=make_model(
                frontend=MODEL.config.frontend)),
            "The task PasskeyTask has tokens alone, but the model reads 'channels'",
        ),
        (
            dict(model=make_model(frontend=MODEL.config.frontend, vocab_size=6)),
            "has 2 values to predict at each position, but the model predicts 0",
        ),
    ],
)  # fmt: skip
def test_a_task_that_does_not_fit_the_model_is_refused(changes, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "run", "none", **{**PLAIN, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_memory_file_of_vectors_continues_exactly(tmp_path):
    run(tmp_path / "run", "none", steps=1, **PLAIN)
    params = jax.tree.map(jax.numpy.asarray, saved(tmp_path / "run", 1)["target"])
    trained, streamer = TrainedModel(MODEL, params, 1, tmp_path / "run"), Streamer(MODEL.module)
    inputs = MODEL.inputs(Sensor().batch(range(2), 30))
    cut = lambda start, end: jax.tree.map(lambda x: x[:, start:end], inputs)
    logits, state = streamer.read(params, streamer.initial_state(params, 2), cut(0, 19))
    save_memory(tmp_path / "a.famem", trained, logits, state)
    again = restore_memory(tmp_path / "a.famem", trained)
    assert_identical(again, (logits, state))
    assert_identical(
        streamer.values(params, again[1], cut(19, 30)), streamer.values(params, state, cut(19, 30))
    )


DEVICES = """
import sys, jax, optax
from famx.mesh import make_mesh
from test_vector_runs import MODEL, PLAIN, run
assert jax.device_count() == 2
for name, sizes in (("one", {"devices": jax.devices()[:1]}), ("data", {"data": 2}),
                    ("fsdp", {"data": 1, "fsdp": 2}), ("context", {"data": 1, "context": 2})):
    run(f"{sys.argv[1]}/{name}", "none", steps=3, mesh=make_mesh(**sizes), **PLAIN)
"""


@pytest.mark.slow
def test_two_devices_equal_one(tmp_path):
    here = pathlib.Path(__file__).parent
    paths = [str(pathlib.Path(famx.__file__).parent.parent), str(here.parent), str(here)]
    process = start_process(
        [sys.executable, "-c", DEVICES, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {xla_flags.FAST}",
        },
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    text, _ = process.communicate()
    assert process.returncode == 0, text
    for name in ("data", "fsdp", "context"):
        for one, other in zip(history(tmp_path / "one"), history(tmp_path / name), strict=True):
            for key in ("loss", "value_loss", "gradient_norm"):
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-5), (name, key)


@pytest.mark.slow
def test_the_pool_reads_features_before_its_rows():
    """The state of a lane is that of the features before its row."""
    source = Source(Sensor(), 2, 2 * BLOCK, BLOCK, curriculum=Curriculum((2, 4), unlock=0.0))
    feed = AgedFeed(source, MODEL, groups=1, refresh_period=1)
    feed.observe(2, 1.0)
    params = MODEL.init_params(jax.random.key(0))
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
    kept = Aged(groups=1).initial(MODEL, params, 2)
    kept = jax.tree.map(jax.numpy.copy, kept)  # it is donated, and keys and values share a buffer
    rows = feed.next(0)
    kept = feed.prepare(rows, params, kept)
    first = feed.firsts[0]
    whole = MODEL.inputs(Sensor().batch(range(first, first + 2), 4 * BLOCK))
    before = jax.tree.map(lambda x: x[:, : 2 * BLOCK], whole)
    _, state = MODEL.module.apply({"params": params}, before, method="read")
    assert_close(kept["lanes"], state, 1e-4)
    assert rows.refresh is not None and set(rows.refresh.prefix) == {"channels", "kinds", "tokens"}
