"""Every public name of famx has a docstring, and the examples in docstrings are true."""

import ast
import doctest
import importlib
import re

import pytest
from markdown_pages import ROOT

MODULES = sorted((ROOT / "famx").rglob("*.py"))
# What another contract names: flax calls setup, and a main's module says what its main and flags do.
WITHOUT = {"setup", "main", "define_flags"}


def classes() -> dict[str, ast.ClassDef]:
    """All classes of famx by name."""
    trees = (ast.walk(ast.parse(path.read_text())) for path in MODULES)
    return {node.name: node for tree in trees for node in tree if isinstance(node, ast.ClassDef)}


CLASSES = classes()


def inherited(cls: ast.ClassDef, method: str) -> bool:
    """Whether a base class in famx documents the method."""
    for base in cls.bases:
        above = CLASSES.get(ast.unparse(base).split("[")[0].split(".")[-1])
        if above is not None and (method in documented(above) or inherited(above, method)):
            return True
    return False


def documented(cls: ast.ClassDef) -> set[str]:
    return {n.name for n in cls.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)}


def missing(path) -> list[str]:
    tree = ast.parse(path.read_text())
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and node.name not in WITHOUT:
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            found += [
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
                and not method.name.startswith("_")
                and method.name not in WITHOUT
                and not ast.get_docstring(method)
                and not inherited(node, method.name)
            ]
    return found


def test_every_public_name_has_a_docstring():
    found = {path.relative_to(ROOT).as_posix(): missing(path) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_missing_docstring_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""A."""\nclass B:\n    """B."""\n    def c(self):\n        pass\ndef d(): pass\n')
    assert missing(path) == ["B.c", "d"]


WITH_EXAMPLES = [path for path in MODULES if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_in_docstrings_are_true(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_there_are_examples():
    assert len(WITH_EXAMPLES) >= 5
