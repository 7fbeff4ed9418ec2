"""Generated probes of memory.

A probe is a frozen dataclass, a `Probe`. An example is made from `(seed, split, index, length)` alone;
nothing is stored. It also has its prompt as text (`inputs`) and the strings that a right answer contains
(`references`). Everything here needs only numpy.

| name | what is hidden | metric |
|---|---|---|
| `passkey`, `passkey_words`, `passkey_bytes`, `passkey_python_docs` | a key | exact match |
| `ruler_niah_*` | keys with values | share of references contained |
| `ruler_vt` | chains of assignments | share of references contained |
| `ruler_cwe`, `ruler_fwe` | the frequency of words | share of references contained |
| `babilong_qa1` to `babilong_qa3` | facts of a story | the right place and no other |
| `copy_at_distance`, `associative_recall` | letters, pairs | exact match |

The RULER probes follow the texts, counts and metric of RULER (arXiv 2404.06654), the BABILong ones the
texts and metric of BABILong (arXiv 2406.10149), both published under the Apache License 2.0. What is free
in them is different material here: the haystack of real text is Python's documentation, keys and lists
come from the word lists of `famx.data.probes.words`, and the stories from the simulator of
`famx.data.probes.babi`. `ruler_niah_single_1` and `ruler_vt` differ in nothing but the names that are
drawn; scores on the others are near those on the published sets, not equal to them.
"""

from famx.data.probes.babi import BabiProbe
from famx.data.probes.catalogue import PROBES
from famx.data.probes.counting import CodedWordsProbe, CommonWordsProbe
from famx.data.probes.needles import NeedleProbe
from famx.data.probes.passkey import PasskeyTask
from famx.data.probes.probe import Probe
from famx.data.probes.recall import CopyProbe, RecallProbe
from famx.data.probes.tracing import VariableProbe

__all__ = [
    "BabiProbe",
    "CodedWordsProbe",
    "CommonWordsProbe",
    "CopyProbe",
    "NeedleProbe",
    "PROBES",
    "PasskeyTask",
    "Probe",
    "RecallProbe",
    "VariableProbe",
]
