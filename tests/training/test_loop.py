"""The loop: exact resumption under every mode, seeds, broken gradients, and what a run leaves."""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from memories_table import REMEMBERING
from tiny import BLOCK, BLOCKS, assert_identical, make_model, make_run, passkey

from famx.base.errors import ConfigError
from famx.data import TextFiles
from famx.data.tasks import registry
from famx.model_dir.identity import check_same_model
from famx.model_dir.loading import check_model
from famx.training import loop, speed
from famx.training.curriculum import Curriculum
from famx.training.run import Every
from famx.training.run_log import read_metrics
from famx.training.state_passing import Aged, Lanes, Random, named

STEPS, BATCH = 12, 4
TIMES = ("time", *speed.NAMES)
MODES = {
    "none": named("none"),
    "random": Random(0.5, start_step=2),
    "continuous": Lanes(document_length=9 * BLOCK, num_documents=10),
    "aged": Aged(groups=2, refresh_period=3),  # two groups: the pool is replaced within the run
}


@dataclasses.dataclass
class Probe:
    """An evaluation that notes its calls, and asks the run to stop after some of them."""

    stop_after: tuple[int, ...] = ()
    calls: list = dataclasses.field(default_factory=list)
    reports: int = 0

    def __call__(self, model, params, step):
        self.calls.append((step, jax.tree.map(np.asarray, params)))
        if step in self.stop_after:
            self.stop_after = tuple(s for s in self.stop_after if s != step)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"calls": float(len(self.calls))}

    def report(self, model, params, model_dir):
        self.reports += 1
        assert pathlib.Path(model_dir).is_dir()
        return f"the report of {int(params['embedding'].shape[0])} ids"


def run(model_dir, mode="none", seed=0, probe=None, **changes):
    """One call of `train`, as the same command would make it; `changes` as of `make_run`."""
    settings = dict(
        model_dir=str(model_dir),
        steps=STEPS,
        batch_size=BATCH,
        optimizer=optax.adam(1e-2),
        random_seed=seed,
        evaluation=probe,
        every=Every(log=5, checkpoint=5, evaluation=1 if probe else 0),
    )
    settings["state_passing"] = MODES[mode] if mode in MODES else named(mode)
    if mode == "aged":  # unlocks at once
        settings["curriculum"] = Curriculum((4, 5, 7), unlock=0.0, newest=0.6)
    return loop.train(make_run(**{**settings, **changes}))


def history(model_dir, split="train"):
    lines = read_metrics(str(model_dir), split)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def saved(model_dir, step=STEPS):
    path = pathlib.Path(model_dir) / f"checkpoint_{step}" / "state"
    return ocp.PyTreeCheckpointer().restore(path)


