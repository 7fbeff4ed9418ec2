"""Everything of famx that gin files configure: classes and functions, by name."""

import contextlib
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import gin
from gin import config as gin_config

import famx.data.catalogue  # noqa: F401
import famx.inference  # noqa: F401
import famx.scale.compiling  # noqa: F401
from famx import memories
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.evaluation import bindable
from famx.modules import RopeScaling

FILES = sorted(
    path for path in (gin_utils.gin_root() / "gin_configs").rglob("*.gin") if "t5x" not in path.parts
)
# What a file that is only a part of a run does not set.
UNSET = (
    *("MODEL", "MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TRAIN_STEPS", "BATCH_SIZE", "TASK_FEATURE_LENGTHS"),
    *("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH", "EVALUATIONS", "INPUT_FILE", "OUTPUT_FILE"),
    *("TEXT_FILES", "DATA_DIR", "STUDY_DIR"),
)
_RUN = "gin_configs/runs/pretrain.gin"


def parse(path: pathlib.Path) -> None:
    """Parses a shipped gin file as a run does: after the run file, if it is a part of a run."""
    bindable.register()
    alone = path.parent.name in ("examples", "runs", "studies") and path.name != "paper.gin"
    gin_utils.parse_gin([str(path)] if alone else [_RUN, str(path)], unneeded=UNSET)


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """A context that begins and ends without a gin configuration."""
    gin.clear_config()
    try:
        yield
    finally:
        gin.clear_config()


@functools.cache
def configurables() -> dict[str, Callable[..., Any]]:
    """What is in gin's registry once every main and every gin file was read, and what makes tasks.

    The keys are selectors of gin.
    """
    for path in FILES:
        with clean():
            parse(path)
    makers = [getattr(maker, "func", maker) for maker in famx.data.catalogue.TASKS.values()]
    makers = [maker for maker in dict.fromkeys(makers) if hasattr(maker, "__name__")]
    ours = [getattr(memories, name) for name in memories.__all__]
    for target in (*makers, famx.data.tasks.TextTask, *ours, RopeScaling):
        try:
            gin.get_configurable(target)
        except ValueError:
            gin.external_configurable(target, module=target.__module__)
    found = {}
    for selector, configurable in gin_config._REGISTRY.items():
        target = inspect.unwrap(configurable.wrapped)
        if target.__module__.startswith("famx."):
            found[selector] = target
    return found


def refusal(*bindings: str) -> str | None:
    """The sentence that refuses the bindings of a configuration; None: they pass."""
    with clean():
        try:
            gin_utils.parse_gin([], bindings)
        except ConfigError as error:
            return str(error)
    return None
