"""Honest evaluation: fresh examples, read from their start with a state of constant size.

Each evaluation is called as `evaluation(model, params, step) -> scalars`; its `check(model)` raises
ConfigError if it does not fit the model. An evaluation without a task of its own takes the task that a
run trains on: its `with_task(make_task)` returns the evaluation of that task, or itself if it has its
own; `make_task(**changes)` makes the run's task, with other options if need be.

With `health`, a model with memory also reports what its memory does, in scalars whose names begin with
`memory/`: the figures of `famx.analysis.MemoryHealth`, and the scores with the memory zeroed before every
block (`memory/zeroed/`).
"""

from famx.evaluation.passkey import PROBES, PasskeyEvaluation
from famx.evaluation.task import TaskEvaluation
from famx.evaluation.text import TextEvaluation
from famx.evaluation.text_task import TextTaskEvaluation

__all__ = ["PROBES", "PasskeyEvaluation", "TaskEvaluation", "TextEvaluation", "TextTaskEvaluation"]
