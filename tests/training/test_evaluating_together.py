"""Evaluations during training on several processes: the scores, report and files of one process."""

import json
import os
import subprocess
import sys

import pytest
import xla_flags
from processes import free_address, start_process

from famx.base.gin_utils import gin_root

PROGRAM = """
import dataclasses, json, pathlib, sys
import jax, numpy as np, optax
from famx.base import distributed, peers
folder, address, count, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 2 // count)
if count > 1:
    distributed.initialize(
        coordinator_address=address, num_processes=count, process_id=index, limit=600.0)
from tiny import make_model, make_run, passkey
from famx.data import ByteVocabulary
from famx.evaluation import (
    PasskeyEvaluation, ProbeEvaluation, TaskEvaluation, TextEvaluation, TextTaskEvaluation)
from famx.training import loop
from famx.training.run import Every

class Documents(list):
    vocab = ByteVocabulary()

@dataclasses.dataclass
class Several:
    parts: dict

    def __call__(self, model, params, step):
        return {f"{name}/{score}": value for name, part in self.parts.items()
                for score, value in part(model, params, step).items()}

    def report(self, model, params, model_dir):
        reports = [part.report(model, params, model_dir) for part in self.parts.values()
                   if hasattr(part, "report")]
        return "\\n".join(reports)

data = folder / "data" / "scrolls"
rows = {
    "qasper": [{"output": "ba", "input": f"What {i}?\\n\\n" + "a b " * 9 * i} for i in range(5)],
    "quality": [
        {"output": x, "input": f"Which?\\n\\n (A) red\\n (B) a cat\\n (C) b\\n (D) c\\n\\n\\n{x} ab"}
        for x in ("red", "a cat", "red")],
}
if index == 0:
    for name, records in rows.items():
        (data / name).mkdir(parents=True)
        lines = [json.dumps({"id": f"q{i}", "pid": f"q{i}_0", **x}) for i, x in enumerate(records)]
        (data / name / "validation.jsonl").write_text("\\n".join(lines))
bytes_ = ByteVocabulary()
small = dict(health_tokens=512)
texts = Documents(np.arange(150, dtype=np.int32) % 50 + 3 + i for i in range(6))
of_text = dict(task_options={"data_dir": str(data.parent)}, max_new_tokens=3, batch_size=2, **small)
several = {
    "words": (make_model(block_size=16), {
        "passkey": PasskeyEvaluation(passkey(), (4, 6), (4, 7), examples=3, **small),
        "task": TaskEvaluation(passkey(), 64, examples=5, batch_size=3, **small),
    }),
    "bytes": (make_model(block_size=64, vocabulary=bytes_), {
        "text": TextEvaluation(texts, batch_size=4, length=64, sample_tokens=9, **small),
        "qasper": TextTaskEvaluation("scrolls_qasper", **of_text),
        "quality": TextTaskEvaluation("scrolls_quality", **of_text),
        "probe": ProbeEvaluation(probes=["ruler_niah_single_1"], lengths=[600], examples=3,
                                 batch_size=2, max_new_tokens=3),
    }),
}
with peers.together(600.0):
    distributed.agreed(None)  # the files of process 0 are there
    for name, (model, parts) in several.items():
        vocabulary = {} if model.vocabulary is None else {"vocabulary": bytes_}
        run = make_run(
            options={"digits": 1, "header": False, "filler": "random_words", **vocabulary},
            model_dir=str(folder / name), steps=2, batch_size=4, optimizer=optax.adam(1e-2), model=model,
            lengths={"targets": 128}, evaluation=Several(parts), every=Every(1, 1, 2))
        loop.train(run)
if count > 1:
    jax.distributed.shutdown()
"""


def trained(folder, count):
    """Scores by model and step, reports and files of a run on two devices, of `count` processes."""
    folder.mkdir()
    address = free_address()
    paths = os.pathsep.join([str(gin_root()), str(gin_root() / "tests")])
    processes = [
        start_process(
            [sys.executable, "-c", PROGRAM, str(folder), address, str(count), str(i)], cwd=gin_root(),
            env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.FAST},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for i in range(count)
    ]  # fmt: skip
    texts = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, texts[0][-3000:]
    found, files = {}, {}
    for name in ("words", "bytes"):
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        found[name] = [x for x in lines if x.pop("split") == "eval" and x.pop("time")]
        files[name] = sorted(path.name for path in (folder / name).iterdir())
    reports = [line for line in texts[0].splitlines() if line[:1] == " " and "Step" not in line]
    return found, files, reports, texts[1:]


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tmp_path):
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    for name, wanted in one[0].items():
        assert len(wanted) >= 1 and any(key.startswith("probe/") for key in one[0]["bytes"][0])
        for line, other in zip(wanted, two[0][name], strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-5)
    assert one[1] == two[1] and "passkey.png" in one[1]["words"]
    assert one[2] == two[2] and len(one[2]) > 3
    assert not any("Step" in text for text in two[3])  # the others say nothing
