"""Links resolve, the site builds with every page, and statements about the code are true."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from markdown_pages import PAGES, ROOT, anchors, blocks, links, prose

from famx.memories import Fam
from famx.modules import DecoderConfig

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_pages_of_the_site_link_within_it():
    for page in DOCS.rglob("*.md"):
        for link in links(page):
            assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS), (page, link)


def test_anchors_are_those_of_a_page():
    assert {"gin", "flags", "mistakes"} <= anchors(DOCS / "gin.md")
    assert "the-binding" not in anchors(DOCS / "gin.md")


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} == listed


def test_every_file_of_the_repository_that_a_page_names_exists():
    """Paths in backticks that start with a directory of the repository; wildcards match something."""
    ours = r"`((?:famx|gin_configs|tests|docs|benchmarks|launch)/[\w./*]+)`"
    for page in PAGES:
        for path in re.findall(ours, prose(page)):
            assert any(ROOT.glob(path)), (page.name, path)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="pip install 'famx[docs]'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install 'famx[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")  # the site is written beside
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "famx").symlink_to(ROOT / "famx")
    run = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    api = (tmp_path / "build" / "site" / "api" / "index.html").read_text()
    assert "A decoder-only Transformer that reads any number of tokens" in api


# ------ Paper to code


def rows(page: pathlib.Path, columns: int):
    """Cells of all table rows of a page with this number of columns, without separators."""
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == columns:
            yield cells


def defined(path: pathlib.Path) -> set[str]:
    """Names that a module defines, and those of its classes as `Class.name`, fields included."""

    def names(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.AnnAssign):
                yield node.target.id
            elif isinstance(node, ast.Assign):
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in names(node.body))

    return set(names(ast.parse(path.read_text()).body))


def test_the_paper_map_names_what_there_is():
    page, seen = DOCS / "paper_to_code.md", 0
    for _, file, names, held in rows(page, 4):
        if file == "file":
            continue
        known = defined(ROOT / file.strip("`"))
        for name in re.findall(r"`([^`]+)`", names):
            assert name in known, (file, name)
            seen += 1
        assert (ROOT / held.strip("`")).is_file(), held
    assert seen >= 40


def test_the_paper_map_covers_the_paper():
    text = (DOCS / "paper_to_code.md").read_text()
    main = ("2.1", "2.2", "3.1", "3.1.1", "3.2", "3.3")
    appendix = ("A.1", "A.2", "B.1", "B.2.1", "B.2.2", "B.2.3", "D.1", "D.2", "D.3", "D.4")
    variants = [f"B.4.{i}" for i in range(1, 9)] + [f"C.{i}" for i in range(2, 6)]
    for section in (*main, *appendix, *variants):
        assert re.search(rf"(?<![\d.]){re.escape(section)}(?![.\d])", text), section


def test_the_paper_map_names_fields_and_defaults_of_the_config():
    config = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2)
    assert (config.block_size, config.memory_segments, Fam().length) == (1024, 3, 64)
    cells = [cell for _, cell in rows(DOCS / "paper_to_code.md", 2) if cell.startswith("`")]
    assert len(cells) >= 8
    for cell in cells:
        for of_fam, name, value in re.findall(r"`(Fam\.)?(\w+)(?:=([^`]+))?`", cell):
            changes = {name: ast.literal_eval(value)} if value else {}
            made = Fam(**changes) if of_fam else DecoderConfig(8, 1, 8, 2, **changes)
            assert hasattr(made, name)
            if of_fam:
                assert DecoderConfig(8, 1, 8, 2, memory=made).memory == made


# ------ Gin


def test_the_tables_of_macros_are_those_of_the_files():
    text = (DOCS / "gin.md").read_text()
    first, second = text.split("\n`gin_configs/runs/finetune.gin` has these in addition")
    for part, name in ((first, "pretrain"), (second, "finetune")):
        source = (ROOT / "gin_configs" / "runs" / f"{name}.gin").read_text()
        in_file = dict(re.findall(r"^([A-Z_]+) = (.*?)(?:  #.*)?$", source, re.MULTILINE))
        table = part.split("## Macros")[-1]
        in_page = dict(re.findall(r"^\| `([A-Z_]+)` \|(.*?)\|", table, re.MULTILINE))
        assert in_file.keys() == in_page.keys()
        for macro, value in in_file.items():
            shown = in_page[macro].strip("` ")
            if value == "%gin.REQUIRED":
                assert not shown, macro
            elif value.startswith("@"):
                assert shown == value
            else:
                assert ast.literal_eval(shown) == ast.literal_eval(value), macro


@pytest.mark.parametrize("block", blocks(DOCS / "gin.md", "gin"), ids=str)
def test_the_example_of_a_file_parses(block, tmp_path):
    (tmp_path / "mine.gin").write_text(block.text)
    code = "import sys; from famx.base import gin_utils; gin_utils.parse_gin(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mine.gin")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
