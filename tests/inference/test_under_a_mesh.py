"""Whatever reads with a trained model does so under the mesh of all devices, with the same results."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import xla_flags

from famx.base.gin_utils import gin_root

TESTS = pathlib.Path(__file__).parent.parent
# Each part answers something; `calls` are the shapes of queries that the pretended kernel was given.
PARTS = """
import json, pathlib, sys
import jax, numpy as np
from tiny import make_model, make_params
from trained import write_model_dir
from famx.analysis.attention_maps import read_maps
from famx.data import ByteVocabulary
from famx.evaluation import TextEvaluation
from famx.evaluation.checkpoints import evaluate
from famx.decoding import Sampling
from famx.inference import infer
from famx.inference.conversation import Conversation, load_with_vocabulary
from famx.inference.memorize import make_memory
from famx.modules.attention import dense, dispatch

folder, kernel = pathlib.Path(sys.argv[1]), sys.argv[2] == "kernel"
calls, meshes = [], set()

def attention(config, q, *rest):
    calls.append(q.shape)
    meshes.add(jax.sharding.get_abstract_mesh().size)
    return dense.attention(config, q, *rest)

if kernel:
    dispatch.resolve_backend = lambda *args: "splash"
    dispatch._KERNELS["splash"] = attention
model = make_model(vocab_size=259, num_heads=4, num_kv_heads=2)
directory = write_model_dir(folder / "model", model, make_params(model.module), ByteVocabulary())
(folder / "book.txt").write_text("What a book. " * 9)
(folder / "in.jsonl").write_text(
    "".join(json.dumps({"inputs": "ab" * n}) + "\\n" for n in (1, 9, 4, 7)))
sampling = Sampling(max_new_tokens=9)

def lines():
    out, memory = folder / "out.jsonl", str(folder / "book.famem")
    infer(directory, str(folder / "in.jsonl"), str(out), "predict_with_aux", 16, memory_file=memory,
          sampling=sampling)
    return [json.loads(line) for line in out.read_text().splitlines()]

def memory():
    out = str(folder / "book.famem")
    make_memory(directory, [str(folder / "book.txt")], out)
    return out

def chat():
    conversation = Conversation(load_with_vocabulary(directory), sampling)
    conversation.load(str(folder / "book.famem"))
    messages = "A question of some blocks?", "Two?"
    answers = [conversation.exchange(text, lambda part: None) for text in messages]
    return [answers, conversation.tokens, conversation.updates]

def evaluation():
    class Documents(list):
        vocab = ByteVocabulary()
    documents = Documents(np.arange(100, dtype=np.int32) % 50 + 3 + i for i in range(16))
    text = TextEvaluation(documents, batch_size=16, length=32, health=False)
    return evaluate(directory, {"text": text}, re_evaluate=True)

def maps():
    found = read_maps(load_with_vocabulary(directory), "A text to look at, of blocks.", blocks=[0, -1])
    return [found.tokens.tolist(), found.memory.tolist()]

parts = dict(memory=memory, chat=chat, lines=lines, evaluation=evaluation, maps=maps)
results, seen = {}, {}
for name, part in parts.items():
    calls.clear(), meshes.clear()
    results[name] = part()
    seen[name] = [sorted(set(calls)), sorted(meshes)]
del results["memory"]
print(json.dumps({"devices": jax.device_count(), "results": results, "seen": seen}))
"""


def run(folder, devices, kernel):
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PARTS, str(folder), "kernel" if kernel else "own"],
        cwd=gin_root(), capture_output=True, text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(gin_root()), str(TESTS)]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags.FAST}",
        },
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == devices
    return found["results"], found["seen"]


def close(a, b):
    """Equal, numbers up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == (pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(b, float) else b)


@pytest.mark.slow
def test_eight_devices_give_the_results_of_one_and_call_the_kernel(tmp_path):
    results, _ = run(tmp_path / "one", 1, kernel=False)
    eight, seen = run(tmp_path / "eight", 8, kernel=True)
    for name, result in results.items():
        assert close(eight[name], result), (name, eight[name], result)
    for name, (shapes, meshes) in seen.items():
        assert shapes and meshes == [8], (name, shapes, meshes)
    batch = lambda name: max(shape[0] for shape in seen[name][0])
    assert batch("chat") == batch("memory") == batch("maps") == 1  # every device computes the example
    assert batch("lines") == batch("evaluation") == 2  # two of sixteen examples for each device
