"""NarrativeQA: the official CSV files and stories."""

import csv

import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats.narrative_qa import NarrativeQaRecords

DOCUMENTS = ("document_id,set,kind,story_url,story_file_size,wiki_url,wiki_title,story_word_count,"
             "story_start,story_end").split(",")  # fmt: skip
QAPS = ("document_id,set,question,answer1,answer2,question_tokenized,answer1_tokenized,"
        "answer2_tokenized").split(",")  # fmt: skip
BOOK = "\ufeffLicense\r\nProduced  by\r\nNick\r\nA tale — 🙂.\r\nThe end.\r\nmore The end .\r\nLicense"
SCRIPT = (
    b"<html><head><script>if ( window != top ) top = 1;</script></head><body><pre><b>THE FILM</b>\n"
    b"He said &quot;no&quot; &amp; left.<br>FADE OUT.</pre><p>menu</p></body></html>"
)


def write(folder, documents, questions, newline="\r\n"):
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (("documents.csv", DOCUMENTS, documents), ("qaps.csv", QAPS, questions)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="x", lineterminator=newline)
            writer.writeheader()
            writer.writerows(rows)


def document(id, part, start="Produced by Nick", end="The end ."):
    return {"document_id": id, "set": part, "story_start": start, "story_end": end}


def question(id, part, text="Who?", answers=("One", "Two")):
    row = {"document_id": id, "set": part, "question": text}
    return row | {"answer1": answers[0], "answer2": answers[1]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "narrativeqa"
    documents = [
        document("a", "train"), document("b", "valid", "THE FILM", "FADE OUT ."),
        document("c", "test", "Not there", "nor there"),
    ]  # fmt: skip
    questions = [
        question("a", "train", 'Who said "no,\nnever"?', ("Nick, the cat", "")),
        question("b", "valid"), question("a", "train", "Wer?", ("Same", "Same")), question("c", "test"),
    ]  # fmt: skip
    write(folder, documents, questions)
    (folder / "tmp" / "a.content").write_bytes(BOOK.encode())
    (folder / "tmp" / "b.content").write_bytes(SCRIPT)
    (folder / "tmp" / "c.content").write_bytes("Café “x”".encode("cp1252"))
    return folder


def test_questions_answers_and_full_stories(folder):
    task = famx.data.get("narrative_qa", data_dir=str(folder.parent))
    train = task.examples("train")
    story = "Produced  by\nNick\nA tale — 🙂.\nThe end.\nmore The end ."
    assert [x["inputs"] for x in train] == [
        f'Who said "no,\nnever"?\n\n{story}\n\n', f"Wer?\n\n{story}\n\n"]
    assert [x["references"] for x in train] == [["Nick, the cat"], ["Same"]]
    (film,) = task.examples("validation")
    assert film["inputs"] == 'Who?\n\nTHE FILM\nHe said "no" & left.\nFADE OUT.\n\n'
    (old,) = task.examples("test")
    assert old["inputs"] == "Who?\n\nCafé “x”\n\n" and old["references"] == ["One", "Two"]
    assert set(task.evaluate("train", ["Nick", "same"])) >= {"rougeL", "f1"}


def test_max_tokens_keeps_the_question_and_the_answer(folder):
    task = famx.data.get("narrative_qa", data_dir=str(folder.parent), max_tokens=30)
    tokens, weights = task[1]
    text = task.vocab.decode(tokens)
    assert len(tokens) == 30 and text.startswith("Wer?\n\nProd") and text.endswith("\n\nSame")
    assert weights.sum() == len("Same") + 1


def test_missing_stories_end_it_unless_asked_for(folder):
    (folder / "tmp" / "a.content").unlink()
    (folder / "tmp" / "b.content").unlink()
    task = famx.data.get("narrative_qa", data_dir=str(folder.parent))
    with pytest.raises(ValueError, match="no question of the train split with a story"):
        task.examples("train")
    documents = [document("a", "train"), document("c", "train")]
    write(folder, documents, [question("a", "train"), question("c", "train")])
    with pytest.raises(ConfigError, match=r"lacks 1 of its files, the first is .*a.content; add them"):
        task.examples("train")
    partial = famx.data.get("narrative_qa", data_dir=str(folder.parent), allow_partial=True)
    assert [x["id"] for x in partial.examples("train")] == ["c"]


def test_bad_tables_get_a_sentence(folder):
    with pytest.raises(FileNotFoundError) as missing:
        NarrativeQaRecords(str(folder / "none"), "train")
    assert missing.value.filename.endswith("none/documents.csv")
    text = (folder / "qaps.csv").read_text()
    (folder / "qaps.csv").write_text(text.replace("answer2", "reply2"))
    with pytest.raises(ValueError, match="qaps.csv has no column 'answer2'; its columns are document_id"):
        NarrativeQaRecords(str(folder), "train")
    (folder / "qaps.csv").write_text(text.splitlines()[0] + "\na,train,cut off\n")
    with pytest.raises(ValueError, match="Line 2 of .*qaps.csv is cut off"):
        NarrativeQaRecords(str(folder), "train")
    write(folder, [document("a", "train")], [question("a", "train"), question("z", "train")])
    with pytest.raises(ValueError, match="has no document z of qaps.csv"):
        NarrativeQaRecords(str(folder), "train")
