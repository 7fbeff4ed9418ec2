"""The jitted steps of a run, which threads compile before the steps that need them.

A curriculum and stages have a program for each length of a row. Compiled where it is first needed, each
would stop the run; here later ones are compiled while earlier ones run. Several threads gain little: XLA
has threads of its own, and tries variants of a GPU's products one at a time. On an H200 with 16 cores
four threads took 90 seconds for the four programs of `benchmarks.remember`; no step began before.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax

from famx.base.errors import ConfigError
from famx.base.waiting import Announced
from famx.training.feeds import Feed
from famx.training.run import Run
from famx.training.stages import Stage
from famx.training.step import TrainState, make_initializer, make_train_step


def check_threads(run: Run) -> None:
    """Raises ConfigError if several processes would compile ahead, each in an order of its own."""
    if run.compile_threads and jax.process_count() > 1:
        raise ConfigError(
            "Run.compile_threads needs a run of one process, since all have to compile in the same order:"
            " set it to 0 or leave it out."
        )


def threads_of(run: Run) -> int:
    """The number of threads that compile programs of `run`, which is `ready`; 0: none."""
    if run.compile_threads is not None:
        return run.compile_threads
    if jax.process_count() > 1 or run.mesh.devices.flat[0].platform == "cpu":
        return 0  # the processors of a CPU are busy with the steps
    return 1


class Programs:
    """The jitted steps of the stages of a run; stages that differ in their data alone share one.

    Args:
      threads: number of threads that compile ahead; 0: every program is compiled where it is needed.
    """

    def __init__(self, threads: int = 0):
        self._made: list[tuple[Run, Any, Announced]] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "compile") if threads else None

    def of(self, run: Run, abstract: TrainState) -> Announced:
        """The jitted step of a stage.

        Args:
          run: the run of the stage.
          abstract: its state as ShapeDtypeStructs with shardings.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        traced = lambda run: (run.model, run.state_passing, run.microbatches)
        for other, known, step in self._made:
            if traced(other) == traced(run) and known == shardings:
                return step
        step = Announced(_Step(make_train_step(run, abstract), run), "the training step")
        self._made.append((run, shardings, step))
        return step

    def begin(self, stages: Sequence[Stage], feeds: Sequence[Feed], sharding: Any) -> None:
        """Begins to compile for all shapes that the feeds know, in the order in which they come.

        Args:
          stages: stages of the run.
          feeds: the feed of each.
          sharding: sharding of a batch.
        """
        if self._pool is None:
            return
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for stage, feed in zip(stages, feeds, strict=True):
            _, abstract = make_initializer(stage.run)
            step = self.of(stage.run, abstract)
            for rows in feed.examples():
                step.compile_ahead(self._pool, abstract, jax.tree.map(place, rows.trained))

    def close(self) -> None:
        """Begins no more compilations; one that runs cannot be stopped, and ends by itself."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Step:
    """A jitted step, with the programs that are compiled ahead for some shapes."""

    def __init__(self, jitted: Callable[..., Any], run: Run):
        self._jitted, self._run = jitted, run
        self._programs: dict[Any, concurrent.futures.Future] = {}

    def compile_ahead(self, pool: concurrent.futures.Executor, state: TrainState, batch: Any) -> None:
        """Begins to compile for ShapeDtypeStructs with shardings, if that has not begun before."""
        shapes = _shapes(state, batch)
        if shapes not in self._programs:
            self._programs[shapes] = pool.submit(self._compiled, state, batch)

    def _compiled(self, state: TrainState, batch: Any) -> Callable[..., Any]:
        with self._run.on_mesh():  # of this thread
            return self._jitted.lower(state, batch).compile()

    def __call__(self, state: TrainState, batch: Any) -> Any:
        program = self._programs.get(_shapes(state, batch))
        return self._jitted(state, batch) if program is None else program.result()(state, batch)


def _shapes(state: TrainState, batch: Any) -> Any:
    """Shapes and dtypes of what differs between calls of one step: the batch and the kept states."""
    leaves, structure = jax.tree.flatten((state.kept, batch))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
