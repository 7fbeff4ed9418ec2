"""Resuming is the same run: what differs is said and refused, what is allowed is recorded."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
from tiny import make_model, make_run

from famx.base.errors import ConfigError
from famx.data.tasks import registry
from famx.memories import Fam
from famx.model_dir import digests
from famx.model_dir.checkpointer import Checkpointer
from famx.training import loop, optimizers, resuming, schedules
from famx.training import settings as settings_module
from famx.training.curriculum import Curriculum
from famx.training.run import Data, Every, Run
from famx.training.state_passing import Aged, Random
from famx.training.trainable import Trainable

STEPS = 2


def make(directory, **changes):
    settings = dict(
        model_dir=str(directory),
        steps=STEPS,
        optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, steps=50)),
        every=Every(log=1),
    )
    return make_run(**{**settings, **changes})


def train(directory, allow_changes=(), **changes):
    return loop.train(make(directory, **changes), allow_changes=allow_changes)


def files(directory):
    """Content of every file, except for empty directories."""
    return {p: p.read_bytes() for p in sorted(pathlib.Path(directory).rglob("*")) if p.is_file()}


def history(directory):
    return json.loads((directory / "settings.json").read_text())["history"]


def adam(rate=1e-3, **options):
    return optimizers.adamw(schedules.warmup_cosine(rate, steps=50), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained for `STEPS` steps; tests must leave it as it is."""
    directory = tmp_path_factory.mktemp("trained")
    train(directory)
    return directory


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(batch_size=4), "batch_size was 2 and is now 4"),
        (dict(random_seed=3), "random_seed was 0 and is now 3"),
        (dict(lengths={"targets": 40}), "length was 32 and is now 40"),
        (dict(optimizer=adam(2e-3)), "optimizer.learning_rate.learning_rate was 0.001 and is now 0.002"),
        (dict(optimizer=adam(weight_decay=0.1)), "optimizer.weight_decay was 0.0 and is now 0.1"),
        (dict(optimizer=optimizers.adamw(1e-3)), "optimizer.learning_rate was warmup_cosine"),
        (dict(optimizer=optimizers.adafactor(1e-3)), "optimizer was adamw and is now adafactor"),
        (dict(optimizer=optax.adam(1e-3)), "optimizer was adamw and is now GradientTransform"),
        (dict(model=make_model(dtype="bfloat16")), "model.dtype was 'float32' and is now 'bfloat16'"),
        (dict(model=make_model(random_position_offset=True)), "model.random_position_offset was False"),
        (dict(microbatches=2), "microbatches was 1 and is now 2"),
        (dict(state_passing=Random()), "state_passing was Fresh and is now Random"),
        (dict(state_passing=Aged()), "state_passing was Fresh and is now Aged"),
        (dict(options={"digits": 2, "header": False}), "task.digits was 1 and is now 2"),
        (dict(task="passkey"), "task was passkey_words and is now passkey"),
        (dict(curriculum=Curriculum((4,))), "curriculum was None and is now Curriculum"),
        (dict(trainable=Trainable("memory")), "trainable.name was 'all' and is now 'memory'"),
        (dict(stages=({"steps": 1}, {"batch_size": 4})), "stages was 1 and is now 2. Go back"),
    ],
)
def test_what_differs_is_said_and_nothing_is_written(trained, changes, sentence):
    before = files(trained)
    with pytest.raises(ConfigError) as caught:
        train(trained, **{"steps": 4, **changes})
    assert sentence in str(caught.value)
    assert f"The run in {trained} has taken 2 steps" in str(caught.value)
    assert files(trained) == before


def test_the_settings_are_named_so_that_they_can_be_allowed(trained):
    with pytest.raises(ConfigError) as caught:
        train(trained, random_seed=3, batch_size=4)
    assert "--gin.train.allow_changes=\"('random_seed', 'batch_size',)\"" in str(caught.value)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=3),
        dict(steps=3, every=Every(log=2, checkpoint=1, evaluation=3)),
        dict(steps=3, checkpoints_to_keep=1, minutes=60.0, adapter_dtype="bfloat16"),
        dict(steps=3, model=make_model(remat="full", unroll_layers=1, loss_chunk=16)),
    ],
)
def test_what_does_not_change_the_result_passes(tmp_path, changes):
    train(tmp_path)
    assert np.isfinite(train(tmp_path, **changes)["loss"])
    assert [(line["step"], line["changes"]) for line in history(tmp_path)] == [(0, []), (2, [])]


