"""Notebooks agree with their sources, their outputs are current, and every cell runs."""

import base64
import getpass
import io
import pathlib
import re
import subprocess
import sys
import types

import pytest

from notebooks import execute

for package in execute.PACKAGES:
    pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[notebooks]'")

import nbformat  # noqa: E402

FIGURES = {  # minimum number of figures in each notebook
    "01_quickstart_passkey": 2,
    "02_attention_maps": 8,
    "03_finetune_with_lora": 2,
    "04_memory_file_read_a_book": 1,
    "05_compare_memories": 2,
}
every_notebook = pytest.mark.parametrize("name", FIGURES)


def committed(name):
    return nbformat.read(execute.FOLDER / f"{name}.ipynb", as_version=4)


def source(name):
    return execute.read_source(execute.FOLDER / f"{name}.py")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """The PNG files that the cells show."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(png) for png in data]


def texts(notebook):
    """What the cells print, and the text of values that are not pictures."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            yield output.get("text", "") + "".join(
                data[kind] for kind in data if kind.startswith("text/")
            )


def test_every_notebook_is_a_pair():
    assert [path.stem for path in execute.sources()] == list(FIGURES)
    assert [path.stem for path in sorted(execute.FOLDER.glob("*.ipynb"))] == list(FIGURES)


@every_notebook
def test_the_notebook_is_its_source(name):
    contents = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert contents(committed(name)) == contents(source(name))
    nbformat.validate(committed(name))


@every_notebook
def test_outputs_are_of_one_whole_run(name):
    notebook = committed(name)
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        number + 1 for number in range(len(code_cells(notebook)))
    ]
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"} and "error" not in kinds
    assert not any("Warning" in text or "Traceback" in text for text in texts(notebook))


@every_notebook
def test_figures_are_there_and_show_something(name):
    from matplotlib import image

    shown = pictures(committed(name))
    assert len(shown) >= FIGURES[name]
    for png in shown:
        assert image.imread(io.BytesIO(png)).std() > 0.01


@every_notebook
def test_nothing_of_the_machine_is_in_it(name):
    raw = (execute.FOLDER / f"{name}.ipynb").read_text()
    told = "\n".join(texts(committed(name)))
    assert not re.search(r"/(tmp|home|root|opt|usr|work|var|Users|mnt)/|[A-Z]:\\\\", raw)
    for word in (getpass.getuser(), str(pathlib.Path.home()), str(execute.FOLDER.parent)):
        assert not re.search(rf"\b{re.escape(word)}\b", told)


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in execute.FOLDER.glob("*.ipynb")) < 3_000_000


@every_notebook
def test_the_first_cell_installs_on_colab_alone(name, monkeypatch):
    first = source(name).cells[0]
    assert first.cell_type == "code" and first.source == source("01_quickstart_passkey").cells[0].source
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append((command, options)))
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    exec(first.source, {})
    assert calls == []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(first.source, {})
    ((command, options),) = calls
    assert command[1:4] == ["-m", "pip", "install"] and options["check"]
    assert command[-1] == "/content/famx[notebooks]"


@every_notebook
def test_the_switch_is_read_once(name):
    text = (execute.FOLDER / f"{name}.py").read_text()
    assert text.count(execute.FAST) == 1
    assert text.index(execute.FAST) < text.index("loop.train,")


@pytest.mark.slow
@every_notebook
def test_every_cell_runs(name, tmp_path):
    notebook = source(name)
    execute.execute(notebook, fast=True, folder=tmp_path)
    assert len(pictures(notebook)) == len(pictures(committed(name)))
    printed = lambda notebook: [bool(cell.outputs) for cell in code_cells(notebook)]
    assert printed(notebook) == printed(committed(name))


def test_an_unknown_notebook_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["execute", "06_missing"])
    with pytest.raises(SystemExit) as caught:
        execute.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "unknown notebook 06_missing; the notebooks are 01_quickstart_passkey" in error
