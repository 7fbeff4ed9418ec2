"""Laws of the source tree: imports go downwards, packages import only what they may, code stays small.

The files of famx/ are parsed, not imported. Imports within functions count like those at the top.
"""

import ast
import dataclasses
import fnmatch
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator

import pytest

import famx

ROOT = pathlib.Path(famx.__file__).parent
TESTS = pathlib.Path(__file__).parent

# From the bottom up. A package may import packages of lower floors only. The files at the top of famx/
# are the mains, except mesh.py.
MAINS = "mains"
FLOORS = (
    ("base",),
    ("modules",),
    ("memories",),
    ("lora", "decoding", "data"),
    ("models",),
    ("mesh",),
    ("model_dir",),
    ("training", "analysis", "conversion"),
    ("inference",),
    ("evaluation",),
    ("scale", "t5x", "study"),
    (MAINS,),
)
# (lower, upper) packages of one floor, where the upper one may import the lower.
WITHIN_A_FLOOR: tuple[tuple[str, str], ...] = ()
# Packages that import fewer packages than their floor would allow.
FEWER = {"memories": {"base", "modules"}, "mesh": {"base", "modules"}}

# Packages that define a model: they run wherever jax does.
MODEL_PACKAGES, MODEL_LIBRARIES = ("modules", "memories"), {"jax", "flax", "numpy"}
WITH_TOKAMAX = "modules.attention.tokamax"  # used only where that optional library is installed
# The files that may import a library which is slow to import or hard to install.
TENSORFLOW = ("t5x", "t5x.*", "data.seqio*")
PLACES = {
    "lm_eval": ("evaluation.lm_eval_model", "evaluation.lm_eval_tasks"),
    "t5x": ("t5x", "t5x.*"),
    "tensorflow": TENSORFLOW,
    "tensorflow_datasets": TENSORFLOW,
    "tensorflow_text": TENSORFLOW,
    "seqio": TENSORFLOW,
    "tokamax": (WITH_TOKAMAX,),
    "apache_beam": ("data.beam",),
}

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 500, 100, 10


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module; those of famx without `famx.` in front.

    Attributes:
      source: dotted name of the importing file, `""` for famx/__init__.py.
      target: dotted name of the imported module, or of the package if a name of its __init__ is meant.
      place: `file:line`.
      ours: whether the target is part of famx.
    """

    source: str
    target: str
    place: str
    ours: bool


@functools.cache
def files() -> dict[str, pathlib.Path]:
    """Paths of all files by dotted name, without `famx.` in front; a package's name is its __init__."""
    paths = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: pathlib.Path, line: int) -> str:
    return f"{path.relative_to(ROOT.parent)}:{line}"


def imported_names(node: ast.AST, path: pathlib.Path) -> Iterator[str]:
    """Dotted names that an import statement may mean, `famx.a.b.name` for `from famx.a.b import name`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # from . import x
            package = path.relative_to(ROOT.parent).parts[: -node.level]
            base = ".".join((*package, *filter(None, [base])))
        yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of every file."""
    result = []
    for source, path in files().items():
        for node in ast.walk(tree(path)):
            for name in imported_names(node, path):
                where = place(path, getattr(node, "lineno", 0))
                library, _, rest = name.partition(".")
                if library == "famx":
                    target = rest if rest in files() else rest.rpartition(".")[0]
                    result.append(Import(source, target, where, True))
                else:
                    result.append(Import(source, library, where, False))
    return tuple(result)


def package(name: str) -> str:
    """The package of a dotted name, as the table of floors has it."""
    first = name.partition(".")[0]
    if first in itertools.chain(*FLOORS) or (ROOT / first).is_dir():
        return first or "base"  # famx/__init__.py is below all
    return MAINS


