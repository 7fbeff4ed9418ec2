"""Developer tooling: ruff and mypy pass, the Makefile matches the pages, the citation is complete."""

import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from markdown_pages import ROOT

import famx


def run(*command) -> str:
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_ruff_passes():
    pytest.importorskip("ruff", reason="pip install 'famx[test]'")
    run(sys.executable, "-m", "ruff", "check", ".")


@pytest.mark.slow
def test_types_of_the_surface_pass(tmp_path):
    pytest.importorskip("mypy", reason="pip install 'famx[dev]'")
    cache = pathlib.Path(tmp_path) / "mypy"
    assert "no issues found" in run(sys.executable, "-m", "mypy", f"--cache-dir={cache}")


def test_the_files_whose_types_are_checked_exist():
    settings = (ROOT / "pyproject.toml").read_text().split("[tool.mypy]")[1]
    files = re.findall(r'^    "(.+)",$', settings, re.MULTILINE)
    assert len(files) > 30 and all((ROOT / name).exists() for name in files)


def test_the_citation_names_the_paper_and_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"] == "famx"
    assert cited["authors"] == [{"name": "The famx authors"}]
    assert str(cited["version"]) == famx.__version__ and cited["license"] == "Apache-2.0"
    paper = cited["preferred-citation"]
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert "2404.09173" in paper["url"] and paper["year"] == 2024
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{', '.join(names[:-1])} and {names[-1]}, *{paper['title']}*" in readme
    bibtex = (ROOT / "docs" / "citing.md").read_text()
    assert all(author["family-names"] in bibtex for author in paper["authors"])


def test_the_makefile_and_the_page_name_the_same_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    assert targets == re.findall(r"^([\w-]+):$", makefile, re.MULTILINE)
    named = set(re.findall(r"`?make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named == set(targets)
    assert "ruff check ." in run("make", "--dry-run", "lint", "types", "test", "docs", "bench")


def test_hooks_run_what_the_makefile_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["id"]: hook["entry"].split() for hook in hooks}
    assert entries["ruff"][:2] == ["ruff", "check"] and entries["mypy"] == ["mypy"]
    assert all((ROOT / name).exists() for name in entries["pages"] if name.startswith("tests/"))
