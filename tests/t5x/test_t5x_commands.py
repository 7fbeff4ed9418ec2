"""t5x's own commands with our gin files, on several devices and in two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from driving import BATCH, LENGTH  # skips without t5x
from own_seqio import MODULE, NAME, own_folder
from processes import start_process

from famx.base.gin_utils import gin_root

pytestmark = [pytest.mark.slow, pytest.mark.t5x]
TINY = {
    "DecoderConfig.num_layers": 1,
    "DecoderConfig.embed_dim": 16,
    "DecoderConfig.mlp_dim": 32,
    "DecoderConfig.block_size": 8,
    "DecoderConfig.vocab_size": 260,
    "Fam.length": 2,
    "MIXTURE_OR_TASK_NAME": "'passkey_words'",
    "TASK_OPTIONS": {
        "digits": 1,
        "header": False,
        "filler": "random_words",
        "block_size": None,
        "second_key": 0.0,
        "second_key_recent": False,
    },
    "TASK_FEATURE_LENGTHS": {"targets": LENGTH},
    "BATCH_SIZE": BATCH,
}


def start(module, gin_files, bindings, *flags, devices=1):
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    files = [f"--gin_file={name}" for name in gin_files]
    settings = [f"--gin.{name}={value}" for name, value in bindings.items()]
    return start_process(
        [sys.executable, "-W", "ignore", "-m", module, *flags, *files, *settings], cwd=gin_root(),
        env={**os.environ, "XLA_FLAGS": xla},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-6000:]
    return output


def train(model_dir, steps=3, flags=(), gin_files=("gin_configs/models/tiny.gin",), devices=1, **more):
    bindings = {
        **TINY,
        "MODEL_DIR": f"'{model_dir}'",
        "TRAIN_STEPS": steps,
        "SaveCheckpointConfig.period": steps,
        "EVAL_PERIOD": steps,
        "EVAL_STEPS": 1,
        **more,
    }
    files = ["gin_configs/t5x/pretrain.gin", *gin_files]
    return start("t5x.train", files, bindings, *flags, devices=devices)


def losses(model_dir, split="train", name="loss"):
    """Those that t5x wrote for TensorBoard, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    (folder,) = (pathlib.Path(model_dir) / split).glob("**/events*")
    events = EventAccumulator(str(folder))
    events.Reload()
    return {x.step: float(make_ndarray(x.tensor_proto)) for x in events.Tensors(name)}


def test_pretraining_finetuning_evaluation_and_inference_by_command(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    example, segments = ["gin_configs/examples/passkey_aged.gin"], {"DecoderConfig.memory_segments": 1}
    changed = {"STATE_PASSING": "'random'", "LEARNING_RATE": 3e-3, **segments}
    finish(train(base, gin_files=example, **changed))
    assert losses(base).keys() == losses(base, "training_eval").keys() == {3}
    assert losses(base, name="learning_rate") == {3: pytest.approx(3e-3)}
    assert json.loads((base / "model.json").read_text())["memory"]["update"] == "gated"

    folder = tmp_path / "qasper"
    folder.mkdir()
    lines = [{"id": f"{i}", "pid": f"{i}", "input": f"1 {i} ?", "output": "2"} for i in range(5)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "MIXTURE_OR_TASK_NAME": "'scrolls_qasper'",
        "TASK_OPTIONS": {"data_dir": str(tmp_path)},
        "BATCH_SIZE": 2,
    }
    bindings = {
        **task,
        "MODEL_DIR": f"'{tuned}'",
        "INITIAL_CHECKPOINT_PATH": f"'{base}'",
        "TASK_FEATURE_LENGTHS": {"targets": 16},
        "TRAIN_STEPS": 2,
        "EVAL_PERIOD": 2,
        "EVAL_STEPS": 1,
        "Lora.rank": 2,
    }
    model = {k: v for k, v in TINY.items() if k.startswith(("Decoder", "Fam"))}
    model |= {"Fam.update": "'gated'", "Fam.normalize": True}
    model |= segments
    files = ["gin_configs/t5x/finetune.gin", "gin_configs/models/tiny.gin"]
    finish(start("t5x.main", files, {**model, **bindings}, "--run_mode=train"))
    assert json.loads((tuned / "model.json").read_text())["lora"]["rank"] == 2
    in_loop = list((tuned / "inference_eval").glob("*-metrics.jsonl"))
    assert len(in_loop) == 1 and json.loads(in_loop[0].read_text())["step"] == 2

    out = {"CHECKPOINT_PATH": f"'{tuned}'", "EVAL_OUTPUT_DIR": f"'{tmp_path / 'eval'}'"}
    evaluation = start("t5x.eval", ["gin_configs/t5x/eval.gin"], {**task, **out})
    out = {
        "CHECKPOINT_PATH": f"'{tuned / 'checkpoint_2'}'",
        "INFER_OUTPUT_DIR": f"'{tmp_path / 'infer'}'",
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 8},
        "MODE": "'score'",
    }
    inference = start(
        "t5x.main", ["gin_configs/t5x/infer.gin"], {**task, **out}, "--run_mode=infer")  # fmt: skip
    finish(evaluation), finish(inference)
    (metrics,) = (tmp_path / "eval").glob("**/*-metrics.jsonl")
    assert json.loads(metrics.read_text()) == json.loads(in_loop[0].read_text())
    (scores,) = (tmp_path / "infer").glob("*-score.jsonl-00000-of-00001")
    assert len(scores.read_text().splitlines()) == 5


