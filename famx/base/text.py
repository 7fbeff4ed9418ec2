"""Numbers, lists of names and tables of texts, formatted for readers."""

import difflib
import re
from collections.abc import Iterable, Sequence


def byte_size(count: float, digits: int = 1) -> str:
    """'538.1 MB': bytes in the largest unit of 1000 that fits, with `digits` after the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{digits if unit != 'bytes' else 0}f} {unit}"
        count /= 1000
    return f"{count:.{digits + 1}f} TB"


def short_count(count: int) -> str:
    """A count for an axis; multiples of 1024 are rounded: '512', '1.5k', '131k', '1M'."""
    for size, unit in ((10**6, "M"), (1000, "k")):
        if count >= size:
            digits = 0 if count % 1024 == 0 else 1
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: '1:15', '2:03:04'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def some(names: Sequence[str], most: int = 6) -> str:
    """'a, b and 3 more': the first `most` names and the number of the others."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts for a terminal: a line of headings, then a line for each row."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded)


def first_command(text: str) -> str:
    """The first indented command of famx or Python in a text, in one line; "" if there is none."""
    found = re.search(r"^ +((?:famx|python) (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return re.sub(r"\s*\\\n\s*", " ", found[1]) if found else ""


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns ' Did you mean X?' for the known name nearest to `name`, or '' if none is near.

    Examples:
      >>> nearest("TRAIN_STEP", ["BATCH_SIZE", "TRAIN_STEPS"])
      ' Did you mean TRAIN_STEPS?'
    """
    return near(name, names, most=1)


def near(name: str, names: Sequence[str], most: int = 3) -> str:
    """Returns ' Did you mean X, Y or Z?' for up to `most` known names near to `name`, or ''."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), list(lower), n=most, cutoff=0.5)
    if not found:
        return ""
    *first, last = [lower[match] for match in found]
    return f" Did you mean {', '.join(first)}{' or ' * bool(first)}{last}?"
