"""The model card says what is recorded, and its code runs."""

import dataclasses
import json
import re

import pytest
import tiny
from exports import imported
from published import train_bpe

from famx.conversion.commands import export_checkpoint
from famx.conversion.exporting import export
from famx.conversion.model_card import read_history
from famx.data.vocabularies import ByteVocabulary, open_vocabulary
from famx.memories import Fam
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import check_same_model
from famx.model_dir.loading import TrainedModel
from famx.modules import Memory

SETTINGS = """from famx.training import run

# Macros:
# ==============================================================================
BATCH_SIZE = 16
INITIAL_CHECKPOINT_PATH = '/home/somebody/models/base'
MIXTURE_OR_TASK_NAME = 'passkey_words'
MODEL_DIR = '/home/somebody/models/new'

# Parameters for run.Data:
# ==============================================================================
run.Data.options = \\
    {'digits': 5,
     'file': '/home/somebody/texts'}
run.Data.task = %MIXTURE_OR_TASK_NAME
"""
METRICS = [
    {"step": 100, "split": "train", "time": 1.0, "loss": 2.5},
    {"step": 100, "split": "eval", "time": 1.0, "hold/4": 0.5, "memory/zeroed/hold/4": 0.0},
    {"step": 200, "split": "train", "time": 2.0, "loss": 0.25, "tokens_per_second": 9.0},
    {"step": 200, "split": "eval", "time": 2.0, "hold/4": 0.9375},
]


@pytest.fixture
def recorded(tmp_path):
    """A MODEL_DIR with the records of a run that began from an import, without a checkpoint."""
    base, new = tmp_path / "smollm", tmp_path / "new"
    base.mkdir()
    new.mkdir()
    (base / "model.gin").write_text("# The model that was imported from SmolLM2-135M.gguf.\nX = 1\n")
    (new / "base.json").write_text(json.dumps({"checkpoint": str(base / "checkpoint_0"), "weights": "0"}))
    (new / "config.gin").write_text(SETTINGS)
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    (new / "metrics.jsonl").write_text(lines + '{"step": 3')  # a line that is being written
    return new


def test_the_records_of_a_run_are_read_up_to_the_checkpoint(recorded):
    history = read_history(recorded, 150)
    assert (history.step, history.figures, history.task) == (150, {"loss": 2.5}, "'passkey_words'")
    assert history.evaluation == (100, {"hold/4": 0.5, "memory/zeroed/hold/4": 0.0})
    assert history.began_from == "SmolLM2-135M.gguf (smollm)"
    last = read_history(recorded, None)
    assert last.step == 200 and last.evaluation == (200, {"hold/4": 0.9375})
    assert "BATCH_SIZE = 16\nMIXTURE" in last.settings and "\n\n# Parameters for run" in last.settings
    assert "run.Data.task = %MIXTURE_OR_TASK_NAME" in last.settings
    assert "somebody" not in last.settings and "run.Data.options" not in last.settings


def test_a_base_that_is_gone_is_known_by_its_name(recorded):
    (recorded / "base.json").write_text(json.dumps({"checkpoint": "/gone/models/base/checkpoint_5"}))
    assert read_history(recorded, 200).began_from == "base"
    settings = recorded / "config.gin"
    for text in ("{", "[]", "null", "{}"):
        (recorded / "base.json").write_text(text)
        assert read_history(recorded, 200).began_from == "base"  # of INITIAL_CHECKPOINT_PATH
    settings.write_text(SETTINGS.replace("INITIAL_CHECKPOINT_PATH", "# INITIAL_CHECKPOINT_PATH"))
    assert read_history(recorded, 200).began_from is None


def test_a_directory_without_records_tells_nothing(tmp_path):
    history = read_history(tmp_path, 7)
    assert dataclasses.asdict(history) == {**dict.fromkeys(dataclasses.asdict(history)), "step": 7}


def card(trained, directory, **options):
    export(trained, directory, **options)
    return (directory / "README.md").read_text()


def test_the_card_says_how_it_was_trained_and_what_it_can_do(recorded, tmp_path):
    trained = imported("llama", tmp_path, memory=Fam(2, update="gated"))
    trained = dataclasses.replace(trained, step=200, directory=recorded / "checkpoint_200")
    text = card(trained, tmp_path / "out")
    for part in (
        "It began from SmolLM2-135M.gguf (smollm).", "trained for 200 steps", "Task: 'passkey_words'.",
        "loss 0.25", "BATCH_SIZE = 16", "| evaluation at step 200 |", "| hold/4 | 0.9375 |",
        "Nothing else was measured.", "| memory: update | gated |", "LlamaForCausalLM",
    ):  # fmt: skip
        assert part in text, part
    assert "somebody" not in text and str(tmp_path) not in text and "tokens_per_second" not in text


