"""Damage for files that others write, and the check that reading one ends well or in one sentence.

`FAMX_FUZZ_EXAMPLES` is the number of damaged files of each kind; the default keeps a test at seconds.
A damage is a short list of edits, so that one that once got through can be kept in a test as it is.
"""

import copy
import json
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from famx.base.errors import ConfigError

EXAMPLES = int(os.environ.get("FAMX_FUZZ_EXAMPLES", 25))
MOST_SECONDS = 10.0  # of processor time for one file
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

# What a field may hold instead of its value; the last one removes it.
REMOVED = object()
ODD: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 7, 2**16, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**40), 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", "x", "7", "0", "\0", "\ud800", "{{", "../../x", "<|im_end|>",
    "x" * 5000,
    [], [1], [None], ["x"], [2**40], [[]], {}, {"x": 1}, {"": {}}, {"type": "x"}, {"content": "x"},
    [0] * 1000, ["x"] * 1000, {str(i): i for i in range(1000)}, [{"id": 2**40, "content": "x"}], REMOVED,
)  # fmt: skip
JSON_EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, len(ODD) - 1)), min_size=1, max_size=3
)
BYTE_EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "cut", "drop", "double", "size")),
        st.floats(0, 1, allow_nan=False),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)
_SIZES = (0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, 2**20)


def damaged_bytes(content: bytes, edits: Sequence[tuple[str, float, int]]) -> bytes:
    """The content after edits `(kind, place from 0 to 1, value)`."""
    out = bytearray(content)
    for kind, place, value in edits:
        at = min(int(place * len(out)), max(len(out) - 1, 0))
        if not out:
            break
        if kind == "flip":
            out[at] ^= 1 << value % 8
        elif kind == "set":
            out[at] = value
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + 1 + value % 32]
        elif kind == "double":
            out[at:at] = out[at : at + 1 + value]
        else:  # eight bytes that are a count somewhere
            out[at : at + 8] = struct.pack("<Q", _SIZES[value % len(_SIZES)])
    return bytes(out)


def damaged_json(value: Any, edits: Sequence[tuple[int, int]]) -> Any:
    """The value after edits `(which of its places, which of ODD)`."""
    value = copy.deepcopy(value)
    for which, odd in edits:
        places = list(_places(value))
        if not places:
            break
        holder, key = places[which % len(places)]
        if ODD[odd] is REMOVED:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(ODD[odd])
    return value


def _places(value: Any):
    """Every `(dict or list, key or index)` within a value; of a long one only the beginning."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value))[:64]
    for key, inner in inside:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def as_text(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def ends_well(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None if it raises a ConfigError of one printable line, in bounded time."""
    start = time.process_time()
    result = None
    try:
        result = read()
    except ConfigError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) < 5000, text[:3000]
    assert time.process_time() - start < MOST_SECONDS, "too slow"
    return result
