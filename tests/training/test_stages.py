"""Stages of a run: exact resumption anywhere, what carries on, programs that are shared, bad lines."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import Probe, history, saved, saved_data
from tiny import BLOCK, assert_identical, make_model, make_run, passkey

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ContinuousLanes
from famx.data.tasks import registry
from famx.model_dir.loading import check_model, load_model
from famx.training import compiling, loop
from famx.training.curriculum import Curriculum
from famx.training.run import Every, Run
from famx.training.source import Source
from famx.training.stages import Place, stages_of
from famx.training.state_passing import Aged, FromMemoryFile, Lanes, named

STEPS = 13
LANES = Lanes(document_length=9 * BLOCK, num_documents=10)
POOL = Aged(groups=2, refresh_period=3)
# Carried states in the middle, which start over in the last stage; blocks, rows and batches change.
STAGES = (
    {"steps": 4, "blocks": 4, "batch_size": 4},
    {"steps": 4, "block_size": 16, "blocks": 2, "batch_size": 2, "state_passing": LANES},
    {
        "block_size": 8,
        "blocks": 4,
        "state_passing": POOL,
        "curriculum": {"blocks": (4, 5, 7), "unlock": 0.0, "newest": 0.6},
        "options": {"filler": "repeated"},
    },
)


def run_of(model_dir, stages=STAGES, **changes):
    settings = dict(
        model_dir=str(model_dir),
        steps=STEPS,
        stages=stages,
        optimizer=optax.adam(optax.linear_schedule(1e-2, 0.0, STEPS)),
        every=Every(log=5, checkpoint=3),
        checkpoints_to_keep=None,
    )
    return make_run(**{**settings, **changes})


def stopped_and_resumed(model_dir, stops, **changes):
    """A run that SIGTERM stops after each of these numbers of steps, and its last resumption."""
    probe = Probe(stop_after=tuple(stops))
    every = Every(log=5, checkpoint=3, evaluation=1)
    for last in (*stops, changes.get("steps", STEPS)):
        loop.train(run_of(model_dir, evaluation=probe, every=every, **changes))
        assert probe.calls[-1][0] == last


def assert_same_run(there, here, step=STEPS):
    assert history(there) == history(here)
    assert_identical(saved(there, step), saved(here, step))
    assert saved_data(there, step) == saved_data(here, step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of an uninterrupted run of `STAGES`."""
    directory = tmp_path_factory.mktemp("whole")
    loop.train(run_of(directory))
    return directory


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_is_the_same_run(whole, tmp_path):
    """Within a stage, exactly at both boundaries, and one step to either side of one."""
    stopped_and_resumed(tmp_path, (2, 4, 7, 8, 9, 11))
    assert_same_run(tmp_path, whole)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("step", [3, 4, 6, 8, 12])
def test_killed_anywhere_and_resumed_is_the_same_run(step, whole, tmp_path):
    """A kill leaves a checkpoint behind, and lines of the log that are written again."""
    for name in ("model.json", "vocabulary.json", "metrics.jsonl", f"checkpoint_{step}"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, tmp_path / name)
    loop.train(run_of(tmp_path))
    assert_same_run(tmp_path, whole)


