"""Generated probes of memory, by name: `PROBES[name](**options)` makes one.

A probe is a frozen dataclass with `vocab`, `min_length`, `example(index, length)` and
`batch(indices, length)`, like `PasskeyTask`. An example is made from `(seed, split, index, length)`
alone; nothing is stored. It also holds the prompt as text (`inputs`) and what a right answer names
(`references`); `text_form` gives these for PassKey too. Everything here needs only numpy.

| name | what is hidden | metric |
|---|---|---|
| `passkey`, `passkey_words`, `passkey_bytes`, `passkey_python_docs` | a key | exact match |
| `ruler_niah_*` | keys with values | all references contained |
| `ruler_vt` | chains of assignments | all references contained |
| `ruler_cwe`, `ruler_fwe` | the frequency of words | all references contained |
| `babilong_qa1` to `babilong_qa3` | facts of a story | the reference contained |
| `copy_at_distance`, `associative_recall` | letters, pairs | exact match |

The RULER probes follow the texts, counts and metric of RULER (arXiv 2404.06654), the BABILong ones the
layout of BABILong (arXiv 2406.10149). They are made anew here: their haystack of real text is Python's
documentation, keys and lists come from word lists of our own, and the stories from a simulator of our
own. So numbers measured on them are not those of the published sets.
"""

import functools
from collections.abc import Callable
from typing import Any

from famx.data.probes.babi import BabiProbe
from famx.data.probes.counting import CodedWordsProbe, CommonWordsProbe
from famx.data.probes.layout import Probe, text_form
from famx.data.probes.needles import NeedleProbe
from famx.data.probes.passkey import PasskeyTask
from famx.data.probes.recall import CopyProbe, RecallProbe
from famx.data.probes.tracing import VariableProbe

__all__ = [
    "PROBES",
    "BabiProbe",
    "CodedWordsProbe",
    "CommonWordsProbe",
    "CopyProbe",
    "NeedleProbe",
    "Probe",
    "RecallProbe",
    "VariableProbe",
    "text_form",
]

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
PROBES: dict[str, Callable[..., Any]] = {
    "passkey": PasskeyTask,  # the paper's, in a vocabulary that is asked for
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
