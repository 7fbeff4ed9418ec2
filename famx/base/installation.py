"""What is installed here, and what is missing for what: versions, optional parts, devices, disks."""

import dataclasses
import glob
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement

from famx.base.files import nearest_existing
from famx.base.text import byte_size, columns

# What the extras of setup.py are for. Those for the development of famx itself are not shown.
PARTS = {
    "cuda13": "NVIDIA GPUs",
    "tpu": "Google TPUs",
    "tokenizers": "tokenizers of Hugging Face, SentencePiece and GGUF; chat templates",
    "convert": "import of pretrained models",
    "parquet": "Parquet and Arrow files, data sets of Hugging Face",
    "gcs": "texts and JSON lines in gs:// buckets",
    "seqio": "tasks of SeqIO and TensorFlow Datasets",
    "lm-eval": "tasks of lm-evaluation-harness",
    "texts": "the task kjv",
    "beam": "cache and prepare on the workers of Apache Beam",
    "notebooks": "the notebooks",
    "tokamax": 'attention_backend="tokamax"',
}
DEVELOPMENT = ("test", "parity", "docs", "dev", "peers", "cuda13-compiler")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that a distribution requires.

    Attributes:
      name: its name.
      needed: the versions that will do, such as ">=2.0"; "" for any.
      installed: its version; None: it is missing.
      fits: whether that version will do.
    """

    name: str
    needed: str
    installed: str | None
    fits: bool


def required(distribution: str, extra: str = "") -> Iterator[Package]:
    """What a distribution requires, or for an extra of it what that adds; extras of those included.

    Raises:
      importlib.metadata.PackageNotFoundError: it is not installed.
    """
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.marker is not None:
            holds = [requirement.marker.evaluate({"extra": name}) for name in ("", extra)]
            if holds[0] == bool(extra) or not holds[1]:
                continue
        elif extra:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        yield Package(requirement.name, str(requirement.specifier), version, fits)
        for inner in requirement.extras if version is not None else ():
            yield from required(requirement.name, inner)


def report(
    distribution: str, devices: Mapping[str, int] | str, caches: Mapping[str, str]
) -> tuple[str, bool]:
    """The whole report, and whether everything that famx always needs is there.

    Args:
      distribution: name of the distribution, "famx".
      devices: number of devices that jax sees by their kind, or why it sees none.
      caches: directories to look at, by what is in them.
    """
    try:
        packages = list(required(distribution))
        extras = metadata.metadata(distribution).get_all("Provides-Extra") or ()
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"{distribution} is not installed here: run pip install in its directory.", False
    bad = [package for package in packages if not package.fits]
    sections = [
        f"{distribution} {version}, Python {platform.python_version()} ({sys.executable})\n{_machine()}",
        "\n".join(_device_lines(devices)),
        columns(("PACKAGE", "INSTALLED", "NEEDED", ""), map(_row, packages)),
        columns(("PART", "FOR", "STATE"), [_part(distribution, x) for x in PARTS if x in extras]),
        columns(("DIRECTORY", "FREE", "FOR"), _disks(caches)),
    ]  # fmt: skip
    if bad:
        wanted = " ".join(f'"{package.name}{package.needed}"' for package in bad)
        sections.append(f"Missing, or of another version: run pip install {wanted}")
    return "\n\n".join(sections), not bad


def _row(package: Package) -> tuple[str, ...]:
    state = "" if package.fits else "MISSING" if package.installed is None else "ANOTHER VERSION"
    return package.name, package.installed or "-", package.needed or "any", state


def _part(distribution: str, extra: str) -> tuple[str, ...]:
    missing = [package.name for package in required(distribution, extra) if not package.fits]
    command = f'pip install "{distribution}[{extra}]"'
    return extra, PARTS[extra], f"missing {', '.join(missing)}: {command}" if missing else "installed"


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {byte_size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    return f"{platform.system()} {platform.machine()}, {cores} CPU cores{memory}"


def _device_lines(devices: Mapping[str, int] | str) -> Iterator[str]:
    """The devices, and what to install for those that are here and that jax does not see."""
    if isinstance(devices, str):
        yield f"Devices: none, since jax raised: {devices}"
        kinds = ""
    else:
        yield "Devices: " + ", ".join(f"{count} {kind}" for kind, count in devices.items())
        kinds = " ".join(devices).lower()
    if glob.glob("/dev/nvidia[0-9]*") and not any(word in kinds for word in ("nvidia", "gpu")):
        yield 'An NVIDIA GPU is here, and jax does not see it: pip install "famx[cuda13]"'
    if glob.glob("/dev/accel[0-9]*") and "tpu" not in kinds:
        yield 'A TPU is here, and jax does not see it: pip install "famx[tpu]"'


def _disks(caches: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    places = {"this directory": os.getcwd(), "temporary files": tempfile.gettempdir(), **caches}
    for what, place in places.items():
        yield place, byte_size(shutil.disk_usage(nearest_existing(place)).free), what
