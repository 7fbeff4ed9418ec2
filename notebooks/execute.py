"""Executes the notebooks' sources and writes the notebooks with their outputs next to them.

    python -m notebooks.execute
    python -m notebooks.execute 02_attention_maps --fast
    python -m notebooks.execute --text

A notebook is a pair of files: NAME.py in jupytext's percent format is edited by hand, and NAME.ipynb is
generated from it by this program. Every notebook begins with a link that opens it on Google Colab, and
with the cell in first_cell.py, which installs famx there.
"""

import argparse
import importlib.util
import os
import pathlib
import time
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent
REPOSITORY = "OWNER/famx"  # on GitHub, where Colab opens the notebooks; set it where famx is published
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb)"
)
FAST = "FAMX_NOTEBOOK_FAST"  # environment variable; "1" runs a few steps, whose outputs are meaningless
PACKAGES = ("jupytext", "nbclient", "nbformat", "ipykernel")
_SECONDS = 3600  # time limit per cell


def sources() -> list[pathlib.Path]:
    """Paths of the notebooks' sources, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read_source(path: pathlib.Path) -> Any:
    """Reads a source as a notebook without outputs; equal sources give equal notebooks.

    The link to Colab and the first cell stand before the source's own cells.
    """
    import jupytext
    from nbformat.v4 import new_code_cell, new_markdown_cell

    notebook = jupytext.read(path)
    first_cell = (FOLDER / "first_cell.py").read_text().strip().replace("OWNER/famx", REPOSITORY)
    badge = BADGE.format(repository=REPOSITORY, name=path.stem)
    notebook.cells[:0] = [new_markdown_cell(badge), new_code_cell(first_cell)]
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def execute(notebook: Any, fast: bool, folder: pathlib.Path = FOLDER) -> None:
    """Runs all cells in a new kernel on the CPU and stores the outputs in the notebook.

    Args:
      notebook: a notebook from `read_source`; its cells are modified.
      fast: whether to set FAMX_NOTEBOOK_FAST to 1.
      folder: working directory of the kernel.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    from nbclient import NotebookClient

    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # otherwise XLA's warnings of slow compilation end up in outputs
        FAST: str(int(fast)),
    }
    client = NotebookClient(
        notebook, timeout=_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=environment)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this Python


def with_outputs_of(notebook: Any, old: Any) -> Any:
    """Copies the outputs of `old` to `notebook`.

    They may differ only in text cells and in the first code cell, which outside of Colab does nothing.

    Raises:
      ValueError: other code cells differ.
    """
    code_cells = lambda cells: [cell for cell in cells if cell.cell_type == "code"]
    new_cells, old_cells = code_cells(notebook.cells), code_cells(old.cells)
    if [cell.source for cell in new_cells[1:]] != [cell.source for cell in old_cells[1:]]:
        raise ValueError("its code has changed: run it without --text")
    for new_cell, old_cell in zip(new_cells, old_cells):
        new_cell.outputs, new_cell.execution_count = old_cell.outputs, old_cell.execution_count
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [path.stem for path in sources()]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything; writes nothing")
    parser.add_argument("--text", action="store_true", help="only text was changed: keep the outputs")
    args = parser.parse_args()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: run pip install -e '.[notebooks]'")
    import nbformat

    for name in args.names:
        if name not in names:
            parser.error(f"unknown notebook {name}; the notebooks are {', '.join(names)}")
    for path in sources():
        if args.names and path.stem not in args.names:
            continue
        began, notebook, target = time.monotonic(), read_source(path), path.with_suffix(".ipynb")
        if args.text:
            try:
                with_outputs_of(notebook, nbformat.read(target, as_version=4))
            except (OSError, ValueError) as error:
                parser.error(f"{path.stem}: {error}")
        else:
            execute(notebook, args.fast)
        if not args.fast:
            nbformat.write(notebook, target)
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