def test_meshes_and_processes_give_the_losses_of_one_device(tmp_path):
    mesh = "PjitPartitioner.model_parallel_submesh"
    wide = {"logical_axis_rules.parameter_partitioning_dims": 2}
    wider = {"logical_axis_rules.activation_partitioning_dims": 2}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = ("--multiprocess_gpu", f"--coordinator_address=localhost:{port}", "--process_count=2")
    settings, eight = {"STATE_PASSING": "'random'"}, {"devices": 8, "train.train_eval_dataset_cfg": None}
    runs = [
        {"one": [{}], "4x2": [{**eight, mesh: (1, 1, 1, 2), **wide}]},
        {"2x4": [{**eight, mesh: (1, 1, 1, 4), **wider}]},
        {"two": [{"flags": (*flags, f"--process_index={i}")} for i in range(2)]},
    ]
    for together in runs:
        started = [
            train(tmp_path / name, **settings, **run) for name, parts in together.items() for run in parts
        ]
        for process in started:
            finish(process)
    for name, split in (("4x2", "train"), ("2x4", "train"), ("two", "train"), ("two", "training_eval")):
        one = losses(tmp_path / "one", split)
        assert losses(tmp_path / name, split) == pytest.approx(one, rel=1e-4), name
    saved = tmp_path / "two" / "checkpoint_3" / "dataset"
    assert len(list(saved.glob("process_*-of-2/*"))) >= 2 and (saved / "metadata").exists()


def test_a_task_of_ones_own_module_is_trained_on_and_evaluated_by_command(tmp_path, monkeypatch):
    folder = own_folder()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    own = {
        "MIXTURE_OR_TASK_MODULE": f"'{MODULE}'",
        "MIXTURE_OR_TASK_NAME": f"'{NAME}'",
        "TASK_OPTIONS": {},
    }
    (tmp_path / "optimizer.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom t5x import adafactor\n"
        "OPTIMIZER = @adafactor.Adafactor()\nadafactor.Adafactor.learning_rate = 0.01\n"
    )
    run, files = tmp_path / "run", ("gin_configs/models/tiny.gin", str(tmp_path / "optimizer.gin"))
    lengths = {"TASK_FEATURE_LENGTHS": {"inputs": 10, "targets": 6}}
    finish(train(run, steps=2, gin_files=files, **own, **lengths))
    logged = losses(run, name="timing/target_tokens_per_second")
    assert logged.keys() == {2} and logged[2] > 0
    drawn = {"SAMPLING": "@decoding.Sampling()", "Sampling.temperature": 1.0, "NUM_DECODES": 2}
    out = {"CHECKPOINT_PATH": f"'{run}'", "EVAL_OUTPUT_DIR": f"'{tmp_path / 'eval'}'", "BATCH_SIZE": 4}
    finish(start("t5x.eval", ["gin_configs/t5x/eval.gin"], {**own, **out, **drawn}))
    (metrics,) = (tmp_path / "eval").glob("**/*-metrics.jsonl")
    assert 0 <= json.loads(metrics.read_text())["exact"] <= 1
