"""Memories on which every invariant test runs.

`python -m pytest tests --memory=module:Expression` adds a memory of another module, such as
`--memory="averages:Averages(length=3)"`; its tests are those whose name contains the module's.
"""

import importlib

from famx.memories import (
    AutoCompressor,
    BlockRecurrent,
    Fam,
    Feedback,
    Infini,
    KeyValueMeans,
    Landmark,
    Rmt,
)
from famx.modules import Memory

MEMORIES: dict[str, Memory] = {  # fmt: skip
    "no memory": Memory(),
    "fam": Fam(2),
    "fam with options": Fam(
        2, update_scale=0.5, normalize="measured", first_residual="ordinary",
        bias="minus_log_length", adapter_rank=3,
    ),
    "several fams": Fam(2, past=3, positions="float"),
    "fam that asks by learned queries": Fam(2, query="learned"),
    "feedback": Feedback(8),
    "infini": Infini(),
    "infini with the delta rule": Infini(delta=True, gate_init=1.0),
    "rmt": Rmt(2),
    "block recurrent": BlockRecurrent(3),
    "block recurrent, lstm": BlockRecurrent(2, layers=(1, 0), gate="lstm"),
    "means": KeyValueMeans(3),
    "growing means": KeyValueMeans(11, budget="root", scale=1.5),
    "landmark": Landmark(piece=2, pieces=3),
    "landmark, the best": Landmark(piece=4, pieces=3, top=1),
    "auto compressor": AutoCompressor(2, most=2, stop_after=0),
}
REMEMBERING = {name: memory for name, memory in MEMORIES.items() if memory.exists}
SIDE_BY_SIDE = {name: m for name, m in REMEMBERING.items() if not m.through_depth}


def add(description: str):
    """Adds the memory `module:Expression` to the tables."""
    module, _, expression = description.partition(":")
    memory = eval(expression, vars(importlib.import_module(module)))
    for table in (MEMORIES, REMEMBERING, *([] if memory.through_depth else [SIDE_BY_SIDE])):
        table[module] = memory


def oracle_of(memory: Memory):
    """The numpy oracle of a decoder with this memory, or None if there is none."""
    from modules.block_recurrent_oracle import BlockRecurrentOracle
    from modules.feedback_oracle import FeedbackOracle
    from modules.infini_oracle import InfiniOracle
    from modules.landmark_oracle import LandmarkOracle
    from modules.means_oracle import MeansOracle
    from modules.oracle import Oracle
    from modules.summaries_oracle import SummariesOracle

    return {
        "none": Oracle, "fam": Oracle, "infini": InfiniOracle, "rmt": SummariesOracle,
        "auto_compressor": SummariesOracle, "key_value_means": MeansOracle,
        "landmark": LandmarkOracle, "feedback": FeedbackOracle,
        "block_recurrent": BlockRecurrentOracle,
    }.get(memory.kind)  # fmt: skip