def test_the_card_does_not_say_what_it_does_not_know(tmp_path):
    trained = imported("llama", tmp_path)
    text = card(trained, tmp_path / "out")
    assert "It began from a model that is not recorded." in text and "settings are not recorded" in text
    assert "No evaluation is recorded with this model, so it is not known." in text
    untrained = card(dataclasses.replace(trained, step=0), tmp_path / "untrained")
    assert "and not trained afterwards" in untrained and "Its memory was never trained" in untrained
    plain = card(dataclasses.replace(trained, step=0), tmp_path / "plain", memory=False)
    assert "Its memory" not in plain and "trust_remote_code" not in plain


def test_what_the_card_says_a_state_takes_is_what_it_takes(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = card(imported("llama", tmp_path), tmp_path / "out")
    make = transformers.AutoModelForCausalLM.from_pretrained
    state = make(tmp_path / "out", trust_remote_code=True).read(torch.ones(1, 50, dtype=torch.long))
    arrays = [x for xs in (state.memory, state.keys, state.values) for x in xs]
    size = sum(x.numel() * x.element_size() for x in arrays)
    assert 1000 < size < 100_000 and f"of a text is {size / 1000:.1f} kB" in text.replace("\n", " ")


def test_the_records_of_an_adapter_are_those_of_its_run(recorded, tmp_path, capsys, monkeypatch):
    from famx.conversion import commands

    trained = imported("llama", tmp_path)
    given = []

    def load(checkpoint, adapter):
        given.append(adapter)
        return dataclasses.replace(trained, step=0)

    monkeypatch.setattr(commands, "check_model", lambda directory: trained.model)
    monkeypatch.setattr(commands, "load_model", load)
    export_checkpoint(str(tmp_path), str(tmp_path / "out"), adapter=str(recorded / "adapter"))
    assert given == [str(recorded / "adapter")]
    assert "trained for 200 steps" in (tmp_path / "out/README.md").read_text()


# ------------------------------------------------------------------ the quick start


def run_quick_start(directory, monkeypatch, capsys):
    """Run the code of the card next to the directory; return what it prints."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(directory.parent)
    capsys.readouterr()
    exec(compile(blocks[0], "README.md", "exec"), {})
    return capsys.readouterr().out


def scratch(tmp_path, vocabulary, **changes):
    model = tiny.make_model(vocabulary=vocabulary, memory_segments=1, **changes)
    return TrainedModel(model, tiny.make_params(model.module), 3, tmp_path / "model/checkpoint_3")


@pytest.mark.parametrize("memory", [Fam(2), Memory()])
def test_the_quick_start_runs_with_a_tokenizer(memory, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    train_bpe(tmp_path / "tokenizer.json")
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    trained = scratch(tmp_path, vocabulary, vocab_size=vocabulary.vocab_size, memory=memory)
    text = card(trained, tmp_path / "out")
    assert "tokenizer = AutoTokenizer.from_pretrained(NAME)" in text
    assert ("model.read(" in text) == memory.exists == ("import copy" in text)
    assert run_quick_start(tmp_path / "out", monkeypatch, capsys)


@pytest.mark.parametrize("memory", [Fam(2), Memory()])
def test_the_quick_start_runs_without_a_tokenizer(memory, tmp_path, monkeypatch, capsys):
    text = card(scratch(tmp_path, ByteVocabulary(), memory=memory), tmp_path / "out")
    assert "There is no tokenizer of transformers" in text and "AutoTokenizer" not in text
    assert "tensor(" in run_quick_start(tmp_path / "out", monkeypatch, capsys)


@pytest.mark.slow
def test_a_model_dir_is_exported_with_its_card(tmp_path):
    model = tiny.make_model()
    (tmp_path / "model").mkdir()
    check_same_model(tmp_path / "model", model.describe())
    with Checkpointer(tmp_path / "model") as checkpointer:
        checkpointer.save(5, {"target": tiny.make_params(model.module)})
    line = json.dumps({"step": 5, "split": "train", "loss": 1.5})
    (tmp_path / "model/metrics.jsonl").write_text(line + "\n")
    export_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# out\n" in text
    assert "trained for 5 steps" in text and "loss 1.5" in text
