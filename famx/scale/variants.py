"""What a profile compares: model sizes; FAM, BSWA and full attention; passes over a text."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.gin_arguments import find_gin_file
from famx.mesh import make_mesh
from famx.modules import Decoder, DecoderConfig, Memory
from famx.scale import full_attention, programs
from famx.scale.compiling import run_from_gin, run_on
from famx.training.run import Run

VARIANTS = ("fam", "bswa", "full")
PASSES = ("training", "reading", "at_once")
_FILES = ("gin_configs/runs/pretrain.gin",)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the programs of a profile have in common.

    Attributes:
      rows: rows of each device.
      optimizer: "adamw", "adafactor" or "lion".
      param_dtype: dtype of the parameters; None: that of the model's file.
      remat: rematerialisation policy; None: that of the model's file.
    """

    rows: int = 1
    optimizer: str = "adamw"
    param_dtype: str | None = None
    remat: str | None = None


def gin_file_of(size: str) -> str:
    """The gin file of a model size: `tiny` and `8b` are names of famx's own files, else it is a path.

    Raises:
      ConfigError: there is no such file.
    """
    root = gin_utils.gin_root()
    for name in (f"fam_{size}", size):
        if (root / "gin_configs" / "models" / f"{name}.gin").is_file():
            return f"gin_configs/models/{name}.gin"
    with contextlib.suppress(ConfigError):
        found = find_gin_file(size, [str(root)])
        if pathlib.Path(found).is_file() or (root / found).is_file():
            return found
    raise ConfigError(
        f"--sizes names {size!r}: give tiny, 135m, 1b, 8b, 24b, or the path of a gin file of a model."
    )


def run_of(size: str, options: Options) -> Run:
    """A training run of a model size, whose length and batch size are yet to be set.

    Raises:
      ConfigError: the gin file is not that of a model.
    """
    settings: dict[str, Any] = dict(
        MODEL_DIR="not written", MIXTURE_OR_TASK_NAME="passkey_words", TRAIN_STEPS=1, BATCH_SIZE=1,
        TASK_FEATURE_LENGTHS={"targets": 1}, OPTIMIZER=f"@optimizers.{options.optimizer}()",
    )  # fmt: skip
    for name in ("param_dtype", "remat"):
        if (value := getattr(options, name)) is not None:
            settings[f"DecoderConfig.{name}"] = value
    return gin_utils.call_with(run_from_gin, [*_FILES, gin_file_of(size)], settings)


def config_of(config: DecoderConfig, variant: str, length: int) -> DecoderConfig:
    """The config of a variant: the file's memory, none, or the whole text as one block."""
    if variant == "fam":
        return config
    bare = dataclasses.replace(config, memory=Memory())
    if variant == "bswa":
        return bare
    return dataclasses.replace(bare, memory_segments=0, block_size=length, blocks_per_chunk=None)


def ready_run(
    run: Run, variant: str, length: int, options: Options, devices: Sequence[jax.Device]
) -> Run:
    """The run of a variant, for rows of `length` tokens on these devices, which need not exist.

    Weights are split over all devices, and so is the batch.
    """
    module = Decoder(config_of(run.model.config, variant, length))
    model = dataclasses.replace(run.model, module=module)
    batch = options.rows * len(devices)
    data = dataclasses.replace(run.data, lengths={"targets": length}, batch_size=batch)
    mesh = make_mesh(data=1, fsdp=-1, devices=devices)
    return run_on(dataclasses.replace(run, model=model, data=data, mesh=mesh), devices)


def lower(run: Run, variant: str, pass_: str) -> programs.Program:
    """The program of a pass of a run that is ready; of "reading", that of most of a long text.

    Full attention has no other way to read than the whole text at once.
    """
    rows, length = run.data.batch_size, run.data.length
    with attention_of(variant, run.mesh.devices.flat[0].platform):
        if pass_ == "training":
            return programs.train(run)
        if pass_ == "at_once" or variant == "full":
            return programs.read_at_once(run, rows, length)
        return programs.read_and_write(run, rows)[0]


@contextlib.contextmanager
def attention_of(variant: str, platform: str) -> Iterator[None]:
    """A context in which a variant is traced: on CPUs, full attention has its own implementation."""
    own = variant == "full" and platform == "cpu"
    with full_attention.replaced() if own else contextlib.nullcontext():
        yield
