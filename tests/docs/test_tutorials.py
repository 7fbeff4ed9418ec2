"""The tutorials run, block by block, in an empty directory."""

import os
import subprocess
import sys

import pytest
from markdown_pages import ROOT, blocks

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(page, tmp_path):
    name = page.relative_to(ROOT).as_posix()
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "run_page.py"), name],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ran\n") == len(blocks(page))
