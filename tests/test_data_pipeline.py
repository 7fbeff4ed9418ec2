"""The benchmark of the data pipeline at tiny sizes."""

import json
import math
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import data_pipeline  # noqa: E402

NUMPY = [name for name in data_pipeline.PIPELINES if name.startswith("PackedRows")]


@pytest.mark.parametrize("name", NUMPY)
def test_pipelines_of_numpy_give_figures(name):
    found = data_pipeline.measure(name, data_pipeline.QUICK)
    assert found["tokens/s"] > 0 and found["first s"] > 0 and math.isfinite(found["first MiB"])


@pytest.mark.slow
def test_pipelines_of_tensorflow_give_figures():
    pytest.importorskip("seqio")
    for name in data_pipeline.PIPELINES:
        if name not in NUMPY:
            assert data_pipeline.measure(name, data_pipeline.QUICK)["tokens/s"] > 0


@pytest.mark.slow
def test_every_pipeline_is_compared_with_seqio(tmp_path, capsys, monkeypatch):
    pytest.importorskip("seqio")
    names = [NUMPY[0], data_pipeline.REFERENCE]  # the others would only take longer
    monkeypatch.setattr(data_pipeline, "PIPELINES", dict.fromkeys(names))
    monkeypatch.chdir(ROOT)
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("<!-- table: data_pipeline -->\n<!-- end -->\n")
    data_pipeline.main(["--quick", f"--json={figures}", f"--markdown={page}"])
    section = json.loads(figures.read_text())["sections"]["data_pipeline"]
    assert [row["pipeline"] for row in section["rows"]] == names
    assert section["rows"][-1]["tokens/s / seqio"]["median"] == 1
    assert all(row["Mtoken/s"]["median"] > 0 for row in section["rows"])
    printed = capsys.readouterr().out
    assert section["title"] in printed and section["title"] in page.read_text()
    assert "a test, not a measurement" in printed


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--repeats=0"], "--repeats must be at least 1, got 0."),
        (["--json=/no/such/folder/x.json"], "does not exist; create it first."),
        (["--markdown=/no/such/page.md"], "is not a file; copy docs/benchmarks.md there first."),
    ],
)
def test_bad_input_is_one_sentence_and_measures_nothing(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(data_pipeline, "section", None)  # calling it would fail
    with pytest.raises(SystemExit) as error:
        data_pipeline.main(arguments)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_page_without_a_place_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit):
        data_pipeline.main([f"--markdown={page}"])
    assert "no markers for table data_pipeline" in capsys.readouterr().err
