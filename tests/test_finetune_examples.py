"""The smoke examples run with the command in their header, on a tiny model like an imported one."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from pretrained import write_pretrained
from test_readme import commands

from famx.data.vocabularies import as_vocabulary, load_vocabulary
from famx.model_dir.loading import load_model
from famx.training.run_log import read_metrics

pytest.importorskip("tokenizers")
ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "gin_configs" / "examples"
SMOKE = sorted(EXAMPLES.glob("finetune_*_smoke.gin"))
FULL = [path.with_name(path.name.replace("_smoke", "")) for path in SMOKE]
TEXT = "The theorem follows from the lemma; we prove it by induction on the list. " * 30


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory, _ = write_pretrained(tmp_path_factory.mktemp("pretrained"), embed_dim=32, mlp_dim=64)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files in the published formats."""
    root = tmp_path_factory.mktemp("data")

    def write(name, rows):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for split, first in (("train", 0), ("validation", 100)):
        rows = [
            {"id": f"q{i}", "pid": f"q{i}_0", "input": f"Is it {i}?\n\n{TEXT}", "output": f"No {i}"}
            for i in range(first, first + 12)
        ]
        write(f"scrolls/qasper/{split}.jsonl", rows)
    for split in ("train", "val"):
        rows = [
            {"id": f"a{i}", "url": "", "title": f"Story {i}", "summary": f"It is {i}.", "text": TEXT}
            for i in range(12)
        ]
        write(f"xlsum/english_{split}.jsonl", rows)
    for i in range(8):
        path = root / "hol_light" / f"part{i}.ml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"let LEMMA_{i} = prove(`!x. x + {i} = {i} + x`, MESON_TAC[ADD_SYM]);;\n" * 40)
    return root


def command(path, pretrained, model_dir, data):
    """The command in the example's header, with the paths replaced."""
    (arguments,) = commands(path.read_text())
    places = {
        r"^/tmp/famx/smollm2/model\.gin$": f"{pretrained}/model.gin",
        r"(?<==)/tmp/famx/smollm2$": pretrained,
        r"(?<==)DATA$": str(data),
        r"(?<=MODEL_DIR=).*": str(model_dir),
    }
    for there, here in places.items():
        arguments = [re.sub(there, here, argument) for argument in arguments]
    return arguments


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_a_smoke_example_runs_and_learns(path, pretrained, data, tmp_path):
    arguments = command(path, pretrained, tmp_path / "model", data)
    code = "import runpy, sys; sys.argv[0] = 'famx.train'; "
    if "passkey" in path.name:
        arguments.append("--gin.warmup_cosine.learning_rate=0.02")  # the model knows nothing yet
        # Where a GPU is, TensorFlow and seqio may not be.
        code += "sys.modules.update(dict.fromkeys(('tensorflow', 'seqio', 'gguf', 'torch'))); "
    code += "runpy.run_module('famx.train', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "FAMX_DATA_DIR": str(data)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [row["loss"] for row in read_metrics(str(tmp_path / "model"), "train")]
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert read_metrics(str(tmp_path / "model"), "eval")
    trained, base = load_model(str(tmp_path / "model")), load_model(pretrained)
    assert load_vocabulary(tmp_path / "model") == as_vocabulary(pretrained)
    assert trained.model.config.block_size == 128 and trained.model.config.memory_columns == 64
    np.testing.assert_array_equal(trained.params["embedding"], base.params["embedding"])
    assert trained.params["memory"]["prompt"].shape[0] == 64
    assert list((tmp_path / "model" / "adapter").glob("*.safetensors"))


@pytest.mark.parametrize("path", [*SMOKE, *FULL], ids=lambda path: path.stem)
def test_an_example_says_its_cost_and_what_is_expected(path):
    head = path.read_text().split("from __gin__")[0]
    assert "# Cost: " in head and ("# Expected: " in head or path in SMOKE)