def random_stages(rng):
    """Two to four stages with random settings, and their number of steps."""
    stages, steps = [], 0
    for _ in range(int(rng.integers(2, 5))):
        block_size = int(rng.choice([8, 16]))
        stage = {"steps": int(rng.integers(1, 6)), "block_size": block_size, "blocks": 32 // block_size}
        stage["batch_size"] = int(rng.choice([2, 4]))
        stage["memory"] = {"update": str(rng.choice(["residual", "gated"]))}
        stage["state_passing"] = [named("none"), named("random"), LANES, POOL][rng.integers(4)]
        if rng.integers(3) == 0:
            stage["until"] = {"accuracy": 0.01}
        stages.append(stage)
        steps += stage["steps"]
    stages[-1].pop("until", None)
    del stages[-1]["steps"]
    return tuple(stages), steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_stages_resume_exactly(seed, tmp_path):
    rng = np.random.default_rng(seed)
    stages, steps = random_stages(rng)
    changes = dict(stages=stages, steps=steps, optimizer=optax.adam(1e-2))
    loop.train(run_of(tmp_path / "whole", **changes))
    count = min(3, steps - 1)
    stops = sorted(rng.choice(np.arange(1, steps), count, replace=False).tolist())
    stopped_and_resumed(tmp_path / "resumed", stops, **changes)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", steps)


def test_what_carries_on_and_what_begins_from_nothing(whole):
    at_boundaries = [saved(whole, step) for step in (4, 8)]
    assert [int(tree["state"]["step"]) for tree in at_boundaries] == [4, 8]
    assert {f"checkpoint_{step}" for step in (3, 4, 6, 8, 9, 12, 13)} == {
        path.name for path in whole.glob("checkpoint_*")
    }
    # The checkpoint of a boundary is the beginning of the next stage: fresh lanes, an unused pool.
    lanes, pool = (tree["lanes"] for tree in at_boundaries)
    assert lanes["memory"].shape[1] == 2 and lanes["keys"].shape[2:4] != pool["keys"].shape[2:4]
    assert lanes["position"].max() == pool["position"].max() == 0 and pool["position"].shape == (4,)
    assert saved(whole, 6)["lanes"]["position"].max() > 0
    assert [saved_data(whole, step)["stage"]["index"] for step in (3, 4, 6, 8, 13)] == [0, 1, 1, 2, 2]
    tree = saved(whole, STEPS)["state"]
    counts = [int(leaf) for leaf in jax.tree.leaves(tree) if leaf.shape == ()]
    assert counts == [STEPS] * 3  # the number of steps, Adam's and the schedule's
    assert [(x["step"], x["stage"]) for x in history(whole)] == [(4, 1), (5, 2), (8, 2), (10, 3), (13, 3)]


@pytest.mark.slow
def test_a_run_that_has_ended_goes_on_with_another_stage(tmp_path):
    first, more = {"steps": 2, "blocks": 4, "batch_size": 4}, {"state_passing": POOL}
    stages = (first, {"batch_size": 2, "steps": 3}, {**more, "memory": {"update": "residual"}})
    loop.train(run_of(tmp_path / "longer", (first, {"batch_size": 2}), steps=5))
    loop.train(run_of(tmp_path / "longer", stages), allow_changes=("stages",))
    loop.train(run_of(tmp_path / "whole", stages))
    assert_same_run(tmp_path / "longer", tmp_path / "whole")


@pytest.mark.slow
def test_one_stage_is_the_run_without_stages(tmp_path):
    plain = run_of(tmp_path / "plain", stages=(), steps=5, batch_size=4)
    loop.train(plain)
    loop.train(run_of(tmp_path / "staged", stages=({"batch_size": 4},), steps=5, batch_size=4))
    assert_same_run(tmp_path / "plain", tmp_path / "staged", 5)


@pytest.mark.slow
def test_the_model_of_the_run_is_that_of_the_last_stage(tmp_path, capsys):
    stages = ({"steps": 2, "blocks": 4}, {"block_size": 16, "memory_segments": 0, "blocks": 2})
    seen = []

    class Evaluation(Probe):
        def __call__(self, model, params, step):
            seen.append((step, model.config.block_size))
            return {}

        def report(self, model, params, model_dir):
            return f"reported with blocks of {model.config.block_size}"

    every = Every(checkpoint=1, evaluation=1)
    loop.train(run_of(tmp_path, stages, steps=3, evaluation=Evaluation(), every=every))
    assert seen == [(1, 16), (2, 16), (3, 16)]
    output = capsys.readouterr().err
    assert "reported with blocks of 16" in output
    assert "Step 0: stage 1 of 2: rows of 32 tokens in blocks of 8, batches of 2." in output
    assert "Step 2: stage 2 of 2: rows of 32 tokens in blocks of 16, batches of 2." in output
    config = check_model(tmp_path).config
    assert (config.block_size, config.memory_segments) == (16, 0)
    # No parameter depends on the block size: a checkpoint of any stage can be read with the last one's.
    for step in (1, 3):
        loaded = load_model(str(tmp_path / f"checkpoint_{step}"))
        assert loaded.model.config.block_size == 16
        assert_identical(loaded.params, saved(tmp_path, step)["target"])


@pytest.mark.slow
def test_stages_of_equal_shapes_share_their_programs(tmp_path, monkeypatch):
    made, make = [], compiling.make_train_step
    monkeypatch.setattr(compiling, "make_train_step", lambda *args: made.append(make(*args)) or made[-1])
    stages = (
        {"steps": 1, "blocks": 4},
        {"steps": 1, "options": {"filler": "repeated"}},
        {"steps": 1, "batch_size": 4},
        {"block_size": 16, "blocks": 2, "batch_size": 2},
    )
    loop.train(run_of(tmp_path, stages, steps=4))
    # The third stage is the program of the first for other shapes, the fourth another model.
    assert [step._cache_size() for step in made] == [2, 1]


def test_stages_read_other_documents():
    source = dict(task=passkey(), batch_size=2, length=32, block_size=BLOCK)
    seen = set()
    for stage in range(3):
        feed = named("none").feed(Source(**source, stage=stage), make_model(), None)
        seen |= {row.tobytes() for row in feed.next(5).batch["decoder_target_tokens"]}
    assert len(seen) == 6
    documents = [np.full(32, 5 + i) for i in range(20)]
    orders = []
    for stage in range(2):
        feed = Lanes().feed(Source(documents, 1, 32, BLOCK, stage=stage), make_model(), None)
        assert isinstance(feed.lanes, ContinuousLanes)
        orders.append([int(feed.next(i).batch["decoder_target_tokens"][0, 0]) for i in range(20)])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


# ---------------------------------------------------------------- until


class EasyRows:
    """PassKey rows of repeated filler; all tokens count, so that accuracy rises within a few steps."""

    vocab, min_length = passkey().vocab, passkey().min_length

    def example(self, index, length):
        return passkey(filler="repeated").example(index, length)

    def batch(self, indices, length):
        batch = passkey(filler="repeated").batch(indices, length)
        return {**batch, "decoder_loss_weights": np.ones_like(batch["decoder_loss_weights"])}


@pytest.mark.slow
def test_until_ends_a_stage_early_and_resumes_exactly(tmp_path):
    """The last stage takes the steps that are left."""
    registry.register("easy_rows", EasyRows)
    changes = dict(
        stages=(
            {"steps": 18, "blocks": 4, "batch_size": 4, "until": {"accuracy": 0.01}},
            {"state_passing": LANES},
        ),
        steps=22,
        batch_size=4,
        task="easy_rows",
        options=None,
    )
    loop.train(run_of(tmp_path / "whole", **changes))
    first = [x["step"] for x in history(tmp_path / "whole") if x["stage"] == 1][-1]
    assert 4 < first < 18  # metrics are seen late
    assert saved_data(tmp_path / "whole", 22)["stage"] == {"index": 1, "first": first, "level": 0.0}
    stopped_and_resumed(tmp_path / "resumed", (3, first - 1, first, first + 1), **changes)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 22)


