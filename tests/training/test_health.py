"""Alarms, good checkpoints, and what a run whose numbers go wrong says, keeps and leaves for a replay."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import MODES, Poisoned, Probe, history, run, saved_data
from tiny import make_model, make_run

from famx.base.errors import ConfigError
from famx.data.tasks import registry
from famx.training import loop, replay
from famx.training.health import Alarm, GoodCheckpoints, Health, Unsound, Watch, check_sound
from famx.training.nonfinite import first_nonfinite
from famx.training.run import Every
from famx.training.run_log import read_metrics

VOCABULARY = 100


def sums(loss=2.0, rms=1.0, skipped=0.0):
    return {"loss": [loss * 8, 8.0], "memory_rms": [rms, 1.0], "skipped": [skipped, 1.0]}


def watched(*values, **health):
    """`(well, names of alarms)` of steps with these sums, from step 1."""
    watch = Watch(Health(**health), VOCABULARY)
    results = [watch.observe(step, x) for step, x in enumerate(values, 1)]
    return [(well, [alarm.name for alarm in alarms]) for well, alarms in results]


@pytest.mark.parametrize("loss", [3.6, 1e30, np.inf, np.nan])
def test_a_loss_that_jumps_is_a_spike_once(loss):
    quiet = [sums(2 + 0.1 * (i % 5)) for i in range(30)]
    found = watched(*quiet, sums(loss), sums(loss), sums(2), sums(loss))
    assert found[:30] == [(True, [])] * 30
    assert found[30:] == [(False, ["loss_spike"]), (False, []), (True, []), (False, ["loss_spike"])]


def test_a_loss_that_varies_much_has_no_spike_within_its_usual_range():
    values = [sums(2 + (i * 7 % 11)) for i in range(60)]
    assert watched(*values, sums(14))[-1] == (True, [])
    assert watched(*values, sums(60))[-1] == (False, ["loss_spike"])


def test_a_small_loss_may_rise_by_a_margin():
    quiet = [sums(1e-3)] * 30
    assert watched(*quiet, sums(0.4))[-1] == (True, [])
    assert watched(*quiet, sums(0.6))[-1] == (False, ["loss_spike"])


def test_at_the_start_only_a_loss_far_beyond_chance_is_a_spike():
    assert watched(sums(40.0)) == [(True, [])]  # 10 log(100) is 46
    assert watched(sums(50.0)) == [(False, ["loss_spike"])]


@pytest.mark.parametrize("rms", [0.09, 11.0])
def test_a_memory_that_grows_or_fades_raises_an_alarm(rms):
    assert watched(*[sums()] * 30, sums(rms=rms))[-1] == (True, ["memory_alarm"])
    assert watched(*[sums()] * 30, sums(rms=rms), memory_ratio=20.0)[-1] == (True, [])


@pytest.mark.parametrize("rms", [np.inf, np.nan])
def test_a_memory_that_is_not_finite_is_not_well_even_where_the_loss_is(rms):
    assert watched(sums(rms=rms), sums(rms=rms)) == [(False, ["memory_alarm"]), (False, [])]


def test_a_step_without_a_finite_gradient_is_an_alarm_and_changes_nothing_else():
    watch = Watch(Health(), VOCABULARY)
    watch.observe(1, sums())
    before = watch.get_state()
    well, (alarm,) = watch.observe(2, sums(loss=0, rms=0, skipped=1))
    sentence = "Step 2: the gradient was not finite, so the step changed nothing."
    assert not well and alarm == Alarm("not_finite", sentence, {"not_finite": 1.0})
    assert {**watch.get_state(), "raised": []} == before


def test_a_step_whose_tokens_have_no_weight_says_nothing():
    empty = {"loss": [0.0, 0.0], "skipped": [0.0, 1.0]}
    assert watched(*[sums()] * 30, empty)[-1] == (True, [])


def test_a_watch_resumes_exactly():
    values = [sums(2 + i % 3, rms=1 + i % 2) for i in range(40)] + [sums(1e3, rms=1e3)] * 2
    whole, first = Watch(Health(), VOCABULARY), Watch(Health(), VOCABULARY)
    expected = [whole.observe(step, x) for step, x in enumerate(values)]
    for step in range(41):  # the alarms of step 40 are raised, and last
        first.observe(step, values[step])
    second = Watch(Health(), VOCABULARY)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert second.observe(41, values[41]) == expected[41] == (False, [])
    assert second.get_state() == whole.get_state()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(window=1), "Health.window must be a whole number of at least 2, not 1"),
        (dict(loss_ratio=0.5), "Health.loss_ratio must be a number of at least 1, not 0.5"),
        (dict(loss_ratio=float("nan")), "Health.loss_ratio must be a number of at least 1, not nan"),
        (dict(least_steps=60), "Health.window holds only 50"),
    ],
)
def test_limits_out_of_range(settings, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Health(**settings)


# ---------------------------------------------------------------- parameters and good checkpoints


@pytest.mark.parametrize(
    "value, text",
    [(1e30, "1e+30"), (-2e6, "-2e+06"), (np.nan, "nan"), (np.inf, "inf")],
)
def test_a_parameter_beyond_its_limit_is_named(value, text):
    params = {"layers": {"up": jnp.ones((2, 3)).at[1, 2].set(value)}, "ids": jnp.arange(3)}
    with pytest.raises(Unsound) as caught:
        check_sound(params, (), Health(), 7)
    assert str(caught.value) == f"The parameter layers/up[1, 2] is {text} after step 7"
    assert caught.value.step == 6


def test_moments_must_be_finite_but_may_be_large():
    params = {"w": jnp.ones(3)}
    moments = optax.adam(1e-3).init(params)
    large = jax.tree.map(lambda x: x + 1e30 if x.ndim else x, moments)
    check_sound(params, large, Health(), 1)
    bad = jax.tree.map(lambda x: x * np.inf if x.ndim else x, large)
    with pytest.raises(Unsound, match=r"The optimiser's 0/mu/w\[0\] is inf after step 1"):
        check_sound(params, bad, Health(), 1)


def test_a_checkpoint_is_good_after_enough_steps_that_went_well(tmp_path):
    good = GoodCheckpoints(tmp_path, (), 2, writes=True)
    good.saved(4)
    good.observe(4, False, tuple)  # the step that led to it
    good.observe(5, True, tuple)
    assert good.newest is None and good.kept == {4}
    good.observe(6, True, tuple)
    assert good.newest == 4 and good.kept == {4}
    good.saved(6)
    good.observe(7, True, lambda: (4,))
    assert good.kept == {4, 6}
    good.observe(8, False, lambda: (4, 6))
    assert good.kept == {4}
    for step in range(9, 20):
        good.observe(step, True, lambda: (4, 6))
    assert good.newest == 4

    resumed = GoodCheckpoints(tmp_path, (4, 6), 2, writes=True)
    assert resumed.newest == 4 and resumed.kept == {4, 6}
    for step in (7, 8):
        resumed.observe(step, True, lambda: (4, 6))
    assert json.loads((tmp_path / "good_checkpoints.json").read_text()) == {"steps": [4, 6]}
    assert resumed.kept == {6}
    assert GoodCheckpoints(tmp_path, (6,), 2, writes=False).newest == 6
    assert GoodCheckpoints(tmp_path, (4,), 2, writes=False).newest == 4  # resumed before 6


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"steps": ["4"]}', "\xff"])
def test_a_damaged_list_of_good_checkpoints_is_no_list(tmp_path, text):
    (tmp_path / "good_checkpoints.json").write_text(text)
    assert GoodCheckpoints(tmp_path, (4,), 1, writes=True).newest is None


# ---------------------------------------------------------------- a run whose numbers go wrong


def poisoning(step, value, layer=1):
    """Adam whose update of step `step` (from 0) sets one kernel of a layer to `value`."""
    adam = optax.adam(1e-2)

    def update(grads, state, params=None):
        count, inner = state
        updates, inner = adam.update(grads, inner, params)
        down = updates["layers"]["mlp"]["down"]["kernel"]
        bad = down.at[layer].set(value)
        updates["layers"]["mlp"]["down"]["kernel"] = jnp.where(count == step, bad, down)
        return updates, (count + 1, inner)

    return optax.GradientTransformation(lambda params: (jnp.int32(0), adam.init(params)), update)


def bad_run(folder, mode="none", step=9, value=3.3e38, **changes):
    """A run of two layers, of which the second goes wrong after `step` steps."""
    settings = dict(
        model=make_model(num_layers=2), optimizer=poisoning(step, value), steps=60,
        every=Every(log=1, checkpoint=4),
        health=Health(confirm_steps=2, largest_parameter=3.4e38), checkpoints_to_keep=1,
    )  # fmt: skip
    return run(folder, mode, **{**settings, **changes})


def test_parameters_beyond_the_limit_end_the_run_before_they_are_saved(tmp_path):
    with pytest.raises(ConfigError) as caught:
        bad_run(tmp_path, value=1e30, health=Health(confirm_steps=2))
    assert re.fullmatch(
        r"The parameter layers/mlp/down/kernel\[1, \d+, \d+\] is 1e\+30 after step 12: lower the learning"
        r" rate. The last good checkpoint is that of step 4; --resume_from=4 resumes from it. famx replay"
        rf" {tmp_path} shows where the numbers went wrong.",
        str(caught.value).split("\n")[0],  # gin adds a line
    )
    assert {path.name for path in tmp_path.glob("checkpoint_*")} == {"checkpoint_4", "checkpoint_8"}


@pytest.fixture
def lines(monkeypatch):
    """Losses and gradient norms of all steps, as they are taken."""
    taken, take_step = [], loop.take_step

    def note(session):
        rows, batch, metrics = take_step(session)
        numbers = [float(metrics[name].total) for name in ("loss", "gradient_norm", "skipped")]
        taken.append((session.step, *numbers))
        return rows, batch, metrics

    monkeypatch.setattr(loop, "take_step", note)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_replay_takes_the_same_steps_and_names_the_layer(mode, tmp_path, lines):
    with pytest.raises(ConfigError, match="The gradient was not finite in the 20 steps before step 30"):
        bad_run(tmp_path, mode)
    assert json.loads((tmp_path / "good_checkpoints.json").read_text())["steps"][-1] == 8
    assert (tmp_path / "checkpoint_8").is_dir()  # kept beside the newest one
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["step"], stopped["good"], stopped["checkpoint"]) == (10, 8, 8)
    events = read_metrics(str(tmp_path), "event")
    assert [line["step"] for line in events if "not_finite" in line] == [11]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    first, said = list(lines), []
    lines.clear()
    origin = replay.replay(replayed(tmp_path, mode), said.append)
    assert lines and lines == [line for line in first if stopped["checkpoint"] < line[0] <= 11]
    place = replay.where(origin)
    assert (place.layer, place.backward) == (1, False)
    # The pool of aged states was made by the bad weights before the step.
    memories = {"start of the memory (feed-forward)", "memory update (feed-forward)"}
    assert place.part in ({"carried states"} if mode == "aged" else memories)
    text = "\n".join(said)
    assert "layer 1 of 0 to 1" in text and "is another" not in text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def replayed(folder, mode):
    """The run of `bad_run` as a value."""
    caught = []
    original, loop.train = loop.train, caught.append
    try:
        bad_run(folder, mode)
    finally:
        loop.train = original
    return caught[0]


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_to_blame(tmp_path):
    registry.register("poisoned", Poisoned)
    bad = {"steps": tuple(range(3, 90))}
    settings = dict(task="poisoned", options=bad, every=Every(1, 4), steps=90)
    with pytest.raises(ConfigError, match="There is no good checkpoint"):
        run(tmp_path, **settings, random_seed=3)
    said = []
    again = dict(**settings, batch_size=4, model_dir=str(tmp_path))
    origin = replay.replay(make_run(**again, random_seed=3), said.append)
    assert (origin.names, origin.kind) == (("decoder_loss_weights",), "inf")
    assert said[-1].startswith("A value is not finite before the step begins: batch, inf at [0, 31] of")
    assert not any("is another" in line for line in said)
    again["options"] = {"steps": ()}
    assert replay.replay(make_run(**again, random_seed=4), said.append) is None
    assert [line.split(":")[0] for line in said[-3:]] == [
        "The random key is another", "The batch is another than that of the run",
        "All its values are finite here",
    ]  # fmt: skip


def test_a_replay_needs_a_run_that_stopped(tmp_path):
    with pytest.raises(ConfigError, match="no run has stopped there because its numbers went wrong"):
        replay.replay(make_run(model_dir=str(tmp_path)))


@pytest.mark.slow
def test_alarms_are_the_same_in_a_resumed_run(tmp_path):
    """The loss jumps in the steps around a checkpoint, after which the run is stopped and resumed."""
    settings = dict(
        optimizer=poisoning(8, 30.0, layer=0), model=make_model(), every=Every(5, 5, 1), steps=14,
        health=Health(window=6, least_steps=4, loss_margin=0.1, loss_deviations=0, loss_ratio=1),
    )  # fmt: skip
    run(tmp_path / "whole", probe=Probe(), **settings)
    for stops in (9, 10, 11, 12):
        folder = tmp_path / str(stops)
        for _ in range(2):
            run(folder, probe=Probe(stop_after=(stops,)), **settings)
        assert history(folder, "event") == history(tmp_path / "whole", "event")
        assert saved_data(folder, 14) == saved_data(tmp_path / "whole", 14)
    assert any("loss_spike" in line for line in history(tmp_path / "whole", "event"))


# ---------------------------------------------------------------- the first value that is not finite


def test_harmless_infinities_are_not_origins():
    def function(x):
        masked = jnp.where(jnp.arange(4) < 2, x, -jnp.inf)  # as in attention
        unused = jnp.log(x - x)
        return jnp.sum(jax.nn.softmax(masked)), jnp.where(x > -1, x, unused)

    assert first_nonfinite(function, jnp.ones(4)) is None
    bad = lambda x: jnp.sum(jnp.stack(function(x)[:1])) + jnp.sqrt(x[0] - 3)
    assert first_nonfinite(bad, jnp.ones(4)).operation == "sqrt"


def test_the_step_of_a_loop_is_found():
    def step(carry, x):
        return carry * x, jnp.log(carry)

    function = lambda xs: jax.lax.scan(step, 1.0, xs)[1].sum()
    origin = first_nonfinite(function, jnp.asarray([1.0, 2.0, -1.0, 1.0]))
    assert (origin.operation, origin.kind) == ("log", "nan")
    assert [(x.index, x.length) for x in origin.loops] == [(3, 4)]


def test_the_backward_pass_is_told_from_the_forward_pass():
    function = jax.grad(lambda x: x * 1e25 * 1e25)  # 0 there, and its slope is beyond float32
    assert first_nonfinite(function, 0.0).backward
    assert first_nonfinite(lambda x: jnp.log(x) / 2, 0.0).backward is False


def test_an_argument_that_is_not_finite_is_to_blame():
    assert first_nonfinite(lambda x: x + 1, jnp.asarray([1.0, np.nan])).operation == "argument"
