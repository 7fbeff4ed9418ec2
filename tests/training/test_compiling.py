"""Steps that threads compile ahead: the same run, and each program once and by a thread."""

import threading
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_stages import POOL, STAGES, run_of, saved
from tiny import BLOCK, assert_identical, make_model, make_run, passkey

from famx.base.errors import ConfigError
from famx.data.probes import RecallProbe
from famx.training import compiling, loop
from famx.training.compiling import Programs, threads_of
from famx.training.curriculum import Curriculum
from famx.training.source import Source
from famx.training.state_passing import Lanes, named

LENGTHS = (  # shapes that are known before
    {"steps": 12, "blocks": 5, "curriculum": {"blocks": (4, 5), "unlock": 0.0}},
    {"steps": 2, "blocks": 4, "batch_size": 4, "curriculum": None},
    {"batch_size": 2, "state_passing": POOL, "curriculum": {"blocks": (4, 6), "unlock": 0.0}},
)


def traced_by(monkeypatch) -> list[str]:
    """The names of the threads that trace a step, as they do so."""
    names, make = [], compiling.make_train_step

    def noted(run, abstract):
        step = make(run, abstract)

        class Noted:
            def __call__(self, *arguments):
                names.append("called")
                return step(*arguments)

            def lower(self, *arguments):
                names.append(threading.current_thread().name)
                return step.lower(*arguments)

        return Noted()

    monkeypatch.setattr(compiling, "make_train_step", noted)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("stages", [STAGES, LENGTHS], ids=["states", "lengths"])
def test_a_run_that_compiles_ahead_is_the_same_run(tmp_path, stages):
    steps = 16
    for name, threads in (("ahead", 2), ("where needed", 0)):
        loop.train(run_of(tmp_path / name, stages, steps=steps, compile_threads=threads))
    assert_identical(saved(tmp_path / "ahead", steps), saved(tmp_path / "where needed", steps))


@pytest.mark.slow
def test_all_known_shapes_are_compiled_by_threads_and_once(tmp_path, monkeypatch):
    names = traced_by(monkeypatch)
    loop.train(run_of(tmp_path, LENGTHS, steps=16, compile_threads=1))
    # 4 and 5 blocks of two rows, 4 blocks of four rows, and 4 blocks that continue states of the pool.
    assert len(names) == 4 and all(name.startswith("compile") for name in names)


@pytest.mark.slow
def test_a_resumed_run_compiles_the_length_that_it_had_come_to_first(tmp_path, monkeypatch):
    lengths, lower = [], compiling._Step._compiled

    def noted(step, state, batch):
        lengths.append(batch["decoder_target_tokens"].shape[1] // BLOCK)
        return lower(step, state, batch)

    monkeypatch.setattr(compiling._Step, "_compiled", noted)
    for steps in (10, 12):
        loop.train(
            make_run(
                model_dir=str(tmp_path), steps=steps, lengths={"targets": 6 * BLOCK}, compile_threads=1,
                curriculum=Curriculum((4, 6, 5), unlock=0.0),
            )
        )  # fmt: skip
    assert lengths == [4, 6, 5, 5, 4, 6]


@pytest.mark.slow
def test_on_a_cpu_programs_are_compiled_where_they_are_needed(tmp_path, monkeypatch):
    names = traced_by(monkeypatch)
    run = run_of(tmp_path, (), steps=3)
    loop.train(run)
    assert threads_of(run.ready()) == 0 and names == ["called"] * 3


@given(
    task=st.sampled_from([passkey(), RecallProbe(num_pairs=2, joined=True, block_size=BLOCK)]),
    blocks=st.lists(st.integers(8, 16), min_size=1, max_size=4, unique=True),
    batch_size=st.integers(1, 3),
    aged=st.booleans(),
    stage=st.integers(0, 3),
)
def test_examples_have_the_shapes_of_the_rows_that_come(task, blocks, batch_size, aged, stage):
    row = max(12, min(blocks)) if aged else max(blocks)
    curriculum = Curriculum(tuple(blocks), unlock=0.0)
    passing = named("aged") if aged else named("none")
    source = Source(task, batch_size, row * BLOCK, BLOCK, curriculum=curriculum)
    feed = passing.feed(source, make_model(), lambda x: x)
    feed.curriculum.stage = min(stage, len(blocks) - 1)
    shapes = lambda rows: tuple((name, x.shape, x.dtype) for name, x in sorted(rows.trained.items()))
    known = [shapes(rows) for rows in feed.examples()]
    assert len(known) == len(set(known)) == len({min(n, row) for n in blocks})
    for step in range(8):
        rows = feed.next(step)
        assert shapes(rows) in known
        feed.observe(rows.blocks, 1.0)


def test_lanes_know_no_shapes_before():
    source = Source(passkey(), 2, 4 * BLOCK, BLOCK)
    feed = Lanes(document_length=9 * BLOCK, num_documents=3).feed(source, make_model(), None)
    assert not list(feed.examples())


def test_an_error_of_the_compiler_ends_the_step_that_needs_the_program():
    def fail(*_):
        raise ValueError("no room")

    run = make_run(steps=1).ready()
    step = compiling._Step(type("Jitted", (), {"lower": fail})(), run)
    programs = Programs(1)
    state, batch = type("State", (), {"kept": {}})(), {"x": np.zeros(2)}
    step.compile_ahead(programs._pool, state, batch)
    with pytest.raises(ValueError, match="no room"):
        step(state, batch)
    programs.close()


def test_one_thread_compiles_for_an_accelerator(monkeypatch):
    devices = np.array([types.SimpleNamespace(platform="gpu")])
    run = types.SimpleNamespace(compile_threads=None, mesh=types.SimpleNamespace(devices=devices))
    assert threads_of(run) == 1
    monkeypatch.setattr(compiling.jax, "process_count", lambda: 2)
    assert threads_of(run) == 0


def test_processes_compile_in_one_order(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="compile_threads needs a run of one process"):
        loop.train(run_of(tmp_path, compile_threads=2))