def test_until_is_measured_on_the_longest_documents():
    stages = stages_of(run_of("/unused", (
        {"steps": 5, "blocks": 4, "curriculum": {"blocks": (4,)}, "until": {"exact_match": 0.18}},
        {},
    )))  # fmt: skip
    place, right = Place(stages, STEPS), {"exact_match": [2.0, 2.0]}
    place.observe(3, right)
    assert place.level == 0 and not place.over(1) and place.over(5)
    place.observe(4, right)
    assert place.level == pytest.approx(0.1) and not place.over(2)
    place.observe(4, right)
    assert place.over(2)
    place.advance(2)
    assert (place.index, place.first, place.level, place.end) == (1, 2, 0.0, STEPS)
    assert not place.over(STEPS)
    again = Place(stages, STEPS)
    again.set_state(json.loads(json.dumps(place.get_state())))
    assert again.get_state() == place.get_state()


# ---------------------------------------------------------------- lines


def test_a_line_keeps_what_it_leaves_out():
    curriculum = Curriculum((4,), unlock=0.5)
    stages = stages_of(run_of("/unused", (
        {"steps": 1, "block_size": 16, "blocks": 2, "options": {"depth": None}},
        {"steps": 2, "block_size": 8, "state_passing": "continuous", "microbatches": 2,
         "memory": {"update": "gated"}},
        {"steps": 3, "blocks": 4, "curriculum": {"blocks": [2, 4]}, "options": {"digits": 2}},
        {"curriculum": None},
    ), curriculum=curriculum))  # fmt: skip
    runs = [stage.run for stage in stages]
    assert [run.model.config.block_size for run in runs] == [16, 8, 8, 8]
    assert [run.model.config.memory.update for run in runs] == ["residual", *["gated"] * 3]
    assert [run.data.length for run in runs] == [32, 16, 32, 32]
    assert [run.state_passing for run in runs] == [named("none"), *[named("continuous")] * 3]
    assert [run.microbatches for run in runs] == [1, 2, 2, 2]
    assert [run.data.curriculum for run in runs] == [
        curriculum, curriculum, Curriculum([2, 4], unlock=0.5), None
    ]  # fmt: skip
    assert runs[0].data.options["depth"] is None and "digits" in runs[0].data.options
    assert runs[2].data.options == {**runs[0].data.options, "digits": 2}
    assert [stage.steps for stage in stages] == [1, 2, 3, None]
    assert all(run.stages == () and run.steps == STEPS for run in runs)


