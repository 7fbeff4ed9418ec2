"""`famx doctor`: what is installed, what is missing, and what to install."""

import pathlib
import re
from importlib import metadata

import pytest

from famx.base import installation

SETUP = (pathlib.Path(__file__).parents[2] / "setup.py").read_text()
REQUIREMENTS = {
    "famx": [
        "jax>=0.10,<0.12", "numpy>=2", 'jax[cuda13]>=0.10; extra == "cuda13"',
        'pyarrow>=21; extra == "parquet"', 'pytest; extra == "test"', 'colorama; sys_platform == "other"',
    ],
    "jax": ["numpy", 'cuda-plugin==0.10; extra == "cuda13"'],
}  # fmt: skip
ALL = {"jax": "0.11.0", "numpy": "2.1"}


class Installed:
    """In place of `importlib.metadata`: versions of distributions, and what they require."""

    PackageNotFoundError = metadata.PackageNotFoundError

    def __init__(self, versions):
        self.versions = versions

    def version(self, name):
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def requires(self, name):
        self.version(name)
        return REQUIREMENTS.get(name)

    def metadata(self, name):
        extras = lambda self, key: ["cuda13", "parquet", "test"]
        return type("Message", (), {"get_all": extras})()


def report(monkeypatch, versions, devices=None):
    monkeypatch.setattr(installation, "metadata", Installed({"famx": "1.0", **versions}))
    return installation.report("famx", devices or {"cpu": 1}, {})


def rows(text):
    return {line.split()[0]: line for line in text.splitlines() if line}


def test_all_is_there(monkeypatch):
    text, complete = report(monkeypatch, {**ALL, "cuda-plugin": "0.10", "pyarrow": "22.0"})
    assert complete and "MISSING" not in text and "Missing" not in text
    assert rows(text)["cuda13"].endswith("installed") and rows(text)["parquet"].endswith("installed")
    assert "colorama" not in text and "pytest" not in text
    assert "Devices: 1 cpu" in text and re.search(r"^/.*  \d+.* [MGT]B ", text, re.MULTILINE)


@pytest.mark.parametrize("versions, row, command", [
    ({"jax": "0.11.0"}, "numpy -          >=2           MISSING", 'pip install "numpy>=2"'),
    ({"jax": "0.12.0", "numpy": "2.1"}, "jax 0.12.0     <0.12,>=0.10  ANOTHER VERSION",
     'pip install "jax<0.12,>=0.10"'),
])  # fmt: skip
def test_what_is_always_needed(monkeypatch, versions, row, command):
    text, complete = report(monkeypatch, versions)
    assert not complete and row.split() in [line.split() for line in text.splitlines()]
    assert text.splitlines()[-1].endswith(command)


def test_an_extra_of_an_extra_is_looked_for(monkeypatch):
    text, complete = report(monkeypatch, ALL)
    assert complete
    assert rows(text)["cuda13"].endswith('missing cuda-plugin: pip install "famx[cuda13]"')
    assert rows(text)["parquet"].endswith('missing pyarrow: pip install "famx[parquet]"')


def test_a_gpu_that_jax_does_not_see(monkeypatch):
    monkeypatch.setattr(installation.glob, "glob", lambda pattern: [pattern] * ("nvidia" in pattern))
    hint = 'An NVIDIA GPU is here, and jax does not see it: pip install "famx[cuda13]"'
    assert hint in report(monkeypatch, ALL)[0]
    assert hint not in report(monkeypatch, ALL, {"NVIDIA H100": 2})[0]
    text, _ = report(monkeypatch, ALL, "the driver is too old")
    assert "Devices: none, since jax raised: the driver is too old" in text and hint in text


def test_not_installed(monkeypatch):
    monkeypatch.setattr(installation, "metadata", Installed({}))
    text, complete = installation.report("famx", {"cpu": 1}, {})
    assert text == "famx is not installed here: run pip install in its directory." and not complete


def test_every_extra_has_a_purpose():
    extras = re.findall(r'^        "([\w-]+)": [\[T]', SETUP, re.MULTILINE)
    assert len(extras) > 10
    assert set(extras) <= {*installation.PARTS, *installation.DEVELOPMENT}
