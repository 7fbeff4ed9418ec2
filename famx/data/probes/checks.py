"""Checks of the settings of probes; each raises ValueError with a sentence."""

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"A probe's {name} is '{value}'; choose one of {', '.join(choices)}.")


def check_counts(**counts: int) -> None:
    """Raise ValueError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"A probe's {name} must be at least 1, but it is {count}.")


def check_fraction(name: str, value: float | None, optional: bool = False) -> None:
    """Raise ValueError unless `value` is between 0 and 1, or None if `optional`."""
    if value is None and optional:
        return
    if value is None or not 0 <= value <= 1:
        end = " or be None" if optional else ""
        raise ValueError(f"A probe's {name} is {value}; it must be between 0 and 1{end}.")