@pytest.mark.slow
def test_allowed_changes_pass_and_are_recorded(tmp_path, capsys):
    train(tmp_path)
    with pytest.raises(ConfigError, match="batch_size was 2"):
        train(tmp_path, ("learning_rate",), steps=3, optimizer=adam(5e-4), batch_size=4)
    train(tmp_path, ("learning_rate", "batch_size"), steps=3, optimizer=adam(5e-4), batch_size=4)
    said = capsys.readouterr().err
    assert "Since step 2: batch_size was 2 and is now 4." in said
    assert "Since step 2: optimizer.learning_rate.learning_rate was 0.001 and is now 0.0005." in said
    assert history(tmp_path)[1]["step"] == 2 and history(tmp_path)[1]["changes"] == [
        {"setting": "optimizer.learning_rate.learning_rate", "was": 0.001, "now": 0.0005},
        {"setting": "batch_size", "was": 2, "now": 4},
    ]
    # The checkpoint has the new settings: going back is a change, too.
    with pytest.raises(ConfigError, match="batch_size was 4 and is now 2"):
        train(tmp_path, steps=4, optimizer=adam(5e-4))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("allowed", [("optimizer",), ("OPTIMIZER.learning_rate",), ("learning_rate",)])
def test_a_part_of_a_name_allows_all_below(tmp_path, allowed):
    train(tmp_path)
    train(tmp_path, allowed, steps=3, optimizer=adam(2e-3))


def test_names_that_are_no_settings_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="names 'learning_rat', .*Did you mean learning_rate?"):
        train(trained, ("learning_rat",))
    with pytest.raises(ConfigError, match="allow_changes must be a tuple or list of texts"):
        train(trained, "learning_rate")
    with pytest.raises(ConfigError, match="names 'learning_rat', which is no setting"):
        train(tmp_path, ("learning_rat",))


def test_a_change_that_cannot_be_made_says_so(trained):
    with pytest.raises(ConfigError) as caught:
        train(trained, ("optimizer",), steps=3, optimizer=optimizers.adafactor(1e-3))
    assert "cannot continue with the changes that were allowed (optimizer)" in str(caught.value)
    assert "INITIAL_CHECKPOINT_PATH" in str(caught.value)


def test_a_schedule_that_ends_with_the_run_follows_its_steps(tmp_path, capsys):
    schedule = lambda steps: optimizers.adamw(schedules.warmup_cosine(1e-3, steps=steps))
    train(tmp_path, optimizer=schedule(STEPS))
    train(tmp_path, steps=3, optimizer=schedule(3))
    assert "Since step 2: optimizer.learning_rate.steps was 2 and is now 3." in capsys.readouterr().err
    assert history(tmp_path)[1]["changes"][0]["now"] == 3
    with pytest.raises(ConfigError, match="optimizer.learning_rate.steps was 3 and is now 5"):
        train(tmp_path, steps=4, optimizer=schedule(5))


def test_another_model_is_refused_as_before(trained):
    before = files(trained)
    with pytest.raises(ConfigError, match="holds another model, differing in memory.length"):
        train(trained, model=make_model(memory=Fam(4)), steps=4)
    assert files(trained) == before


def test_settings_beside_the_checkpoint_and_in_the_directory(trained):
    written = json.loads((trained / "settings.json").read_text())
    with Checkpointer(trained, read_only=True) as checkpointer:
        saved = checkpointer.data_state()["run"]
    assert saved["settings"] == written["settings"] and saved["steps"] == STEPS
    assert written["settings"]["optimizer"]["learning_rate"]["type"] == "warmup_cosine"
    assert written["settings"]["batch_size"] == 2 and written["settings"]["task"]["header"] is False
    (line,) = written["history"]
    assert line["step"] == 0 and line["steps"] == STEPS and line["jax"] == jax.__version__


def rewritten(directory, change):
    """Changes the data state of the newest checkpoint."""
    (path,) = directory.glob("checkpoint_*/dataset/metadata")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    checkpoint = path.parents[1]
    (checkpoint / digests.NAME).unlink()
    digests.write_digests(checkpoint)


def test_checkpoints_of_older_versions_resume_with_a_note(tmp_path, capsys):
    train(tmp_path)
    rewritten(tmp_path, lambda content: content.pop("run"))
    train(tmp_path, steps=3, batch_size=4)
    assert "step 2 does not tell the settings of its run" in capsys.readouterr().err


