"""The largest batch that fits, in few compilations; and what to try where nothing does."""

from collections.abc import Callable

from famx.base.errors import ConfigError
from famx.scale.report import Report

_LIMIT = 2**16  # batches of so many parts are not searched
_STRAIGHT = 8  # attempts that trust in a straight line


def largest_batch(
    attempt: Callable[[int], Report], start: int, parts: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """The report of the largest batch size that fits.

    What a batch needs grows with its size nearly in proportion: two reports, of batches that fit or of
    ones that do not and say what they would need, tell where to look. The result is compiled, and so is
    the next larger batch, which does not fit.

    Args:
      attempt: compiles for a batch size.
      start: the size to begin with.
      parts: sizes are multiples of it.
      say: is told of each attempt.

    Raises:
      ConfigError: not even the smallest batch fits.
    """
    known: dict[int, Report] = {}

    def report(units: int) -> Report:
        if units not in known:
            known[units] = attempt(units * parts)
            say(known[units].line() + f" (batch {units * parts})")
        return known[units]

    low, high = 0, _LIMIT  # fits; does not
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
    """Where the line through the two nearest reports meets what is available, within (low, high)."""
    sizes = sorted(known)
    if len(sizes) > _STRAIGHT:  # it is no line: halve, or double
        return (low + high) // 2 if high < _LIMIT else 2 * low
    if len(sizes) == 1:
        (size,) = sizes
        ratio = known[size].available / max(known[size].needed, 1)
        guess = int(size * ratio)
    else:
        near = sorted(sizes, key=lambda size: abs(known[size].needed - known[size].available))[:2]
        a, b = sorted(near)
        slope = (known[b].needed - known[a].needed) / (b - a)
        room = known[a].available - known[a].needed
        guess = int(a + room / slope) if slope > 0 else 2 * low
    if guess <= low:
        guess = low + 1  # the limit is thought to lie just here: look whether it does
    if guess >= high:
        guess = high - 1
    return min(guess, 4 * low) if low and high == _LIMIT else guess


def advice(report: Report) -> str:
    """What makes a program that does not fit smaller, the cheapest first."""
    weights = report.memory["parameters"] + report.memory.get("optimiser", 0)
    tries = []
    if weights > report.available / 2:
        tries.append("more devices along fsdp (make_mesh.fsdp), or TRAINABLE='lora' with FROZEN_DTYPE")
    if report.program == "train":
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
