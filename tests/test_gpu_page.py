"""Flags and gin names in docs/gpu.md exist. Their effect on a GPU is not tested here."""

import os
import pathlib
import re
import subprocess
import sys

from famx.base.xla_options import CHOICES
from famx.modules.config import ATTENTION_BACKENDS, REMAT_POLICIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text()


def test_the_flags_are_known_to_the_version_that_is_tested():
    """XLA ends the process at an unknown flag; every build of XLA knows the GPU flags."""
    flags = re.findall(r"`XLA_FLAGS=(--xla_\S+?)`", PAGE)
    assert flags

    def starts(*flags):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    found = starts(*flags)
    assert found.returncode == 0, found.stderr
    assert "Unknown flag" in starts(*flags, "--xla_gpu_no_such_flag=1").stderr


def test_the_table_of_compiler_options_has_every_choice():
    rows = re.findall(r'^ *\| `"(\w+)"` \|.*\|(.*)\|$', PAGE, re.MULTILINE)
    named = {name: set(re.findall(r"`(xla_\w+)`", options)) for name, options in rows}
    assert named == {name: set(choice.options) for name, choice in CHOICES.items()}


def test_the_choices_are_all_there_are():
    remat = PAGE.split("`DecoderConfig.remat`")[1].split("(")[0]
    assert set(re.findall(r'`"(\w+)"`', remat)) == set(REMAT_POLICIES)
    assert {"cudnn", "xla", "auto"} <= set(ATTENTION_BACKENDS)
    for path in re.findall(r"gin_configs/meshes/\{([\w,]+)\}", PAGE)[0].split(","):
        assert (ROOT / "gin_configs" / "meshes" / f"{path}.gin").is_file()
