"""Executes the notebooks' sources and writes the notebooks, outputs included, beside them.

    python -m notebooks.execute
    python -m notebooks.execute 02_attention_maps --fast
    python -m notebooks.execute --text

A notebook is a pair: NAME.py in the percent format is what people edit, NAME.ipynb is made of it here.
"""

import argparse
import importlib.util
import os
import pathlib
import time
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent
FAST = "FAMX_NOTEBOOK_FAST"  # "1": a few steps of everything, whose outputs mean nothing
PACKAGES = ("jupytext", "nbclient", "nbformat", "ipykernel")
_SECONDS = 3600  # that a cell may take


def sources() -> list[pathlib.Path]:
    """The notebooks' sources, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read_source(path: pathlib.Path) -> Any:
    """The notebook of a source, without outputs; the same for the same source."""
    import jupytext

    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def execute(notebook: Any, fast: bool, folder: pathlib.Path = FOLDER) -> None:
    """Runs all cells in a fresh kernel on the CPU; outputs are left in the notebook.

    Args:
      notebook: what `read_source` gave.
      fast: whether FAMX_NOTEBOOK_FAST is 1 for it.
      folder: where it runs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    from nbclient import NotebookClient

    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA writes to the notebook when it compiles for long
        FAST: str(int(fast)),
    }
    client = NotebookClient(
        notebook, timeout=_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=environment)
    notebook.metadata["language_info"] = {"name": "python"}  # not this Python's own version


def with_outputs_of(notebook: Any, old: Any) -> Any:
    """`notebook` with the outputs of `old`, whose prose alone differs.

    Raises:
      ValueError: their code differs.
    """
    of_code = lambda cells: [cell for cell in cells if cell.cell_type == "code"]
    pairs = of_code(notebook.cells), of_code(old.cells)
    if [cell.source for cell in pairs[0]] != [cell.source for cell in pairs[1]]:
        raise ValueError("its code was changed: execute it")
    for cell, done in zip(*pairs):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [path.stem for path in sources()]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything; writes nothing")
    parser.add_argument("--text", action="store_true", help="prose alone was changed: keep the outputs")
    given = parser.parse_args()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: run pip install -e '.[notebooks]'")
    import nbformat

    for name in given.names:
        if name not in names:
            parser.error(f"there is no notebook {name}; there are {', '.join(names)}")
    for path in sources():
        if given.names and path.stem not in given.names:
            continue
        began, notebook, target = time.monotonic(), read_source(path), path.with_suffix(".ipynb")
        if given.text:
            try:
                with_outputs_of(notebook, nbformat.read(target, as_version=4))
            except (OSError, ValueError) as error:
                parser.error(f"{path.stem}: {error}")
        else:
            execute(notebook, given.fast)
        if not given.fast:
            nbformat.write(notebook, target)
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
