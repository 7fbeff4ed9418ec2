"""As much text as fits into a number of tokens."""

from collections.abc import Callable

_GROWTH = 16  # how many times larger the next guess may be: the first guesses are short texts


def largest(
    size_of: Callable[[int], int], room: int, low: int = 0, high: int = 2**40
) -> int | None:
    """The largest number from `low` to `high` whose size is at most `room`; None if there is none.

    Sizes should grow with the number, about evenly: guesses are interpolated, because measuring a size
    means encoding a long text.

    Args:
      size_of: number of tokens of the text with that many parts.
      room: number of tokens that it may have.
    """
    start = size_of(low)
    if start > room:
        return None
    first, size, beyond, above, tries = low, start, high + 1, 0, 0
    while beyond - low > 1:
        tries += 1
        if above:  # the number `beyond` was measured and is too large
            share = (room - size) / (above - size) if tries % 3 else 0.5
            guess = low + int(share * (beyond - low))
        else:
            slope = (size - start) / max(low - first, 1)
            guess = low + int((room - size) / slope if slope else low)
            guess = min(guess, _GROWTH * max(low, 1))
        guess = min(max(guess, low + 1), beyond - 1)
        measured = size_of(guess)
        if measured <= room:
            low, size = guess, measured
        else:
            beyond, above = guess, measured
    return low