def floor(package: str) -> int:
    return next(i for i, packages in enumerate(FLOORS) if package in packages)


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The sets of nodes that reach each other."""
    targets: dict[str, set[str]] = {}
    for a, b in edges:
        targets.setdefault(a, set()).add(b)

    def reached(node):
        seen, stack = set(), [node]
        while stack:
            for target in targets.get(stack.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen

    reach = {node: reached(node) for node in targets}
    loops = {
        tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in reach if a in reach[a]
    }
    return [list(loop) for loop in sorted(loops)]


# ---------------------------------------------------------------- imports


def test_every_package_has_a_floor():
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert packages | {"mesh", MAINS} == set(itertools.chain(*FLOORS))


def test_imports_run_downwards():
    wrong = []
    for x in imports():
        a, b = package(x.source), package(x.target)
        if x.ours and a != b and x.source:
            allowed = floor(b) < floor(a) or (b, a) in WITHIN_A_FLOOR
            if not allowed or b not in FEWER.get(a, {b}):
                wrong.append(f"{x.place}: {a} imports {b} ({x.target})")
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_the_packages_and_files_of_a_package():
    """For each package: no circle between its files, its __init__ and its subpackages."""
    edges: dict[str, set[tuple[str, str]]] = {}
    for x in imports():
        if not x.ours:
            continue
        a, b = (name.split(".") if name else [] for name in (x.source, x.target))
        shared = 0
        while shared < min(len(a), len(b)) and a[shared] == b[shared]:
            shared += 1
        inside = ".".join(["famx", *a[:shared]])
        node = lambda parts, shared=shared: parts[shared] if len(parts) > shared else "__init__"
        if (node(a), node(b)) != ("__init__", "__init__"):
            edges.setdefault(inside, set()).add((node(a), node(b)))
    wrong = [f"{inside}: {', '.join(loop)}" for inside in edges for loop in circles(edges[inside])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MODEL_PACKAGES)
def test_the_model_needs_jax_and_flax_alone(name):
    allowed = MODEL_LIBRARIES | set(sys.stdlib_module_names)
    sources = [x for x in imports() if package(x.source) == name and x.source != WITH_TOKAMAX]
    assert sources, f"famx/{name} has no import"
    wrong = [f"{x.place}: {x.target}" for x in sources if not x.ours and x.target not in allowed]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", PLACES)
def test_where_a_library_may_be_imported(library):
    within = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in PLACES[library])
    users = [x for x in imports() if not x.ours and x.target == library]
    wrong = [x.place for x in users if not within(x.source)]
    assert not wrong, f"{library} is imported in\n" + "\n".join(wrong)


# ---------------------------------------------------------------- sizes


def functions(path: pathlib.Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in files().values()}
    long = [place(path, n) for path, n in lengths.items() if n > MOST_LINES]
    assert not long, f"longer than {MOST_LINES} lines:\n" + "\n".join(long)


def test_no_two_test_files_share_a_name():
    """pytest imports each under its basename; two of one name run together only in some orders."""
    names = [path.name for path in TESTS.rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} == {"conftest.py"}


def test_no_function_is_long():
    long = []
    for path in files().values():
        for node in functions(path):
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                long.append(f"{place(path, node.lineno)}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_no_function_of_training_has_many_parameters():
    many = []
    for name, path in files().items():
        for node in functions(path) if package(name) == "training" else ():
            given = node.args
            names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [x.arg for x in (given.vararg, given.kwarg) if x]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MOST_PARAMETERS:
                many.append(f"{place(path, node.lineno)}: {node.name} has {count} parameters")
    assert not many, "\n".join(many)


# ---------------------------------------------------------------- names


def differ_by_one_letter(a: str, b: str) -> bool:
    """Whether one letter put in, left out or changed makes `a` into `b`."""
    a, b = sorted((a, b), key=len)
    if len(a) == len(b):
        return sum(x != y for x, y in zip(a, b)) == 1
    return len(b) == len(a) + 1 and any(b[:i] + b[i + 1 :] == a for i in range(len(b)))


def test_no_two_names_in_a_package_differ_by_one_letter():
    siblings: dict[str, list[str]] = {}
    for name in filter(None, files()):
        inside, _, last = name.rpartition(".")
        siblings.setdefault(inside, []).append(last)
    close = [
        f"famx.{inside}: {a}, {b}" for inside, names in siblings.items()
        for a, b in itertools.combinations(names, 2) if differ_by_one_letter(a, b)
    ]  # fmt: skip
    assert not close, "\n".join(close)


def test_only_fam_knows_the_length_of_its_memory():
    users = [
        place(path, number) for path in files().values() if path != ROOT / "memories" / "fam.py"
        for number, line in enumerate(path.read_text().splitlines(), 1) if "fam_length" in line
    ]  # fmt: skip
    assert not users, "fam_length is named in\n" + "\n".join(users)


# ---------------------------------------------------------------- the tools of these tests


def test_circles_are_seen():
    assert circles([("a", "b"), ("b", "c")]) == []
    assert circles([("a", "b"), ("b", "a"), ("b", "c"), ("d", "d")]) == [["a", "b"], ["d"]]
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("x", "a")]) == [["a", "b", "c"]]


def test_imports_are_seen():
    text = "import os.path\ndef f():\n from famx.base import errors\n from . import x\n from .y import z"
    path = ROOT / "data" / "rows" / "lanes.py"
    names = [name for node in ast.walk(ast.parse(text)) for name in imported_names(node, path)]
    assert names == ["os.path", "famx.base.errors", "famx.data.rows.x", "famx.data.rows.y.z"]
    assert any(x.source == "train" and x.target == "training.loop" for x in imports())


def test_names_that_differ_by_one_letter_are_seen():
    for a, b in (("layer", "layers"), ("fit", "fat"), ("rows", "row"), ("ab", "b")):
        assert differ_by_one_letter(a, b) and differ_by_one_letter(b, a)
    for a, b in (("layer", "layer"), ("state", "states_"), ("ab", "ba"), ("task", "text")):
        assert not differ_by_one_letter(a, b)
