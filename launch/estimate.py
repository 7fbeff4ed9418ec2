"""Estimate of memory, time and cost of a training run, shown before TPU slices are requested.

`famx.compile` compiles the training step on this machine for the requested number of chips (no TPU is
needed) and reports the memory it needs and a lower bound on its time. The price of a chip-hour is
supplied by the user and therefore confidential: the cost is printed only to a terminal, so that it
never ends up in files or logs.
"""

import importlib.util
import json
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from launch import accelerators
from launch.commands import Commands
from launch.job import Job

ESTIMATE = flags.DEFINE_enum(
    "estimate", "auto", ["auto", "yes", "no"],
    "Before creating slices, compile the training step for them (which may take minutes) and show"
    " whether it fits, how long it takes and what it costs. auto: if the TPU compiler is installed;"
    " yes: always, also in a dry run, and fail if there is no estimate; no: never.",
)  # fmt: skip
_BAD_INPUT = 2  # exit code of a famx main for a mistake of the user


def show(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Prints whether the training fits on the chips, and lower bounds of time, chip-hours and cost.

    Raises:
      ConfigError: the training does not fit, its settings are invalid, or there is no estimate
        although --estimate=yes.
    """
    if ESTIMATE.value == "no":
        return
    slice_ = accelerators.parse(config.accelerator)
    if not slice_.topology:
        report = f"famx.compile cannot compile for {slice_.family}."
    else:
        topology = (f"--topology={slice_.topology}", f"--num_slices={config.num_slices}")
        report = _compile(topology, job, commands)
    if report is None:
        return
    if isinstance(report, str):
        if ESTIMATE.value == "yes":
            raise ConfigError(f"No estimate is available: {report}")
        commands.say(f"Continuing without an estimate: {report}")
        return
    needed, available = (f"{report[name] / 2**30:.2f} GiB" for name in ("needed", "available"))
    if not report["fits"]:
        raise ConfigError(
            f"The training does not fit on {config.accelerator}: it needs {needed} of the {available} of"
            " each chip. The lines above say what to try; --estimate=no launches anyway."
        )
    commands.say(f"Estimate: fits on {config.accelerator}, {needed} of {available} on each chip.")
    _say_time_and_cost(config, job, commands, slice_.chips * config.num_slices, report["bound"])


def _compile(topology: tuple[str, ...], job: Job, commands: Commands) -> dict[str, Any] | str | None:
    """The report of famx.compile, or a sentence why there is none; None if a dry run skips it."""
    compiles = ESTIMATE.value == "yes" or not commands.dry_run
    if compiles and importlib.util.find_spec("libtpu") is None:
        return "the TPU compiler is missing (it needs no TPU): pip install libtpu."
    path = job.stage.with_name(f"estimate-{job.name}.json")
    if compiles:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    command = (sys.executable, "-m", "famx.compile", *job.gin_flags, *topology, f"--json={path}")
    code = commands.run(*command, harmless=compiles)
    if not compiles:
        return None
    try:
        return json.loads(path.read_text())[0]
    except (OSError, ValueError):
        if code == _BAD_INPUT:
            raise ConfigError(
                "famx.compile rejected the settings of this training: see the line above."
                " --estimate=no skips this check."
            ) from None
        return f"famx.compile exited with code {code}, see the lines above."
    finally:
        path.unlink(missing_ok=True)


def _say_time_and_cost(
    config: ConfigDict, job: Job, commands: Commands, chips: int, bound: dict[str, float] | None
) -> None:
    """Prints time and cost of the whole run; of one step if the number of steps is unknown."""
    if bound is None:
        return
    seconds = max(bound["roofline"], bound["scheduled"])
    if job.train_steps is None:
        commands.say(f"Estimate: at least {seconds:.3g} s a step on {chips:,} chips.")
        return
    hours = seconds * job.train_steps / 3600
    commands.say(
        f"Estimate: at least {seconds:.3g} s a step, {_amount(hours)} hours for {job.train_steps:,} steps"
        f" and {_amount(hours * chips)} chip-hours on {chips:,} chips, without evaluations and restarts."
    )
    if not config.price_per_chip_hour:
        commands.say("Set --config.price_per_chip_hour=PRICE to see the cost as well.")
    elif sys.stdout.isatty():
        cost = hours * chips * config.price_per_chip_hour
        print(f"Estimate: costs at least {cost:,.2f} at your price of a chip-hour.", flush=True)
    else:
        commands.say("The cost is printed only to a terminal, and standard output is not one.")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
