"""Notebooks agree with their sources, their outputs are current, and every cell runs."""

import base64
import fnmatch
import getpass
import glob
import importlib.util
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
    "06_images": 6,
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
def test_it_opens_on_colab_and_its_first_code_installs_famx_there(name):
    badge, first, *_ = committed(name).cells
    address = "https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb"
    assert f"]({address.format(execute.REPOSITORY, name)})" in badge.source
    text = (execute.FOLDER / "first_cell.py").read_text().strip()
    text = text.replace("OWNER/famx", execute.REPOSITORY)
    assert first.cell_type == "code" and first.source == text and not first.outputs


@pytest.fixture
def colab(monkeypatch):
    """Runs the first cell on a stub of Colab; returns the pip commands and whether it restarted."""

    def run_cell(devices=(), driver="", folder=False, origin=None, on_colab=True):
        commands, restarts = [], []

        def run(command, **options):
            if command[0] == "nvidia-smi":
                return types.SimpleNamespace(stdout=driver)
            assert options["check"] and command[:3] == [sys.executable, "-m", "pip"]
            commands.append(command[3:])

        kernel = types.SimpleNamespace(do_shutdown=lambda restart: restarts.append(restart))
        spec = None if origin is None else types.SimpleNamespace(origin=origin or None)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=kernel))
        monkeypatch.setattr("os.path.isdir", lambda path: folder and path == "/content/famx")
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
        if on_colab:
            monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        exec((execute.FOLDER / "first_cell.py").read_text(), {})
        return commands, restarts

    return run_cell


@pytest.mark.parametrize(
    "devices, driver, extra, others",
    [
        ((), "", "", []),
        (("/dev/nvidia0", "/dev/nvidiactl"), "580.65.06\n", "[cuda13]", []),
        (("/dev/nvidia0",), "550.54.15\n550.54.15\n", "", ["jax[cuda12]"]),
        (("/dev/nvidiactl",), "", "", []),
        (("/dev/accel0",), "", "[tpu]", []),
        (("/dev/vfio/0",), "", "[tpu]", []),
    ],
)
def test_on_colab_famx_comes_with_jax_for_its_accelerator(colab, devices, driver, extra, others):
    for folder in (False, True):
        (uninstall, install), restarts = colab(devices, driver, folder)
        assert uninstall[0] == "uninstall" and "jax-cuda12-plugin" in uninstall  # of another version
        address = f"famx{extra} @ git+https://github.com/{execute.REPOSITORY}"
        assert install == ["install", "-q", f"/content/famx{extra}" if folder else address, *others]
        assert restarts == [True]


def test_a_folder_named_famx_is_not_an_installed_famx(colab):
    assert colab(origin="")[1] == [True]  # a namespace package has no origin


def test_elsewhere_and_where_famx_is_installed_nothing_happens(colab):
    assert colab(on_colab=False) == ([], [])
    assert colab(("/dev/nvidia0",), "580.1", origin="/site-packages/famx/__init__.py") == ([], [])


def test_the_extras_that_colab_installs_exist():
    setup = (execute.FOLDER.parent / "setup.py").read_text()
    for extra in ("cuda13", "tpu"):
        assert f'"{extra}": [f"jax[{extra}]{{JAX}}"]' in setup


def test_text_may_change_without_a_run_and_code_may_not():
    old, new = committed("01_quickstart_passkey"), source("01_quickstart_passkey")
    new.cells[1].source, new.cells[2].source = "other = 1", "other text"
    kept = execute.with_outputs_of(new, old)
    assert list(texts(kept)) == list(texts(old))
    new.cells[3].source += "\nother = 2"
    with pytest.raises(ValueError, match="its code has changed"):
        execute.with_outputs_of(new, old)


@every_notebook
def test_the_switch_is_read_once(name):
    text = (execute.FOLDER / f"{name}.py").read_text()
    assert text.count(execute.FAST) == 1
    assert text.index(execute.FAST) < text.index("loop.train,")


@pytest.mark.sampled(6)
@every_notebook
def test_every_cell_runs(name, tmp_path):
    if name == "06_images":
        pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install -e '.[digits]'")
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
