"""Benchmark of one GPU or TPU at realistic sizes in a few minutes: `python -m benchmarks.device`.

Training, finetuning, reading and generation, FAM and BSWA in turns in one process, in order of worth
until the time is spent. See docs/gpu.md.
"""

from collections.abc import Iterator

from benchmarks import command
from benchmarks.budget import Budget, process_seconds
from benchmarks.device_sections import QUICK, SECTIONS, Sizes
from famx.base.tables import Table

_REPEATS = 5
_OPTIONS = {
    "budget_seconds": {
        "type": float,
        "default": Sizes.budget_seconds,
        "help": "seconds for the whole command, compilation included (default %(default)g)",
    },
    "backends": {
        "choices": ("auto", "all"),
        "default": Sizes.backends,
        "help": "attention backends of training: the one that auto picks, or all that can run",
    },
}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    spent = process_seconds() if argv is None else 0.0
    job = command.parse(
        "benchmarks.device", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, _REPEATS, argv,
        options=_OPTIONS, on_request={"peers": "device_peers"},
    )  # fmt: skip
    budget = Budget(job.sizes.budget_seconds, job.sizes.needs, spent)
    job.sections = {name: _within(budget, plan) for name, plan in job.sections.items()}
    with budget.enforced(job.cut_off):
        job.run()


def _within(budget: Budget, plan):
    """The section of a plan, which measures within the budget."""

    def section(sizes: Sizes, repeats: int) -> Iterator[Table]:
        return plan(sizes, repeats).tables(budget)

    return section


if __name__ == "__main__":
    main()