def test_stages_are_lines_of_gin():
    """References, macros and bindings reach them as they reach the run."""
    files = ["gin_configs/runs/pretrain.gin", "gin_configs/models/tiny.gin"]
    settings = dict(
        STAGES=[
            {"steps": 2, "block_size": 16, "blocks": 4},
            {"state_passing": "aged", "curriculum": {"blocks": (4, 8)}},
        ],
        MODEL_DIR="/unused",
        MIXTURE_OR_TASK_NAME="passkey_words",
        TASK_FEATURE_LENGTHS={"targets": 64},
        TRAIN_STEPS=5,
        BATCH_SIZE=2,
    )
    binding = {"famx.training.state_passing.Aged.groups": 3}
    stages = gin_utils.call_with(lambda: stages_of(Run()), files, settings | binding)
    assert stages[0].run.model.config.block_size == 16
    assert stages[1].run.state_passing == Aged(groups=3)
    assert stages[1].run.data.curriculum == Curriculum((4, 8))


BAD = {
    "a dict": ({"steps": 1}, "Run.stages must be a tuple of dicts"),
    "no dicts": ((1, 2), r"Run.stages\[0\] must be a dict with keys among steps, "),
    "unknown": (({"block_sise": 8}, {}), r"stages\[0\] has no \'block_sise\'; .*mean block_size"),
    "no steps": (({"blocks": 4}, {}), "Stage 1 .*steps is missing: only the last"),
    "0 steps": (
        ({"steps": 0}, {}),
        r"stages\[0\]\[\'steps\'\] must be a whole number of at least 1 or a number above 0 and below 1,",
    ),
    "half a row": (({"blocks": 4.5},), r"\[\'blocks\'\] must be a whole number of at least 1, not 4.5"),
    "row": (({"steps": 1}, {"block_size": 12}), "Stage 2 .*12 tokens does not divide the row of 32"),
    "memory": (({"steps": 1}, {"block_size": 1, "blocks": 32}), "Stage 2 .*exceeds block_size 1"),
    "memory's field": (
        ({"steps": 1}, {"memory": {"gate": 1}}),
        "Stage 2 .*A memory of the kind 'fam' has no field gate; it has adapter_rank, bias, first_res",
    ),
    "memory's value": (
        ({"steps": 1}, {"memory": {"update": "gate"}}),
        "Stage 2 .*update must be one of 'residual', 'gated'",
    ),
    "memory's parameters": (
        ({"steps": 1}, {"memory": {"length": 3}}), "Stage 2 .*the memory has other parameters",
    ),
    "row's share": (({"blocks": 4, "batch_size": 1.5},), r"\[\'batch_size\'\] must be .* not 1.5"),
    "rows that none has": (({"blocks": 4, "batch_size": 4},), "BATCH_SIZE is 2, but all stages have"),
    "length that none has": (({"blocks": 8},), "TASK_FEATURE_LENGTHS gives rows of 32 tokens, but all"),
    "both": (({"blocks": 8, "batch_size": 4},), "rows of 32 tokens and BATCH_SIZE is 2, but all stages"),
    "segments": (({"memory_segments": -1},), r"\[\'memory_segments\'\] must be a whole number of at"),
    "sum": (({"steps": 3}, {"steps": 4}), "add up to 7, but TRAIN_STEPS is 13"),
    "none left": (({"steps": 13}, {}), "take 13 steps, but TRAIN_STEPS is 13: none is left"),
    "microbatches": (({"steps": 1}, {"microbatches": 3}), "Stage 2 .*BATCH_SIZE"),
    "state passing": (({"state_passing": "old"},), r"\[\'state_passing\'\] must be one of \'none\',"),
    "state passing's type": (({"state_passing": 1},), "must be one of .* or a StatePassing .*, not 1"),
    "options": (({"options": "digits"},), r"\[\'options\'\] must be a dict, not \'digits\'"),
    "task": (({"steps": 2}, {"options": {"digit": 1}}), "Stage 2 .*passkey_words.*digit"),
    "vocabulary": (
        ({"steps": 2}, {"options": {"vocabulary": "bytes"}, "blocks": 40}),
        "Stage 2 .*vocabulary must be that of the stages before",
    ),
    "curriculum": (({"curriculum": (2, 4)},), r"\[\'curriculum\'\] must be a dict with keys among"),
    "its field": (({"curriculum": {"block": (2,)}},), "has no 'block'; .*Did you mean blocks?"),
    "its lengths": (({"curriculum": {"unlock": 0.5}},), "The first curriculum needs 'blocks'"),
    "its value": (({"curriculum": {"blocks": (4,), "unlock": 2}},), r"\[\'curriculum\'\]\[\'unlock\'\]"),
    "too long": (({"blocks": 4, "curriculum": {"blocks": (8,)}},), "to 8 blocks, but the rows hold 4"),
    "groups": (
        ({"steps": 3}, {"state_passing": Aged(groups=1), "curriculum": {"blocks": (4, 8, 16)}}),
        "Stage 2 .*raise Aged.groups to at least 2",
    ),
    "until the end": (({"until": {"accuracy": 0.5}},), "this one is the last"),
    "until what": (({"steps": 1, "until": {"loss": 1.0}}, {}), r"\[\'until\'\] must be one metric of"),
    "until more": (({"steps": 1, "until": {"accuracy": 95}}, {}), "with a value between 0 and 1"),
    "until and steps": (
        ({"steps": 1, "until": {"accuracy": 0.5}}, {"steps": 12}),
        "Stage 2 .*Leave out its steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stages, sentence", BAD.values(), ids=BAD)
def test_a_line_that_does_not_fit(stages, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence) as caught:
        loop.train(run_of(tmp_path, stages))
    assert "\n" not in str(caught.value).split("\n  In call to configurable")[0]
    assert not list(tmp_path.iterdir())  # nothing that would stand in the way of the next try


@given(steps=st.integers(4, 10_000), rows=st.integers(1, 512))
def test_shares_are_of_the_numbers_of_the_run(steps, rows):
    lines = (
        {"steps": 0.25, "batch_size": 0.5},
        {"steps": 1, "batch_size": 0.3},
        {"steps": 1, "batch_size": 7},
        {},
    )
    stages = stages_of(run_of("/unused", lines, steps=steps, batch_size=rows))
    assert [stage.steps for stage in stages] == [round(steps / 4), 1, 1, None]
    sizes = [stage.run.data.batch_size for stage in stages]
    assert sizes == [max(1, round(rows / 2)), max(1, round(0.3 * rows)), 7, 7]


@pytest.mark.slow
def test_a_run_goes_on_with_more_steps_where_stages_are_shares(tmp_path):
    """The shares are the setting, so that TRAIN_STEPS may change as in any other run."""
    stages = ({"steps": 0.5, "blocks": 4, "batch_size": 0.5}, {"batch_size": 1})
    loop.train(run_of(tmp_path, stages, steps=4))
    loop.train(run_of(tmp_path, stages, steps=6))
    assert [line["stage"] for line in history(tmp_path) if line["split"] == "train"][-1] == 2
    other = ({**stages[0], "steps": 0.4}, stages[1])
    with pytest.raises(ConfigError, match="steps was 0.5 and is now 0.4"):
        loop.train(run_of(tmp_path, other, steps=7))


def test_a_curriculum_that_no_stage_has():
    first = {"steps": 1, "blocks": 4, "curriculum": {"blocks": (2, 4)}}
    stages = (first, {"curriculum": {"blocks": (4,)}})
    with pytest.raises(ConfigError, match=r"Curriculum.blocks is \(3, 4\), but all stages have"):
        stages_of(run_of("/unused", stages, curriculum=Curriculum([3, 4])))
    stages_of(run_of("/unused", stages, curriculum=Curriculum([2, 4])))
    whole = ({**first, "curriculum": Curriculum([2, 4])}, {})  # an object in place of fields
    with pytest.raises(ConfigError, match=r"Curriculum.blocks is \(3, 4\), but all stages have"):
        stages_of(run_of("/unused", whole, curriculum=Curriculum([3, 4])))


def test_a_memory_file_has_no_stages():
    with pytest.raises(ConfigError, match="INITIAL_MEMORY_FILE and STAGES exclude each other"):
        stages_of(run_of("/unused", ({"blocks": 4},), state_passing=FromMemoryFile("x.famem")))


def test_stages_that_a_stopped_run_has_no_more(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    fewer = run_of(tmp_path / "run", ({"steps": 4, "blocks": 4}, {}))
    with pytest.raises(ConfigError, match="stages was 3 and is now 2"):
        loop.train(fewer)
    with pytest.raises(ConfigError, match="stopped in stage 3, but STAGES has only 2"):
        loop.train(dataclasses.replace(fewer, steps=STEPS + 1), allow_changes=("stages",))
