"""Isabelle: theories in the order of their imports, entries split by a hash."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats.isabelle import IsabelleRecords, _sessions, import_order, imports_of


def theory(name, *imports):
    lines = f"theory {name}\n  imports {' '.join(imports)}\n" if imports else f"theory {name}\n"
    return f"(* Title: {name} *)\n{lines}begin\nlemma {name}: True by simp\nend\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("theory A imports Main begin", ["Main"]),
        ("theory A\r\nimports Main B\r\n  C\r\nbegin", ["Main", "B", "C"]),
        ('theory "A-x" imports "HOL-Library.Multiset" "../Other/B" begin', ["HOL-Library.Multiset",
                                                                          "../Other/B"]),
        ("theory A imports Main keywords \"k\" :: thy_decl abbrevs \"x\" = \"y\" begin", ["Main"]),
        ("(* theory X imports Y begin (* nested *) *)\ntheory A imports (* old *) B begin", ["B"]),
        ("section ‹Of theory›\ntext ‹the theory begins›\ntheory A imports ‹C› begin", ["C"]),
        ("theory A begin imports B end", []),
        ("no header", []),
    ],
)  # fmt: skip
def test_imports_of_a_header(text, expected):
    assert imports_of(text) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_theory_stands_after_what_it_imports(data):
    count = data.draw(st.integers(1, 7))
    names = data.draw(st.permutations([f"T{i}" for i in range(count)]))
    imports = {
        name: data.draw(st.lists(st.sampled_from(names[:i]), unique=True) if i else st.just([]))
        for i, name in enumerate(names)
    }
    texts = {f"/e/{name}.thy": theory(name, "Main", *imports[name]) for name in names}
    order = import_order(texts)
    assert sorted(order) == sorted(texts)
    place = {path[3:-4]: i for i, path in enumerate(order)}
    for name in names:
        assert all(place[other] < place[name] for other in imports[name])
    assert import_order(dict(sorted(texts.items()))) == order


def test_imports_name_theories_by_path_and_by_session():
    texts = {
        "/e/A.thy": theory("A", '"sub/Z"', "E.B"), "/e/B.thy": theory("B", '"HOL-Library.A"'),
        "/e/sub/B.thy": theory("B"), "/e/sub/Z.thy": theory("Z", "B", '"../C"'), "/e/C.thy": theory("C"),
    }  # fmt: skip
    texts["/e/B.thy"] = theory("B")
    order = import_order(texts)
    place = order.index
    assert place("/e/sub/B.thy") < place("/e/sub/Z.thy") < place("/e/A.thy")
    assert place("/e/C.thy") < place("/e/sub/Z.thy") and place("/e/B.thy") < place("/e/A.thy")


def test_a_circle_gets_a_sentence():
    texts = {f"/e/{a}.thy": theory(a, b) for a, b in ("AB", "BC", "CB", "DA")}
    with pytest.raises(ValueError, match="in a circle: B.thy imports C.thy imports B.thy"):
        import_order(texts)
    assert import_order({"/e/A.thy": theory("A", "HOL.A")}) == ["/e/A.thy"]  # its namesake elsewhere


def test_a_namesake_of_another_session_is_another_theory():
    texts = {"/e/Tree.thy": theory("Tree", "Leaf"), "/e/Leaf.thy": theory("Leaf", '"HOL-Library.Tree"')}
    assert import_order(texts, {"E"}) == ["/e/Leaf.thy", "/e/Tree.thy"]
    texts["/e/Leaf.thy"] = theory("Leaf", "E.Tree")
    with pytest.raises(ValueError, match="in a circle"):
        import_order(texts, {"E"})


def test_the_sessions_of_an_entry_are_those_of_its_root(tmp_path):
    entry = tmp_path / "thys" / "Entry"
    entry.mkdir(parents=True)
    (entry / "Tree.thy").write_text(theory("Tree", "Leaf"))
    (entry / "Leaf.thy").write_text(theory("Leaf", '"HOL-Library.Tree"'))
    (entry / "ROOT").write_text("(* session X *)\nchapter AFP\n\nsession Entry = HOL +\n  theories Tree\n"
                                'session "More-E" (AFP) = Entry +\n')  # fmt: skip
    assert _sessions(str(entry)) == {"Entry", "More-E"}
    records = IsabelleRecords(str(tmp_path), "train")
    assert records[0]["text"].index("theory Leaf") < records[0]["text"].index("theory Tree")


@pytest.fixture
def tree(tmp_path):
    for i in range(60):
        folder = tmp_path / "afp" / "thys" / f"Entry{i}" / "sub"
        folder.mkdir(parents=True)
        (folder / "A.thy").write_text(theory("A", "Main"), encoding="utf-8")
        (folder.parent / "Z.thy").write_text(f"(* ∀ {i} *)\n{theory('Z')}", encoding="utf-8")
        (folder.parent / "B.thy").write_text(theory("B", '"sub/A"', "Z"), encoding="utf-8")
    (tmp_path / "afp" / "thys" / "ROOTS").write_text("Entry0\n")
    (tmp_path / "afp" / "metadata").mkdir()
    return tmp_path


def test_entries_are_documents_of_disjoint_splits(tree):
    task = famx.data.get("isabelle", data_dir=str(tree))
    ids = {split: [x["id"] for x in task.examples(split)] for split in task.splits}
    assert sorted(sum(ids.values(), [])) == sorted(f"Entry{i}" for i in range(60))
    assert len(ids["train"]) > 45 and ids["validation"] and ids["test"]
    example = task.examples("train")[0]
    number = example["id"].removeprefix("Entry")
    z = f"(* ∀ {number} *)\n{theory('Z')}"
    assert example["targets"] == "\n".join([theory("A", "Main"), z, theory("B", '"sub/A"', "Z")])
    assert task.evaluate("test", [(1, 2)] * len(ids["test"])) == {"next_token_accuracy": 50}


def test_a_new_entry_moves_no_other(tree):
    before = {split: IsabelleRecords(str(tree / "afp"), split).names for split in ("train", "test")}
    new = tree / "afp" / "thys" / "New"
    new.mkdir()
    (new / "N.thy").write_text(theory("N"))
    for split, names in before.items():
        after = IsabelleRecords(str(tree / "afp" / "thys"), split).names
        assert [name for name in after if name != "New"] == names


def test_a_missing_or_small_tree_gets_a_sentence(tmp_path):
    task = famx.data.get("isabelle", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs .*thys/ENTRY/\*.thy, which is not there"):
        task.examples("train")
    (tmp_path / "thys" / "One").mkdir(parents=True)
    (tmp_path / "thys" / "One" / "A.thy").write_text(theory("A"))
    with pytest.raises(ValueError, match="validation split of the 1 entries in .* has none"):
        task.examples("validation")
