"""The probes by name: `PROBES[name](**options)` makes one."""

import functools
from collections.abc import Callable
from typing import Any

from famx.data.probes.babi import BabiProbe
from famx.data.probes.counting import CodedWordsProbe, CommonWordsProbe
from famx.data.probes.needles import NeedleProbe
from famx.data.probes.passkey import PasskeyTask
from famx.data.probes.probe import Probe
from famx.data.probes.recall import CopyProbe, RecallProbe
from famx.data.probes.tracing import VariableProbe

_NEEDLES: dict[str, dict[str, Any]] = {
    "single_1": dict(haystack="noise"),
    "single_2": dict(haystack="python_docs"),
    "single_3": dict(haystack="python_docs", values="uuids"),
    "multikey_1": dict(haystack="python_docs", num_keys=4),
    "multikey_2": dict(haystack="needles"),
    "multikey_3": dict(haystack="needles", keys="uuids", values="uuids"),
    "multivalue": dict(haystack="python_docs", num_values=4),
    "multiquery": dict(haystack="python_docs", num_queries=4),
}
PROBES: dict[str, Callable[..., Probe]] = {
    "passkey": PasskeyTask,
    "passkey_words": functools.partial(PasskeyTask, vocabulary="words"),
    "passkey_bytes": functools.partial(PasskeyTask, vocabulary="bytes"),
    "passkey_python_docs": functools.partial(
        PasskeyTask, vocabulary="bytes", filler="python_stdlib", depth=None
    ),
    **{f"ruler_niah_{name}": functools.partial(NeedleProbe, **o) for name, o in _NEEDLES.items()},
    "ruler_vt": VariableProbe,
    "ruler_cwe": CommonWordsProbe,
    "ruler_fwe": CodedWordsProbe,
    "babilong_qa1": functools.partial(BabiProbe, task="qa1"),
    "babilong_qa2": functools.partial(BabiProbe, task="qa2"),
    "babilong_qa3": functools.partial(BabiProbe, task="qa3"),
    "copy_at_distance": CopyProbe,
    "associative_recall": RecallProbe,
}
