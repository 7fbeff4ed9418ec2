"""Benchmark of training steps and forward passes: `python -m benchmarks.train_step`.

Functions are timed in turns in one process and compared by ratios within a round; tables show medians
with quartiles. See docs/benchmarks.md.
"""

from benchmarks import command
from benchmarks.sections import QUICK, SECTIONS, Sizes


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    command.run(
        "benchmarks.train_step", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, 15, argv
    )


if __name__ == "__main__":
    main()
