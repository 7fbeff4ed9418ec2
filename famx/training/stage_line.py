"""The type of a line of `Run.stages`; `famx.training.stages` says what its keys mean."""

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from annotated_types import Gt, Lt, MaxLen, MinLen

from famx.base.ranges import Expected, Name, NonNegative, OneOf, Positive
from famx.base.values import annotations
from famx.training.curriculum import RISING_METRICS, Curriculum
from famx.training.state_passing import BY_NAME, StatePassing

CurriculumFields = TypedDict("CurriculumFields", annotations(Curriculum), total=False)
_Below1 = Annotated[float, Gt(0), Lt(1)]
_Until = Annotated[
    Mapping[Annotated[str, OneOf(RISING_METRICS)], _Below1],
    MinLen(1),
    MaxLen(1),
    Expected(
        f"one metric of {', '.join(RISING_METRICS)} with a value between 0 and 1, such as"
        " {'exact_match': 0.95}"
    ),
]


class StageLine(TypedDict, total=False):
    """The settings that a stage changes."""

    steps: Positive | _Below1
    block_size: Positive
    memory_segments: NonNegative
    memory: Mapping[Name, Any]
    blocks: Positive
    batch_size: Positive | _Below1
    microbatches: Positive
    state_passing: Annotated[str, OneOf(tuple(BY_NAME))] | StatePassing
    options: Mapping[Name, Any]
    curriculum: CurriculumFields | Curriculum | None
    until: _Until | None
