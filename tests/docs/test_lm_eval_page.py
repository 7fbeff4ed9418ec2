"""The page on lm-evaluation-harness: its tasks run, and those of long-context groups on local files."""

import json
import sys
import types
import zipfile

import pytest
from lm_eval_files import write_lines
from markdown_pages import ROOT, blocks
from pretrained import write_byte_pair
from tiny import make_model, make_params

pytest.importorskip("lm_eval", reason="pip install 'famx[lm-eval]'")
datasets = pytest.importorskip("datasets")

from famx.data.vocabularies import ByteVocabulary  # noqa: E402
from famx.evaluation import LmEvaluation  # noqa: E402
from famx.evaluation.lm_eval_model import FamxLM  # noqa: E402
from famx.model_dir.loading import TrainedModel  # noqa: E402

PAGE = ROOT / "docs" / "lm_eval.md"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def byte_model():
    model = make_model(vocabulary=ByteVocabulary())
    return TrainedModel(model, make_params(model.module), 0, None)


def write_dataset(folder, config, split, file, rows):
    """A directory that `datasets` reads as it reads the dataset of the same name from the hub."""
    write_lines(folder / file, rows)
    files = {"config_name": config, "data_files": [{"split": split, "path": file}]}
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([files])}\n---\n")


def test_a_task_of_babilong_reads_a_directory_of_the_datasets_name(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "RMT-team" / "babilong-1k-samples"
    facts = "Mary went to the kitchen. John travelled to the garden. "
    rows = [{"input": facts * 9, "question": "Where is Mary?", "target": "kitchen"}] * 2
    write_dataset(folder, "1k", "qa1", "qa1/1k.json", rows)
    found = long_task("babilong_qa1", {"max_seq_lengths": "1k"})
    assert found[0] == {"babilong_qa1/acc": 0.0} and found[1] > 500


def test_a_task_of_longbench_reads_a_directory_of_the_datasets_name(tmp_path):
    for package in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(package, reason="pip install 'lm-eval[longbench]'")
    folder = tmp_path / "Xnhyacinth" / "LongBench"
    row = {"input": "", "question": "Who?", "context": "A long article. " * 60, "answers": ["Mary"]}
    row |= {"length": 180, "dataset": "qasper", "language": "en", "all_classes": None, "_id": "1"}
    write_dataset(folder, "qasper", "test", "qasper.jsonl", [row])
    found = long_task("longbench_qasper")
    assert set(found[0]) == {"longbench_qasper/score", "longbench_qasper/qa_f1_score"} and found[1] > 960


def test_a_task_of_ruler_is_made_with_the_models_tokenizer(tmp_path):
    for package in ("transformers", "wonderwords", "nltk"):
        pytest.importorskip(package, reason="pip install 'famx[lm-eval]'")
    folder = write_byte_pair(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    names = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(names))
    metadata = {"tokenizer": folder, "max_seq_lengths": [4096]}
    found, longest = long_task("niah_single_1", metadata)
    assert found["niah_single_1/4096"] == 0 and longest > 6000


def long_task(name, metadata=None):
    """Figures of a task without standard errors, by a byte model, and the longest prompt's length."""
    trained, prompts = byte_model(), []
    evaluation = LmEvaluation(name, limit=2, metadata=metadata, gen_kwargs={"max_gen_toks": 4})
    evaluation.check(trained.model)
    with pytest.MonkeyPatch.context() as patch:
        original = FamxLM._context
        patch.setattr(FamxLM, "_context", lambda lm, text: (prompts.append(text), original(lm, text))[1])
        found = evaluation(trained.model, trained.params, 0)
    scores = {key: value for key, value in found.items() if "stderr" not in key}
    return scores, max(map(len, prompts))


METRIC = '''
"""A stand-in for the metric in the repository of SCROLLS, with its interface."""
import datasets
import evaluate


class Scrolls(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"f1": 100.0 * sum(p in r for p, r in zip(predictions, references)) / len(predictions)}
'''


def test_a_task_of_scrolls_reads_the_zip_files_that_a_module_names(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    try:
        import transformers.data.metrics  # noqa: F401
    except ImportError:  # newer ones have none; SCROLLS imports it for Qasper, which is not run here
        metrics = types.ModuleType("transformers.data.metrics")
        metrics.squad_metrics = None
        monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    data, tasks = tmp_path / "scrolls", tmp_path / "tasks"
    data.mkdir(), tasks.mkdir()
    (data / "scrolls.py").write_text(METRIC)
    article = "What colour?\n\n(A) red\n(B) blue\n(C) green\n(D) black\n\n" + "Grass is green. " * 40
    rows = [{"id": f"{i}", "pid": f"{i}_0", "input": article, "output": "green"} for i in range(3)]
    with zipfile.ZipFile(data / "quality.zip", "w") as file:
        for split in ("train", "validation"):
            file.writestr(f"quality/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (module,) = blocks(PAGE, "python")
    task = next(block for block in blocks(PAGE, "yaml") if "scrolls" in block.text)
    (tasks / "local_scrolls.py").write_text(module.text.replace("/data/scrolls", str(data)))
    (tasks / "local_scrolls.yaml").write_text(task.text)
    trained = byte_model()
    evaluation = LmEvaluation("scrolls_quality_local", str(tasks))
    evaluation.check(trained.model)
    found = evaluation(trained.model, trained.params, 0)
    assert {"acc", "acc_norm", "em"} <= {key.rpartition("/")[2] for key in found}


def test_the_task_of_the_page_runs(tmp_path):
    task = next(block for block in blocks(PAGE, "yaml") if "capitals" in block.text).text
    (line,) = blocks(PAGE, "json")
    (tmp_path / "capitals.jsonl").write_text(line.text)
    (tmp_path / "capitals.yaml").write_text(task.replace("/tmp/famx", str(tmp_path)))
    trained = byte_model()
    found = LmEvaluation("capitals", str(tmp_path))(trained.model, trained.params, 0)
    assert found["capitals/acc"] in (0, 1)
