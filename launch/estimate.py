"""What a training takes on the slices that a config asks for, shown before they are asked for.

`famx.compile` compiles the training step on this machine for as many chips, without one, and tells the
memory that it needs and the time that it takes at least. The price of a chip-hour is the user's own
number. What it comes to is shown on a terminal alone: neither files nor logs hold it.
"""

import importlib.util
import json
import sys

from absl import flags
from ml_collections import ConfigDict

from famx.errors import ConfigError
from launch import accelerators
from launch.commands import Commands
from launch.job import Job

ESTIMATE = flags.DEFINE_enum(
    "estimate", "auto", ["auto", "yes", "no"],
    "Compile the training step for the slices before they are created, which may take minutes: if"
    " that is possible here, without fail and even in a dry run, or not at all.",
)  # fmt: skip


def show(config: ConfigDict, job: Job, commands: Commands) -> None:
    """Shows whether the training step fits into the chips, and time, chip-hours and cost at least.

    Raises ConfigError if it does not fit, or if the training is refused; where there is no estimate,
    with --estimate=yes alone.
    """
    if ESTIMATE.value == "no":
        return
    found = _compiled(config, job, commands)
    if isinstance(found, str):
        if ESTIMATE.value == "yes":
            raise ConfigError(found)
        commands.say(f"There is no estimate. {found}")
    elif found:
        _tell(config, job, commands, found)


def _compiled(config: ConfigDict, job: Job, commands: Commands) -> dict | str:
    """What famx.compile found, or why it found nothing; in a dry run {} unless --estimate=yes."""
    yes = ESTIMATE.value == "yes"
    if importlib.util.find_spec("libtpu") is None and (yes or not commands.dry_run):
        return "It needs TPU's compiler, which runs without a TPU: pip install libtpu."
    topology = accelerators.parse(config.accelerator).topology
    path = job.stage.with_name(f"estimate-{job.name}.json")
    place = (f"--topology={topology}", f"--num_slices={config.num_slices}", f"--json={path}")
    command = (sys.executable, "-m", "famx.compile", *job.gin_flags, *place)
    if yes or not commands.dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    code = commands.run(*command, harmless=yes)
    if commands.dry_run and not yes:
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    if code == 2:
        raise ConfigError("The training would end as its estimate did: see the line above.")
    return f"famx.compile ended with code {code}: see the lines above."