def saved_data(model_dir, step=STEPS):
    path = pathlib.Path(model_dir) / f"checkpoint_{step}" / "dataset" / "metadata"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of an uninterrupted run per mode, made once."""
    made = {}

    def get(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp(mode)
            run(made[mode], mode, probe=Probe())
        return made[mode]

    return get


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["none", "random", "continuous", "aged"])
def test_stopped_and_resumed_is_the_same_run(mode, whole, tmp_path):
    """Stopped between two log lines (3), and with a pool in use, after a checkpoint (7)."""
    probe = Probe(stop_after=(3, 7))
    for last in (3, 7):
        run(tmp_path, mode, probe=probe)
        assert probe.calls[-1][0] == last
        assert saved(tmp_path, last)["state"]["step"] == last
        assert not probe.reports
    run(tmp_path, mode, probe=probe)
    assert [step for step, _ in probe.calls[:STEPS]] == list(range(1, STEPS + 1))
    assert history(tmp_path) == history(whole(mode))
    assert len(history(tmp_path)) == 3 and all(np.isfinite(x["loss"]) for x in history(tmp_path))
    assert_identical(saved(tmp_path), saved(whole(mode)))
    assert saved_data(tmp_path) == saved_data(whole(mode))


@pytest.mark.sampled(33)
@pytest.mark.parametrize("mode", ["random", "continuous"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_every_memory_resumes_exactly(name, mode, tmp_path):
    memory = REMEMBERING[name]
    model = make_model(memory=memory, num_layers=1 + max(getattr(memory, "layers", None) or (0,)))
    run(tmp_path / "whole", mode, probe=Probe(), model=model)
    probe = Probe(stop_after=(6,))
    for _ in range(2):
        run(tmp_path / "resumed", mode, probe=probe, model=model)
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    assert_identical(saved(tmp_path / "resumed"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_the_modes_save_what_they_carry(whole):
    assert "lanes" not in saved(whole("none"))
    kept = saved(whole("random"))["flax_mutables"]["state_passing"]
    assert int(kept["steps"]) == STEPS and int(kept["updates"]) >= BLOCKS
    lanes = saved(whole("continuous"))["lanes"]
    assert lanes["memory"].shape[1] == BATCH
    # Documents of 9 blocks are read 4, 4 and 1 (with padding: 4) blocks at a time.
    assert set(lanes["position"].tolist()) == {12 * BLOCK}
    pool = saved(whole("aged"))["lanes"]
    assert pool["memory"].shape[1] == 2 * BATCH
    assert set(pool["position"].tolist()) <= {BLOCK, 3 * BLOCK} and pool["position"].min() > 0
    feed = saved_data(whole("aged"))["feed"]
    assert feed["curriculum"]["stage"] == 2 and feed["made"] >= 3


@pytest.mark.slow
def test_the_losses_of_the_modes_differ(whole):
    modes = ("none", "random", "continuous", "aged")
    assert len({tuple(line["loss"] for line in history(whole(mode))) for mode in modes}) == 4


def test_a_run_leaves_logs_config_and_checkpoints(whole, tmp_path):
    folder = whole("none")
    assert "Run.checkpoints_to_keep = 3" in (folder / "config.gin").read_text()
    assert json.loads((folder / "model.json").read_text())["block_size"] == BLOCK
    assert list((folder / "tensorboard" / "train").glob("events.out.tfevents.*"))
    assert (folder / f"checkpoint_{STEPS}" / "state").is_dir()
    assert {p.name for p in folder.glob("checkpoint_*")} == {f"checkpoint_{i}" for i in (5, 10, 12)}
    lines = history(folder)
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert {"loss", "accuracy", "exact_match", "memory_rms", "gradient_norm"} <= set(lines[0])
    assert lines[0]["skipped"] == 0 and lines[0]["gradient_norm"] > 0
    assert [line["step"] for line in history(folder, "eval")][:STEPS] == list(range(1, STEPS + 1))


def test_same_seed_same_run_other_seed_other_run(whole, tmp_path, capsys):
    probe = Probe()
    scalars = run(tmp_path / "same", probe=probe, every=Every(5, 5, 4))
    assert_identical(saved(tmp_path / "same"), saved(whole("none")))
    run(tmp_path / "other", seed=1)
    assert history(tmp_path / "other")[0]["loss"] != history(whole("none"))[0]["loss"]
    # The first of the two: evaluated every 4 steps and at the end, with the report once, at last.
    assert [step for step, _ in probe.calls] == [4, 8, 12] and probe.reports == 1
    assert scalars["calls"] == 3 and np.isfinite(scalars["loss"])
    assert_identical(probe.calls[-1][1], saved(tmp_path / "same")["target"])
    assert "the report of 260 ids" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    run(tmp_path, probe=Probe(), steps=STEPS)
    before, probe = saved(tmp_path), Probe()
    run(tmp_path, probe=probe)
    assert not probe.calls and not probe.reports
    assert_identical(saved(tmp_path), before)
    assert history(tmp_path) == history(whole("none"))


# ---------------------------------------------------------------- gradients that are not finite


class Poisoned:
    """PassKey rows; some steps have an infinite weight."""

    vocab, min_length = passkey().vocab, passkey().min_length

    def __init__(self, steps):
        self.steps = steps

    def example(self, index, length):
        return passkey().example(index, length)

    def batch(self, indices, length):
        batch = passkey().batch(indices, length)
        if indices[0] // BATCH in self.steps:
            batch["decoder_loss_weights"][0, -1] = np.inf
        return batch


@pytest.fixture
def poisoned():
    registry.register("poisoned", Poisoned)


@pytest.mark.usefixtures("poisoned")
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    run(tmp_path, task="poisoned", options={"steps": (1,)}, steps=3, every=Every(log=1, checkpoint=1))
    one, two, three = (saved(tmp_path, step) for step in (1, 2, 3))
    assert int(two["state"].pop("step")) == 2 and int(one["state"].pop("step")) == 1
    assert_identical(one, two)
    assert np.any(three["target"]["embedding"] != two["target"]["embedding"])
    assert np.isfinite(three["target"]["embedding"]).all()
    assert [line["skipped"] for line in history(tmp_path)] == [0, 1, 0]


@pytest.mark.usefixtures("poisoned")
def test_twenty_such_steps_in_a_row_end_the_run(tmp_path):
    broken = dict(task="poisoned", steps=50, every=Every(log=4, checkpoint=3))
    sentence = "not finite in the 20 steps before step 23: lower the learning rate. There is no good"
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path, **broken, options={"steps": (0, *range(3, 50))})
    assert np.isfinite(saved(tmp_path, 21)["target"]["embedding"]).all()


# ---------------------------------------------------------------- text and settings


def test_text_of_files_is_read_by_lanes(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"Document {i}. " + "abcdefgh " * (5 + 3 * i))
    registry.register("loop_texts", lambda: TextFiles(str(tmp_path / "*.txt")))
    scalars = run(tmp_path / "run", "continuous", task="loop_texts", options=None)
    assert 0 < scalars["loss"] < 20


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(steps=0), "Run.steps must be a whole number of at least 1 or None, not 0"),
        (dict(every=dict(log=0)), "Every.log must be a whole number of at least 1, not 0"),
        (dict(batch_size=0), "Data.batch_size must be a whole number of at least 1, not 0"),
        (dict(lengths={"inputs": 8}), "must name a length for 'targets'"),
        (dict(lengths={"targets": 7}), "row length 7 .* is shorter than a block of 8"),
        (dict(task="passkey_wrods"), "The nearest name is 'passkey_words'"),
        (dict(options={"digit": 1}), "passkey_words.*digit"),
        (dict(options={"digits": 0}), r"TASK_OPTIONS\['digits'\] must be .* at least 1, not 0"),
        (dict(mode="rsp"), "named.name must be one of 'none', 'random', .*, not 'rsp'"),
        (dict(model=dict(vocab_size=16)), "raise DecoderConfig.vocab_size"),
        (
            dict(model=dict(block_size=128, attention_backend="splash")),
            "attention_backend 'splash' runs on TPU alone, not on CPU: choose auto or xla.",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, sentence):
    if "model" in changes:
        changes = {"model": make_model(**changes["model"])}
    with pytest.raises(ConfigError, match=sentence):
        if "every" in changes:
            changes = {"every": Every(**changes["every"])}
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())  # nothing that would stand in the way of the next try


def test_the_backend_of_attention_stays_where_the_model_was_trained(tmp_path):
    model = make_model(block_size=128, attention_backend="splash")
    check_same_model(tmp_path, model.describe())
    found = check_model(tmp_path).config
    assert (found.block_size, found.attention_backend) == (128, "auto")
