"""XL-Sum: one task per language, and the mixture of all."""

import collections
import json

import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats.xlsum import LANGUAGES, xlsum

SUMMARIES = {"arabic": "قمة المناخ اليوم", "japanese": "今日の天気は晴れ", "amharic": "ዛሬ ስብሰባ ነው"}


def write(folder, language, split, count, newline="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"{language}-{i}", "url": "u", "title": "t", "text": f"{language} {i} 🙂",
         "summary": f"{SUMMARIES.get(language, 'a summary')} {i}"} for i in range(count)
    ]  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + newline for i, row in enumerate(rows))
    (folder / f"{language}_{split}.jsonl").write_bytes(text.encode())


def test_there_are_45_languages_with_the_published_total():
    assert len(LANGUAGES) == 45 and list(LANGUAGES) == sorted(LANGUAGES)
    assert set(famx.data.names()) >= {f"xlsum_{name}" for name in LANGUAGES} | {"xlsum"}
    # The authors made 80-10-10 splits, English 93-3.5-3.5, and at least 500 for evaluation.
    for name, (train, validation, test) in LANGUAGES.items():
        share = 0.93 if name == "english" else 0.8
        assert validation == test
        assert train / (train + validation + test) == pytest.approx(share, abs=2e-3) or test == 500


@pytest.mark.parametrize("place", ["", "xlsum", "XLSum_complete_v2.0", "japanese_XLSum_v2.0"])
def test_a_language_is_a_task(tmp_path, place):
    write(tmp_path / place, "japanese", "val", 3, "\r\n")
    task = famx.data.get("xlsum_japanese", data_dir=str(tmp_path))
    examples = task.examples("validation")
    assert len(examples) == 3
    assert examples[2] == {
        "id": "japanese-2", "inputs": "japanese 2 🙂\n\n", "targets": "今日の天気は晴れ 2",
        "references": ["今日の天気は晴れ 2"],
    }  # fmt: skip
    right = [x["targets"] for x in examples]
    assert task.evaluate("validation", right)["rougeL"] == pytest.approx(100)
    half = task.evaluate("validation", ["今日の", "今日の", "今日の"])["rougeL"]
    assert half == pytest.approx(100 * 2 * 3 / (3 + 9))


def test_the_mixture_has_every_example_of_every_language_once(tmp_path):
    sizes = {"arabic": 5, "japanese": 20, "amharic": 1}
    for language, size in sizes.items():
        write(tmp_path, language, "train", size)
        write(tmp_path, language, "val", 2)
    mixture = famx.data.get("xlsum", languages=list(sizes), data_dir=str(tmp_path), max_tokens=40)
    examples = mixture.examples("train")
    assert collections.Counter(x["id"].split("-")[0] for x in examples) == sizes
    assert len({x["id"] for x in examples}) == len(examples) == len(mixture) == 26
    assert all(len(mixture[i][0]) <= 40 for i in range(26))
    order = [x["id"] for x in examples]
    again = xlsum(list(sizes), data_dir=str(tmp_path)).examples("train")
    assert [x["id"] for x in again] == order
    other = xlsum(list(sizes), data_dir=str(tmp_path), seed=1).examples("train")
    assert [x["id"] for x in other] != order
    scores = mixture.evaluate("validation", [x["targets"] for x in mixture.examples("validation")])
    assert scores["rougeL"] == scores["xlsum_arabic/rougeL"] == pytest.approx(100)


def test_rates_may_name_languages_alone(tmp_path):
    for language, size in (("arabic", 4), ("amharic", 2)):
        write(tmp_path, language, "train", size)
    mixture = xlsum(["arabic", "amharic"], {"arabic": 1, "xlsum_amharic": 3}, data_dir=str(tmp_path))
    ids = collections.Counter(x["id"].split("-")[0] for x in mixture.examples("train"))
    assert ids == {"arabic": 4, "amharic": 12}


def test_unknown_language_and_missing_file_get_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="'japanes' is no language of XL-Sum; the nearest name is 'ja"):
        xlsum(["japanes"])
    with pytest.raises(ValueError, match="The nearest name is 'xlsum_welsh'"):
        famx.data.get("xlsum_welch")
    with pytest.raises(ConfigError, match=r"needs .*xlsum/welsh_val.jsonl.*github.com/csebuetnlp/xl-sum"):
        famx.data.get("xlsum_welsh", data_dir=str(tmp_path)).examples("validation")
    (tmp_path / "welsh_val.jsonl").write_text('{"id": "a", "summary": "b"}\n')
    with pytest.raises(ValueError, match="no column 'url'"):
        famx.data.get("xlsum_welsh", data_dir=str(tmp_path)).examples("validation")
