"""Evaluations of a trained model on held-out examples.

Every example is streamed from its first token with a state of constant size, as in deployment; no
evaluation truncates its input to what fits into a window.

An evaluation is a callable `evaluation(model, params, step) -> {name: float}`. Its optional
`check(model)` raises ConfigError if the evaluation does not fit the model, before anything is compiled.
If the task of an evaluation is not set, it is the task that the run trains on: the run calls the
evaluation's `with_task(make_task)`, which returns a copy with the run's task, or the evaluation itself if
its task is set. `make_task(**changes)` returns the run's task, with changed options if given. Outside of
a run, an optional `of_run(settings, model)` returns a copy that fits the run of the checkpoint.

In a run of several processes all of them call it, and its optional `report(model, params, model_dir)`,
with parameters that their devices hold together. Results on devices come to the host by
`famx.base.distributed.on_host`, and files are written by process 0 alone.

With `health=True`, a model with memory also reports scalars named `memory/...`: the statistics of
`famx.analysis.MemoryHealth`, and the same scores with the memory set to zero before every block
(`memory/zeroed/...`). The difference between the two scores is what the memory contributes.
"""

from famx.evaluation.lm_eval_tasks import LmEvaluation
from famx.evaluation.passkey import PROBES, STANDARD_PROBES, PasskeyEvaluation
from famx.evaluation.probes import ProbeEvaluation
from famx.evaluation.task import TaskEvaluation
from famx.evaluation.text import TextEvaluation
from famx.evaluation.text_task import TextTaskEvaluation

__all__ = [
    "LmEvaluation",
    "PROBES",
    "STANDARD_PROBES",
    "PasskeyEvaluation",
    "ProbeEvaluation",
    "TaskEvaluation",
    "TextEvaluation",
    "TextTaskEvaluation",
]
