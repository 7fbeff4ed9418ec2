"""Choices of options of XLA's compiler for the training step: the values of `XLA_OPTIONS`.

A choice is here because compiled steps show what it does; docs/gpu.md has the counts. Its options go to
the compiler with the program and not into an environment variable, which holds for all programs of a
process, so that `famx.compile` compiles with them what `famx.train` runs. XLA takes all of those below in
this way; a list must be whole, since the `+` with which `XLA_FLAGS` extends one is refused.
"""

import dataclasses
from collections.abc import Mapping

from famx.base.errors import ConfigError

Options = Mapping[str, bool | int | str]
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Compiler options under one name.

    Attributes:
      platform: platform that they are for, as JAX names it.
      options: `{name: value}`, as `jax.jit(compiler_options=...)` takes them.
      axis: mesh axis without which they change nothing, or None.
    """

    platform: str
    options: Options
    axis: str | None = None


CHOICES = {
    # Weights that FSDP splits are gathered an iteration of their loop ahead, beside the work of the last.
    "overlap": Choice("gpu", {"xla_gpu_enable_pipelined_all_gather": True}, axis="fsdp"),
    # Loops and collectives become parts of CUDA graphs; the list without these two is the default.
    # Scans slice their inputs, which a loop within a graph cannot do, so these loops are unrolled.
    "graphs": Choice("gpu", {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,COLLECTIVES"
        ),
        "xla_gpu_command_buffer_unroll_loops": True,
    }),
}  # fmt: skip


def compiler_options(name: str, platform: str, mesh: Mapping[str, int]) -> Options:
    """The options of a choice, `{}` for "default".

    Args:
      name: "default" or one of `CHOICES`.
      platform: what the program is compiled for, as JAX names it.
      mesh: sizes of the mesh's axes.

    Raises:
      ConfigError: there is no such choice, or it has no meaning there.
    """
    if name == DEFAULT:
        return {}
    if name not in CHOICES:
        raise ConfigError(f"XLA_OPTIONS must be one of {', '.join((DEFAULT, *CHOICES))}; got {name!r}.")
    choice = CHOICES[name]
    if platform != choice.platform:
        raise ConfigError(
            f"XLA_OPTIONS {name!r} is for {choice.platform.upper()}s, and this run is on"
            f" {platform.upper()}s: choose {DEFAULT!r}."
        )
    if choice.axis is not None and mesh[choice.axis] == 1:
        raise ConfigError(
            f"XLA_OPTIONS {name!r} changes nothing on a mesh with {choice.axis} 1: choose {DEFAULT!r}, or"
            f" set make_mesh.{choice.axis}."
        )
    return choice.options
