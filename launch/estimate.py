"""What a training takes on the slices that a config asks for, shown before they are asked for.

`famx.compile` compiles the training step on this machine for as many chips, without one, and tells the
memory that it needs and the time that it takes at least. The price of a chip-hour is the user's own
number; what it comes to is printed on a terminal alone, so that neither files nor logs hold it.
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
    "Before slices are created, compile the training step for them, which may take minutes, and show"
    " whether it fits, how long it takes and what that costs: where that is possible; without fail, and"
    " in a dry run too; or never.",
)  # fmt: skip
_REFUSED = 2  # exit code of a main that was given bad input


def show(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Shows whether the training fits into the chips, and its time, chip-hours and cost at least.

    Raises ConfigError if it does not fit, if the training's settings are refused, and with
    --estimate=yes if there is no estimate.
    """
    if ESTIMATE.value == "no":
        return
    slice_ = accelerators.parse(config.accelerator)
    if not slice_.topology:
        report = f"famx.compile does not compile for {slice_.family}."
    else:
        place = (f"--topology={slice_.topology}", f"--num_slices={config.num_slices}")
        report = _compile(place, job, commands)
    if report is None:
        return
    if isinstance(report, str):
        if ESTIMATE.value == "yes":
            raise ConfigError(f"There is no estimate: {report}")
        commands.say(f"Going on without an estimate: {report}")
        return
    need, have = (f"{report[name] / 2**30:.2f} GiB" for name in ("needed", "available"))
    if not report["fits"]:
        raise ConfigError(
            f"The training does not fit on {config.accelerator}: it needs {need} of the {have} of each"
            " chip. The lines above say what to try; --estimate=no goes on all the same."
        )
    commands.say(f"Estimate: fits on {config.accelerator}, {need} of {have} on each chip.")
    _tell_time(config, job, commands, slice_.chips * config.num_slices, report["bound"])


def _compile(place: tuple[str, ...], job: Job, commands: Commands) -> dict[str, Any] | str | None:
    """What famx.compile reports, or why it reports nothing; None in a dry run."""
    runs = ESTIMATE.value == "yes" or not commands.dry_run
    if runs and importlib.util.find_spec("libtpu") is None:
        return "it takes TPU's compiler, which needs no TPU: pip install libtpu."
    path = job.stage.with_name(f"estimate-{job.name}.json")
    if runs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    command = (sys.executable, "-m", "famx.compile", *job.gin_flags, *place, f"--json={path}")
    code = commands.run(*command, harmless=runs)
    if not runs:
        return None
    try:
        return json.loads(path.read_text())[0]
    except (OSError, ValueError):
        if code == _REFUSED:
            raise ConfigError(
                "famx.compile refuses this training, as the line above says; --estimate=no goes on"
                " without it."
            ) from None
        return f"famx.compile ended with code {code}, see the lines above."
    finally:
        path.unlink(missing_ok=True)


def _tell_time(
    config: ConfigDict, job: Job, commands: Commands, chips: int, bound: dict[str, float] | None
) -> None:
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
        commands.say("With --config.price_per_chip_hour=PRICE its cost is shown too.")
    elif sys.stdout.isatty():
        cost = hours * chips * config.price_per_chip_hour
        print(f"Estimate: costs at least {cost:,.2f} at your price of a chip-hour.", flush=True)
    else:
        commands.say("Its cost is shown on a terminal alone, and this is none.")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
