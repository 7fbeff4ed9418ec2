"""The packages of famx.data import in one direction, without circles; only one needs SeqIO."""

import ast
import graphlib
import pathlib

import pytest

import famx.data

ROOT = pathlib.Path(famx.data.__file__).parent
ROOMS = (
    "vocabularies", "metrics", "storage", "rows", "tasks", "probes", "sequences", "formats", "catalogue",
    "beam", "tools", "seqio", "seqio_cache",
)  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT.parents[1]).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in [*(ROOT / room).glob("*.py"), *ROOT.glob(f"{room}.py")]
}


def imported(path):
    """Modules that a file imports, names of packages resolved to their modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


IMPORTS = {name: set(imported(path)) for name, path in FILES.items()}


def room_of(module):
    return ROOMS.index(module.split(".")[2])


@pytest.mark.parametrize("module", FILES)
def test_rooms_import_lower_rooms_only(module):
    for other in IMPORTS[module] & FILES.keys():
        assert room_of(other) <= room_of(module), other
        if room_of(other) == room_of(module):  # within a package, files import files
            assert not FILES[other].name == "__init__.py", other
    assert not {x for x in IMPORTS[module] if x.startswith("famx.data")} - FILES.keys()


def test_there_are_no_circles():
    graph = {name: [x for x in found if x in FILES] for name, found in IMPORTS.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("module", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_a_face_has_no_logic(module):
    tree = ast.parse(FILES[module].read_text())
    for node in tree.body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else None
        assert isinstance(node, ast.Expr | ast.ImportFrom) or name == "__all__", ast.unparse(node)
    names = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {name.removeprefix(f"{module}.") for name in FILES}, "a name and a file"


@pytest.mark.parametrize("module", FILES)
def test_only_one_room_needs_seqio(module):
    heavy = {x.split(".")[0] for x in IMPORTS[module]} & {"seqio", "tensorflow", "jax", "flax", "gin"}
    assert heavy <= ({"seqio", "tensorflow"} if ".seqio" in module else set())
