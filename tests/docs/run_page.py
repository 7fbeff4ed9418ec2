"""Runs a page in the current directory: its files are written, its Python and bash blocks executed.

    python tests/docs/run_page.py docs/tutorials/new_task.md

Blocks run in order. Python shares one namespace, as in a notebook. What a block prints is printed.
"""

import os
import pathlib
import re
import subprocess
import sys

from markdown_pages import ROOT, blocks


def main(page: str) -> None:
    sys.path.insert(0, os.getcwd())
    pathlib.Path("tests").symlink_to(ROOT / "tests")
    names: dict = {"__name__": "__main__"}
    for block in blocks(ROOT / page):
        if block.marker.startswith("file: "):
            path = pathlib.Path(block.marker.removeprefix("file: "))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            text = block.text.replace("/tmp/famx/", f"{os.getcwd()}/")
            exec(compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"), names)
        elif block.language == "bash":
            text = block.text.replace("/tmp/famx/", f"{os.getcwd()}/")
            text = text.replace("python -m", f"{sys.executable} -m")
            text = re.sub(r"(?<![\w/.-])famx (?=[a-z])", f"{sys.executable} -m famx ", text)
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
        print(f"{block} ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
