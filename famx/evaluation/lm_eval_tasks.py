"""Tasks of lm-evaluation-harness on checkpoints, and its command with the model `famx`."""

import contextlib
import dataclasses
import functools
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from famx.base.errors import ConfigError, causes
from famx.base.files import as_path
from famx.base.gin_checks import nearest
from famx.base.ranges import Name, NonNegative, Path, Positive, Rate
from famx.base.values import checked
from famx.evaluation.text_answers import predictions_file
from famx.model_dir.loading import TrainedModel
from famx.models import DecoderModel

# Libraries whose errors while a task is loaded mean that something could not be downloaded.
_NETWORK = {"aiohttp", "httpx", "huggingface_hub", "requests", "urllib", "urllib3"}
_SAMPLE = ("doc_id", "target", "arguments", "resps", "filtered_resps")  # of a sample, in the predictions


@checked
@dataclasses.dataclass
class LmEvaluation:
    """Tasks and groups of lm-evaluation-harness, with its own figures; needs the extra `[lm-eval]`.

    A figure is named `<task>/<metric>`, with the name of a filter in front of the metric if the task has
    several (`gsm8k/strict-match/exact_match`). Groups have theirs as `<group>/<metric>`.

    Attributes:
      tasks: names of tasks, groups and tags.
      include_path: directory with further tasks, such as tasks of local files.
      num_fewshot: number of examples in a prompt; None: as the task says.
      limit: maximum number of examples per task, or their share if below 1; None: all.
      batch_size: number of texts per batch; it does not change figures beyond rounding.
      apply_chat_template: whether prompts are messages in the chat template of the model.
      system_instruction: system message of every prompt.
      gen_kwargs: generation arguments that override those of the tasks, such as `{"max_gen_toks": 64}`.
      metadata: arguments of tasks that make their data, such as RULER's `{"max_seq_lengths": [4096],
        "tokenizer": "/models/smollm2"}`.
      model_args: further arguments of `famx.evaluation.lm_eval_model.FamxLM`, such as
        `{"add_bos_token": True}`.
      health: whether a model with memory also runs all tasks with its memory zeroed before every piece
        that is read: `memory/zeroed/<task>/<metric>`. It doubles the time.
    """

    tasks: Sequence[Name] = ()
    include_path: Path | None = None
    num_fewshot: NonNegative | None = None
    limit: Rate | None = None
    batch_size: Positive = 8
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[Name, Any] | None = None
    metadata: Mapping[Name, Any] | None = None
    model_args: Mapping[Name, Any] = dataclasses.field(default_factory=dict)
    health: bool = False

    writes_predictions: ClassVar[bool] = True  # see `__call__`

    def __call__(
        self, model: DecoderModel, params, step: int, folder: str | os.PathLike | None = None
    ) -> dict[str, float]:
        """Runs the tasks.

        Args:
          model: the model.
          params: its parameters.
          step: training step of the parameters, for the file name.
          folder: directory of `<step>.predictions.jsonl`, one line per example; None writes no file.

        Raises:
          ConfigError: see `check`; or an argument of the model is not known.
        """
        trained = TrainedModel(model, params, step, as_path(folder or "."))
        results = self._run(trained)
        with predictions_file(folder, step) as write:
            for task, samples in results["samples"].items():
                for sample in samples:
                    row = {name: sample[name] for name in (*_SAMPLE, *sample["metrics"])}
                    write({"task": task, **_as_json(row)})
        scores = figures(results)
        if self.health and model.config.memory.exists:
            zeroed = figures(self._run(trained, zero_memory=True))
            scores |= {f"memory/zeroed/{name}": value for name, value in zeroed.items()}
        return scores

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if lm-eval, a task, its data, or the model's vocabulary is missing."""
        if model.vocabulary is None:
            raise ConfigError(
                "LmEvaluation needs a vocabulary, and the model has none: copy the vocabulary.json of the"
                " training run next to model.json."
            )
        self._task_manager  # noqa: B018, loads the tasks

    @functools.cached_property
    def _task_manager(self):
        """lm-eval's index of tasks, with ours loaded once, though several checkpoints are evaluated."""
        require_lm_eval()
        from lm_eval.tasks import TaskManager

        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise ConfigError(f"LmEvaluation.include_path {self.include_path} is not a directory.")
        manager = TaskManager(include_path=self.include_path, metadata=dict(self.metadata or {}))
        names = [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)
        if not names:
            raise ConfigError("LmEvaluation.tasks is not set: name the tasks of lm-eval to run.")
        for name in names:
            if name not in manager.all_tasks:
                hint = nearest(str(name), manager.all_tasks) or " `lm_eval ls tasks` lists all."
                raise ConfigError(f"lm-eval has no task {name}.{hint}")
        with plain_errors():
            loaded = manager.load(names)
        manager.load = lambda tasks: loaded
        return manager

    def _run(self, trained: TrainedModel, **more: Any) -> dict[str, Any]:
        manager = self._task_manager
        from lm_eval import simple_evaluate

        from famx.evaluation.lm_eval_model import FamxLM

        lm = FamxLM(trained, **{"batch_size": self.batch_size, **self.model_args, **more})
        with plain_errors():
            return simple_evaluate(
                model=lm,
                tasks=[self.tasks] if isinstance(self.tasks, str) else list(self.tasks),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                system_instruction=self.system_instruction,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.apply_chat_template,
                gen_kwargs=None if self.gen_kwargs is None else dict(self.gen_kwargs),
                task_manager=manager,
                metadata=dict(self.metadata or {}),
            )


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in the results of lm-eval, by the names that `LmEvaluation` gives them."""
    found = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or "," not in key:
                continue
            metric, _, kind = key.partition(",")
            path = (name, metric) if kind == "none" else (name, kind, metric)
            found["/".join(path)] = float(value)
    return found


def run_command(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command, which knows the model `famx`.

    Args:
      arguments: those of `lm_eval`.

    Raises:
      ConfigError: lm-eval is missing, an argument is not valid, or a task needs a download.
      SystemExit: as lm-eval's parser of arguments.
    """
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    from famx.evaluation import lm_eval_model  # noqa: F401, registers the model

    sys.argv = ["lm_eval", *arguments]
    with plain_errors():
        cli_evaluate()


def require_lm_eval() -> None:
    """Raises ConfigError if lm-evaluation-harness is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({error}): run pip install 'famx[lm-eval]'."
        ) from error


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns errors of lm-eval that a user can mend into ConfigError; others pass."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        raise ConfigError(sentence) from error


def _sentence(error: Exception) -> str | None:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if any(map(_is_of_network, causes(error))):
        return (
            f"A task of lm-eval needs data that is not on this machine and cannot be downloaded: {text}."
            " Fetch it where there is a network, or give the task local files (docs/lm_eval.md)."
        )
    if isinstance(error, ImportError):
        return f"lm-eval needs a package that is not installed: {text}."
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if isinstance(error, ValueError) and frame.f_globals["__name__"].startswith("lm_eval.config"):
        return f"{text}."
    return None


def _is_of_network(error: BaseException) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | socket.gaierror) or library in _NETWORK


def _as_json(value: Any) -> Any:
    """JSON values in place of tuples, numpy's numbers and what else lm-eval puts into a sample."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") else str(value)
