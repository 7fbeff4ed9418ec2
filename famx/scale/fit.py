"""Search for the largest batch size that fits, and advice for programs that do not fit."""

from collections.abc import Callable

from famx.base.errors import ConfigError
from famx.scale.report import Report

_LIMIT = 2**16  # upper end of the search, in multiples of `parts`
_INTERPOLATED = 8  # number of attempts before the search falls back to bisection


def largest_batch(
    attempt: Callable[[int], Report], start: int, parts: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Finds the largest batch size that fits.

    Memory grows almost linearly with the batch size, so the next size to try is interpolated from two
    reports; a program that does not fit also reports what it would need. The search ends when a size
    that fits and the next larger one that does not have both been compiled.

    Args:
      attempt: compiles for a batch size and returns the report.
      start: first batch size to try.
      parts: only multiples of this size are tried.
      say: receives a line of text after each attempt.

    Returns:
      The report of the largest batch size that fits.

    Raises:
      ConfigError: not even a batch of `parts` fits.
    """
    known: dict[int, Report] = {}

    def report(units: int) -> Report:
        if units not in known:
            known[units] = attempt(units * parts)
            say(known[units].line() + f" (batch {units * parts})")
        return known[units]

    low, high = 0, _LIMIT  # low fits (0 trivially), high does not
    units = max(start // parts, 1)
    while high - low > 1:
        if report(units).fits:
            low = units
        else:
            high = units
        if high == 1:
            raise ConfigError(
                f"Not even a batch of {parts} fits: {report(1).line()}. {advice(report(1))}"
            )
        units = _next(known, low, high)
    return known[low]


def _next(known: dict[int, Report], low: int, high: int) -> int:
    """The next size to try in (low, high): where memory is predicted to reach the available amount."""
    sizes = sorted(known)
    if len(sizes) > _INTERPOLATED:  # memory is not linear in the size here: bisect or double
        return (low + high) // 2 if high < _LIMIT else 2 * low
    if len(sizes) == 1:
        (size,) = sizes
        ratio = known[size].available / max(known[size].needed, 1)
        guess = int(size * ratio)
    else:
        # The line through the two reports nearest to the limit.
        nearest = sorted(sizes, key=lambda size: abs(known[size].needed - known[size].available))[:2]
        a, b = sorted(nearest)
        slope = (known[b].needed - known[a].needed) / (b - a)
        room = known[a].available - known[a].needed
        guess = int(a + room / slope) if slope > 0 else 2 * low
    if guess <= low:
        guess = low + 1  # predicted to be the limit already: verify that the next size does not fit
    if guess >= high:
        guess = high - 1
    return min(guess, 4 * low) if low and high == _LIMIT else guess


def advice(report: Report) -> str:
    """A sentence with what to try for a program that does not fit, the cheapest measure first."""
    weights = report.memory["parameters"] + report.memory.get("optimiser", 0)
    tries = []
    if weights > report.available / 2:
        tries.append("more devices along fsdp (make_mesh.fsdp), or TRAINABLE='lora' with FROZEN_DTYPE")
    if report.program.startswith("train"):
        tries += [
            "a smaller loss_chunk",
            "remat 'full'",
            "a smaller blocks_per_chunk",
            "Run.microbatches",
            "a smaller BATCH_SIZE (--find=batch_size)",
        ]
    else:
        tries.append("a smaller --inference_batch_size, or make_mesh.tensor")
    return "Try " + "; ".join(tries) + "."