def test_the_vocabulary_of_an_older_run_is_not_replaced(tmp_path):
    train(tmp_path)
    rewritten(tmp_path, lambda content: content.pop("run"))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="trained with another vocabulary"):
        train(tmp_path, steps=3, task="passkey_bytes", lengths={"targets": 400})
    assert files(tmp_path) == before


@pytest.mark.slow
def test_another_version_is_a_note(tmp_path, capsys):
    def age(content):
        content["run"]["versions"] = {"famx": "0.0.1", "jax": "0.4"}
        del content["run"]["settings"]["microbatches"]  # a setting that did not exist

    train(tmp_path)
    rewritten(tmp_path, age)
    train(tmp_path, steps=3, microbatches=2)
    assert "was written with famx 0.0.1 and jax 0.4, and this is famx" in capsys.readouterr().err


def test_a_run_before_its_first_checkpoint_begins_from_nothing(tmp_path):
    resuming.History(tmp_path).begin(resuming.Start(None, {}), {"batch_size": 4}, make(tmp_path))
    train(tmp_path)
    assert len(history(tmp_path)) == 1


# ---------------------------------------------------------------- a finished run


@dataclasses.dataclass
class Counted:
    """An evaluation that counts its calls in a file."""

    path: str
    scale: float = 1.0

    def __call__(self, model, params, step):
        with open(self.path, "a") as file:
            file.write(".")
        return {"calls": self.scale * len(pathlib.Path(self.path).read_text())}


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    count = tmp_path / "count"
    evaluation = Counted(str(count))
    scalars = train(tmp_path / "run", evaluation=evaluation)
    before = files(tmp_path)
    again = train(tmp_path / "run", evaluation=evaluation)
    assert files(tmp_path) == before and count.read_text() == "."
    assert f"run in {tmp_path / 'run'} is finished, with 2 steps: there" in capsys.readouterr().err
    assert again["calls"] == scalars["calls"] == 1 and again["loss"] == scalars["loss"]
    train(tmp_path / "run", evaluation=evaluation, steps=1)  # fewer steps than it took
    assert files(tmp_path) == before


@pytest.mark.slow
def test_an_evaluation_that_is_missing_is_made(tmp_path):
    count = tmp_path / "count"
    train(tmp_path / "run")
    train(tmp_path / "run", evaluation=Counted(str(count)))
    assert count.read_text() == "."
    train(tmp_path / "run", evaluation=Counted(str(count), scale=2.0))  # another one
    train(tmp_path / "run", evaluation=Counted(str(count), scale=2.0))
    assert count.read_text() == ".."
    train(tmp_path / "run", evaluation=Counted(str(count), scale=2.0), steps=3)
    assert count.read_text() == "..."


# ---------------------------------------------------------------- the list of settings


def test_every_field_of_a_run_is_compared_or_free(trained):
    """A new field of Run or Data that is in neither list is compared by itself."""
    written = json.loads((trained / "settings.json").read_text())["settings"]
    of_run = {f.name for f in dataclasses.fields(Run)} - set(settings_module.FREE)
    of_data = {f.name for f in dataclasses.fields(Data)} - {"options", "lengths", "on_bad_record"}
    assert of_run - {"data", "stages"} | of_data | {"length"} <= set(written)
    assert set(settings_module.FREE) <= {f.name for f in dataclasses.fields(Run)}


@pytest.mark.slow
def test_settings_of_stages_are_those_of_each(tmp_path):
    lines = ({"steps": 1, "batch_size": 4}, {"batch_size": 2})
    train(tmp_path, stages=lines)
    written = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert (written["stage_1"]["batch_size"], written["stage_2"]["batch_size"]) == (4, 2)
    with pytest.raises(ConfigError, match="stage_1.batch_size was 4 and is now 2"):
        train(tmp_path, stages=({"steps": 1, "batch_size": 2}, lines[1]), steps=3)
    train(tmp_path, ("stage_2",), stages=(lines[0], {"batch_size": 4}), steps=3)


def test_a_task_that_is_no_dataclass_is_compared_by_its_options(tmp_path):
    class Rows:
        def __init__(self, task, shift):
            self.task, self.shift = task, shift
            self.vocab, self.min_length, self.example = task.vocab, task.min_length, task.example

        def batch(self, indices, length):
            return self.task.batch([i + self.shift for i in indices], length)

    made = make_run().data.make_task()
    registry.register("rows", lambda shift=0: Rows(made, shift))
    train(tmp_path, task="rows", options={})
    with pytest.raises(ConfigError, match="task.shift was unset and is now 5"):
        train(tmp_path, task="rows", options={"shift": 5}, steps=3)
