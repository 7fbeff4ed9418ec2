"""famx installed: gin files found from a wheel and from an editable install; imports stay light."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import gin
import pytest

import famx

ROOT = pathlib.Path(famx.__file__).resolve().parent.parent
FOLDERS = ("famx", "gin_configs", "benchmarks", "docs", "launch", "notebooks", "tests")
# The files at the top that a source archive has beside those that setuptools writes.
SOURCES = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md",
    "CONTRIBUTING.md", "CITATION.cff", "Makefile", "mkdocs.yml",
)  # fmt: skip
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
LOOK = """
import sys, famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
import gin
@gin.configurable
def job(size): return size
gin_utils.parse_gin(["gin_configs/examples/probe.gin"])
assert job() == 5
print(famx.__file__, gin_utils.gin_root())
"""

VERSION = famx.__version__ + "+probe"

needs_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs a checkout of the repository, not a wheel"
)


def run(*command, cwd, **env):
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository, with one more gin file, so that builds leave no trace here."""
    copy = tmp_path_factory.mktemp("package") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    (copy / "gin_configs" / "examples" / "probe.gin").write_text(
        'include "gin_configs/probe_base.gin"\njob.size = %SIZE\n'
    )
    (copy / "gin_configs" / "probe_base.gin").write_text("SIZE = 5\n")
    # A version of its own keeps the copy apart from a famx that is installed where the tests run.
    init = copy / "famx" / "__init__.py"
    init.write_text(init.read_text().replace(famx.__version__, VERSION))
    return copy


@pytest.fixture(scope="module")
def archives(checkout):
    """The source archive of the copy, and the wheel that is built from that archive."""
    folder = checkout.parent / "archives"
    build = lambda what, cwd: run(sys.executable, "-c", BUILD, what, str(folder), cwd=cwd).split()[-1]
    source = folder / build("build_sdist", checkout)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    return unpacked, folder / build("build_wheel", unpacked)


def pip_install(*args, cwd):
    # --ignore-installed: never uninstall a famx of the environment that runs the tests.
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet")
    run(sys.executable, "-m", "pip", "install", *flags, *args, cwd=cwd)


@needs_checkout
@pytest.mark.slow
def test_source_archive_and_wheel_hold_every_file(checkout, archives):
    unpacked, wheel = archives
    below = lambda root, names: {
        str(path.relative_to(root))
        for name in names for path in (root / name).rglob("*") if path.is_file()
    }  # fmt: skip
    assert below(unpacked, FOLDERS) == below(checkout, FOLDERS)
    assert {path.name for path in unpacked.iterdir() if path.is_file()} >= set(SOURCES)
    moved = lambda name: name if name.startswith("famx/") else f"famx/{name}"
    expected = {moved(name) for name in below(checkout, ("famx", "gin_configs"))}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"famx/conversion/exported/modeling_famx.py", "famx/gin_configs/runs/pretrain.gin"} <= held


@needs_checkout
@pytest.mark.slow
def test_wheel_finds_its_gin_files_outside_the_repository(tmp_path, archives):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip_install(str(archives[1]), "--target", str(site), cwd=elsewhere)
    package, root = run(sys.executable, "-c", LOOK, cwd=elsewhere, PYTHONPATH=str(site)).split()
    assert pathlib.Path(package) == site / "famx" / "__init__.py"
    assert pathlib.Path(root) == site / "famx"
    (metadata,) = site.glob("famx-*.dist-info/METADATA")
    assert f"Version: {VERSION}\n" in metadata.read_text()
    (entry_points,) = site.glob("famx-*.dist-info/entry_points.txt")
    assert "[console_scripts]\nfamx = famx.__main__:main\n" in entry_points.read_text()
    listed = run(sys.executable, str(site / "bin" / "famx"), cwd=elsewhere, PYTHONPATH=str(site))
    assert listed.startswith("Usage: famx COMMAND") and "\n  train " in listed


@needs_checkout
@pytest.mark.slow
def test_editable_install_finds_the_gin_files_of_the_checkout(tmp_path, checkout):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip_install("--prefix", str(tmp_path / "env"), "--editable", str(checkout), cwd=elsewhere)
    (site,) = (tmp_path / "env").rglob("site-packages")
    assert not (site / "famx").exists()
    # -S and addsitedir: start as an interpreter whose only site directory is the new one.
    look = f"import site; site.addsitedir({str(site)!r})\n" + LOOK
    libraries = str(pathlib.Path(gin.__file__).parent.parent)
    out = run(sys.executable, "-S", "-c", look, cwd=elsewhere, PYTHONPATH=libraries)
    package, root = out.split()
    assert (pathlib.Path(package).parent.parent, pathlib.Path(root)) == (checkout, checkout)


def test_importing_famx_imports_nothing_heavy():
    code = "import sys, famx; print([m for m in ('jax', 'gin', 'numpy') if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]\n"


@needs_checkout
def test_readme_commands_are_marked_once_and_ci_runs_the_test_command():
    readme = (ROOT / "README.md").read_text()
    for marker in ("main-command", "test-command"):
        blocks = re.findall(rf"^<!-- {marker} -->\n```bash\n(.+?)\n```$", readme, re.M | re.S)
        assert len(blocks) == 1 and "python -m venv .venv" in blocks[0]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def run_ci(folder, readme, makefile="", **env):
    """Runs `.ci/run` in a new repository; the result and the folder in which it may leave nothing."""
    repo, scratch = folder / "repo", folder / "scratch"
    (repo / ".ci").mkdir(parents=True)
    scratch.mkdir()
    shutil.copy(ROOT / ".ci" / "run", repo / ".ci" / "run")
    (repo / "README.md").write_text(readme)
    (repo / "Makefile").write_text(makefile)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "x")):
        run(*git, *command, cwd=repo)
    env = {**os.environ, "TMPDIR": str(scratch), **env}
    done = subprocess.run([repo / ".ci" / "run"], cwd=folder, capture_output=True, text=True, env=env)
    return done, scratch


@needs_checkout
@pytest.mark.slow
def test_ci_runs_exactly_the_readme_block_in_a_clone_and_cleans_up(tmp_path):
    readme = (
        "```\nexit 9\n```\n<!-- test-command -->\n```bash\npwd\ncat README.md | wc -l\nfalse\n"
        "echo not reached\n```\n```\nexit 8\n```\n"
    )
    result, scratch = run_ci(tmp_path, readme)
    where, lines = result.stdout.split()
    assert result.returncode == 1 and int(lines) == 13
    assert pathlib.Path(where).is_relative_to(scratch) and list(scratch.iterdir()) == []


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("found", [True, False])
def test_ci_then_runs_the_newest_python_where_it_is_found(tmp_path, found):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3.13"
    python.write_text(f"#!/bin/sh\nexit {int(not found)}\n")
    python.chmod(0o755)
    result, scratch = run_ci(
        tmp_path, "<!-- test-command -->\n```bash\necho suite\n```\n",
        "test-python:\n\t@echo under $(PYTHON)\n\t@exit 3\n",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYENV_ROOT=str(tmp_path),
    )  # fmt: skip
    first, second = result.stdout.splitlines()[:2]
    assert first == "suite" and list(scratch.iterdir()) == []
    assert second.startswith("under python3.13" if found else "Skipped: the tests under Python 3.13")
    assert (result.returncode != 0) == found
