"""`famx.eval`: which checkpoints are evaluated, what is written, and the main as a user runs it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest.mock

import gin
import jax
import jax.numpy as jnp
import pytest
from absl import flags
from gin import config as gin_config
from processes import start_process
from tiny import make_model, make_params, make_run
from trained import write_model_dir

from famx import eval as eval_main
from famx.base import gin_utils
from famx.base.describe import describe
from famx.base.errors import ConfigError
from famx.data import PasskeyTask
from famx.data.probes.passkey_text import passkey_words
from famx.evaluation import PasskeyEvaluation, TaskEvaluation
from famx.evaluation.checkpoints import evaluate, table
from famx.lora import Lora, combine, save_adapter
from famx.model_dir.identity import weights_fingerprint
from famx.model_dir.loading import load_model
from famx.modules.config import MEMORY_FIELDS
from famx.training import loop

MODEL = make_model(block_size=16)
TOKENS = jnp.arange(40).reshape(1, 40) % MODEL.config.vocab_size


@dataclasses.dataclass
class Mean:
    """Evaluates to the mean of the embedding, which tells checkpoints apart, and records its calls."""

    factor: float = 1.0
    calls: list = dataclasses.field(default_factory=list, repr=False)

    def __call__(self, model, params, step):
        self.calls.append(step)
        return {"mean": self.factor * float(params["embedding"].mean()), "memory/x": float(step)}


def write(directory, *steps):
    for step in steps:
        params = jax.tree.map(lambda x, step=step: x + step, make_params(MODEL.module))
        write_model_dir(directory, MODEL, params, passkey_words(), step)


def mean(step):
    return pytest.approx(float(make_params(MODEL.module)["embedding"].mean()) + step, rel=1e-5)


@pytest.fixture
def model_dir(tmp_path):
    write(tmp_path / "model", 1, 2)
    return tmp_path / "model"


def result(path):
    return json.loads(path.read_text())


def test_the_latest_checkpoint_is_evaluated_and_written(model_dir):
    results = evaluate(str(model_dir), {"mean": Mean()})
    assert results == {"mean": {2: {"mean": mean(2), "memory/x": 2.0}}}
    found = result(model_dir / "eval" / "mean" / "2.json")
    assert found["scalars"] == results["mean"][2] and (found["name"], found["step"]) == ("mean", 2)
    assert found["settings"] == {"type": "Mean", "factor": 1.0}
    assert found["checkpoint"] == str(model_dir / "checkpoint_2")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert list((model_dir / "tensorboard" / "eval_mean").glob("events*"))
    assert not list((model_dir / "eval" / "mean").glob(".*"))


def test_one_checkpoint_and_all_of_them_and_another_place(model_dir, tmp_path):
    results = evaluate(str(model_dir / "checkpoint_1"), {"mean": Mean()}, str(tmp_path / "out"))
    assert results["mean"] == {1: {"mean": mean(1), "memory/x": 1.0}}
    assert list((tmp_path / "out" / "tensorboard" / "eval_mean").glob("events*"))
    assert not (model_dir / "eval").exists() and not (model_dir / "tensorboard").exists()
    both = evaluate(str(model_dir), {"a": Mean(), "b": Mean(2.0)}, checkpoints="all")
    assert [list(by_step) for by_step in both.values()] == [[1, 2], [1, 2]]
    assert both["b"][2]["mean"] == pytest.approx(2 * both["a"][2]["mean"])


def test_a_saved_adapter_is_evaluated_in_a_directory_of_its_own(model_dir, tmp_path):
    base, path = load_model(str(model_dir)), tmp_path / "adapter"
    lora = Lora(rank=2)
    adapters = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), base.params))
    memory = {**MODEL.config.to_dict(), "block_size": 8}
    save_adapter(
        path, combine(base.params, adapters), lora, weights_fingerprint(base.params),
        memory={name: memory[name] for name in MEMORY_FIELDS},
    )  # fmt: skip
    seen = []

    def read(model, params, step):
        seen.append(model.module.apply({"params": params}, TOKENS)[0])
        return {"block_size": model.config.block_size}

    for checkpoint in (model_dir, model_dir / "checkpoint_2"):
        out = tmp_path / f"out_{checkpoint.name}"
        results = evaluate(str(checkpoint), {"read": read}, str(out), adapter=str(path))
        assert results == {"read": {2: {"block_size": 8.0}}}
    adapted = load_model(str(model_dir), adapter=str(path))
    wanted = adapted.model.module.apply({"params": adapted.params}, TOKENS)[0]
    plain = base.model.module.apply({"params": base.params}, TOKENS)[0]
    assert (seen[0] == wanted).all() and (seen[1] == wanted).all() and not (seen[0] == plain).all()
    with pytest.raises(ConfigError, match="needs EVAL_OUTPUT_DIR"):
        evaluate(str(model_dir), {"read": read}, adapter=str(path))
    with pytest.raises(ConfigError, match="leave out CHECKPOINTS"):
        evaluate(str(model_dir), {"read": read}, str(tmp_path), checkpoints="all", adapter=str(path))
    with pytest.raises(ConfigError, match="trained on another base model"):
        evaluate(str(model_dir / "checkpoint_1"), {"read": read}, str(tmp_path), adapter=str(path))
    assert len(seen) == 2


def test_what_is_evaluated_already_is_not_made_again(model_dir, capsys):
    first = evaluate(str(model_dir), {"mean": Mean()})
    (model_dir / "eval" / "mean" / "1.json").write_text('{"scalars": {"me')  # cut off by a kill
    again = Mean()
    results = evaluate(str(model_dir), {"mean": again}, checkpoints="all")
    assert again.calls == [1] and results["mean"][2] == first["mean"][2]
    assert result(model_dir / "eval" / "mean" / "1.json")["scalars"]["mean"] == mean(1)
    assert "Checkpoint 2: mean has already been evaluated.\n" in capsys.readouterr().err
    other = Mean(3.0)
    evaluate(str(model_dir), {"mean": other})
    assert not other.calls and "evaluated with other settings; set RE_EVALUATE" in capsys.readouterr().err
    assert evaluate(str(model_dir), {"mean": other}, re_evaluate=True)["mean"][2]["mean"] == (
        pytest.approx(3 * first["mean"][2]["mean"])
    )
    assert other.calls == [2]


def test_waiting_takes_each_checkpoint_as_it_comes(model_dir):
    evaluation = Mean()

    def train():
        time.sleep(1)
        write(model_dir, 3)
        time.sleep(1)
        write(model_dir, 5)

    trainer = threading.Thread(target=train)
    trainer.start()
    results = evaluate(
        str(model_dir), {"mean": evaluation}, checkpoints="wait", stop_at_step=5, timeout=60,
        poll_seconds=0.1,
    )  # fmt: skip
    trainer.join()
    assert evaluation.calls == [1, 2, 3, 5]
    assert results["mean"][5]["mean"] == mean(5)


def test_waiting_ends_when_nothing_comes(model_dir, tmp_path, capsys):
    began = time.monotonic()
    evaluate(str(model_dir), {"mean": Mean()}, checkpoints="wait", timeout=0.5, poll_seconds=0.1)
    assert "No new checkpoint within 0.5 seconds." in capsys.readouterr().err
    assert time.monotonic() - began < 30
    for step in (1, 2):
        shutil.rmtree(model_dir / f"checkpoint_{step}")
    with pytest.raises(ConfigError, match="No checkpoint appeared in .*/model within 0.2 seconds"):
        evaluate(str(model_dir), {"mean": Mean()}, str(tmp_path / "out"), checkpoints="wait", timeout=0.2)


def test_a_checkpoint_that_was_deleted_meanwhile_is_skipped(model_dir, capsys):
    class Deleting(Mean):
        def __call__(self, model, params, step):
            shutil.rmtree(model_dir / "checkpoint_2", ignore_errors=True)
            return super().__call__(model, params, step)

    results = evaluate(str(model_dir), {"mean": Deleting()}, checkpoints="all")
    assert list(results["mean"]) == [1]
    assert "Checkpoint 2 was deleted in the meantime: skipped." in capsys.readouterr().err


def test_a_damaged_checkpoint_that_stays_is_an_error(model_dir, monkeypatch):
    monkeypatch.setattr("famx.evaluation.checkpoints._GONE_SECONDS", 0.1)
    for path in (model_dir / "checkpoint_2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ConfigError, match="checkpoint_2 is damaged: "):
        evaluate(str(model_dir), {"mean": Mean()})
    assert not (model_dir / "eval" / "mean").exists()


def test_a_signal_ends_the_work_after_the_evaluation_in_progress(model_dir, capsys):
    class Stopping(Mean):
        def __call__(self, model, params, step):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, params, step)

    later = Mean()
    results = evaluate(str(model_dir), {"a": Stopping(), "b": later}, checkpoints="all")
    assert list(results["a"]) == [1] and (model_dir / "eval" / "a" / "1.json").exists()
    assert not later.calls and "Stopped. Run the same command to resume." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert list(evaluate(str(model_dir), {"b": later}, checkpoints="all")["b"]) == [1, 2]


def test_the_table_shows_the_newest_checkpoints():
    results = {"a": {step: {"x": step / 3, **({"y": 1.0} if step == 7 else {})} for step in range(1, 8)},
               "b": {}, "c": {2: {"z": 0.5}}}  # fmt: skip
    lines = [line.split() for line in table(results).splitlines()]
    assert lines[0] == ["a", *(word for step in range(2, 8) for word in ("step", str(step)))]
    assert lines[1] == ["x", *(f"{step / 3:.4f}" for step in range(2, 8))]
    assert lines[2] == ["y", *"-----", "1.0000"]
    assert lines[3:] == [[], ["c", "step", "2"], ["z", "0.5000"]]


def test_settings_are_plain_values():
    settings = describe(TaskEvaluation("passkey_words", 40, {"digits": 1, "filler": object()}))
    assert settings["type"] == "TaskEvaluation" and settings["length"] == 40
    assert settings["task_options"] == {"digits": 1, "filler": "object"}
    json.dumps(settings)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(checkpoints="newest"), "evaluate.checkpoints must be one of 'latest', 'all', 'wait'"),
        (dict(checkpoints="lates"), "not 'lates'. Did you mean latest?"),
        (dict(evaluations={}), "evaluate.evaluations must be a dict of at least one evaluation, such as"),
        (dict(evaluations=[Mean()]), "evaluate.evaluations must be a dict of at least one evaluation"),
        (dict(evaluations={"a/b": Mean()}), "'a/b' cannot be the name of an evaluation"),
        (dict(evaluations={"a": 3}), "evaluate.evaluations['a'] must be an evaluation, such as"),
        (dict(evaluations={"a": TaskEvaluation("passkey_wrods", 40)}), "The nearest name is 'passkey"),
        (dict(model=make_model(block_size=16, embed_dim=8)), "another model, differing in embed_dim"),
        (dict(output_dir="/proc/famx"), "Cannot write results to /proc/famx: "),
        (dict(checkpoint_path="/no/such"), "There is no checkpoint /no/such: /no/such is not"),
        (dict(checkpoint_path="{}/checkpoint_7"), "has no checkpoint of step 7; available steps: 1, 2."),
        (dict(checkpoint_path="{}/checkpoint_1", checkpoints="all"), "needs a MODEL_DIR, and"),
        (dict(checkpoint_path="{}/.."), "is not the directory of a trained model"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_a_sentence(model_dir, changes, sentence):
    settings = {"checkpoint_path": str(model_dir), "evaluations": {"mean": Mean()}, **changes}
    settings["checkpoint_path"] = settings["checkpoint_path"].format(model_dir)
    with pytest.raises(ConfigError) as caught:
        evaluate(**settings)
    assert sentence.format(model_dir) in str(caught.value)
    assert not (model_dir / "eval").exists()


def test_a_directory_without_checkpoints(model_dir):
    for step in (1, 2):
        shutil.rmtree(model_dir / f"checkpoint_{step}")
    for mode in ("latest", "all"):
        with pytest.raises(ConfigError, match=f"There is no checkpoint in {model_dir}."):
            evaluate(str(model_dir), {"mean": Mean()}, checkpoints=mode)


@pytest.mark.parametrize("stages, digits", [((), 1), (({"steps": 1}, {"options": {"digits": 2}}), 2)])
def test_passkey_is_that_of_the_last_stage_of_the_run(tmp_path, stages, digits):
    data = {"lengths": {"targets": 128}, "options": {"digits": 1, "header": False}}
    model = make_model(block_size=32)
    loop.train(make_run(model=model, model_dir=str(tmp_path), stages=stages, steps=2, **data))
    settings = result(tmp_path / "settings.json")["settings"]
    task = PasskeyTask(digits=digits, header=False)
    assert PasskeyEvaluation().of_run(settings, model).task == task
    assert PasskeyEvaluation(task).of_run({}, model).task is task
    seen = []
    counted = lambda self, *of_model: seen.append((self.task.digits, self.task.header)) or ({}, {})
    with unittest.mock.patch.object(PasskeyEvaluation, "_measure", counted):
        evaluate(str(tmp_path), {"of_run": PasskeyEvaluation()})
    assert seen == [(digits, False)]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"history": [], "settings": {"task": {"type": "own_text"}}}']
)
def test_passkey_is_the_papers_after_a_run_on_other_data(model_dir, content):
    (model_dir / "settings.json").write_text(content)
    with pytest.raises(ConfigError, match="statement of 5 digits"):
        evaluate(str(model_dir), {"passkey": PasskeyEvaluation()})


# ---------------------------------------------------------------- the main


def arguments(model_dir, *bindings):
    given = (
        f"CHECKPOINT_PATH='{model_dir}'",
        "EVALUATIONS={'passkey': @PasskeyEvaluation(), 'task': @TaskEvaluation()}",
        "PasskeyEvaluation.task=@PasskeyTask()",
        "PasskeyTask.digits=1",
        "PasskeyTask.header=False",
        "PasskeyEvaluation.blocks=(3,)",
        "PasskeyEvaluation.examples=4",
        "TaskEvaluation.task='passkey_words'",
        "TaskEvaluation.task_options={'digits': 1, 'header': False}",
        "TaskEvaluation.length=40",
        "TaskEvaluation.examples=2",
        *bindings,
    )
    return ["--gin_file=gin_configs/runs/eval.gin", *(f"--gin.{binding}" for binding in given)]


@pytest.fixture
def bad_input(monkeypatch, capsys):
    """A function that runs famx.eval in this process and returns its error sentence."""

    def forget():
        gin.clear_config()
        gin_config._IMPORTS.clear()
        for name in ("gin_file", "gin_bindings", "gin_search_paths"):
            if name in flags.FLAGS:
                flags.FLAGS[name].unparse()

    def call(*args):
        forget()
        monkeypatch.setattr(sys, "argv", ["eval", *args])
        with pytest.raises(SystemExit) as caught:
            gin_utils.run(eval_main.main, argument="gin_file")
        error = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in error, error
        last = error.strip().splitlines()[-1]
        assert last.startswith("famx: error: ") and "In call to" not in error
        return last.removeprefix("famx: error: ")

    yield call
    forget()


@pytest.mark.parametrize(
    "binding, sentence",
    [
        ("CHECKPOINTS='lates'", "Did you mean latest?"),
        ("EVALUATIONS={}", "EVALUATIONS must be a dict of at least one evaluation"),
        ("EVALUATIONS={'a': @PasskeyEvaluaton()}", "Did you mean PasskeyEvaluation?"),
        ("EVALUATIONS={'a': @PasskeyEvaluation()}", "The binding TaskEvaluation.task has no effect"),
        ("EVALUATIONS={'a': @PasskeyEvaluation}", "EVALUATIONS['a'] must be an evaluation, such as"),
        ("TaskEvaluation.task='passkey_wrods'", "The nearest name is 'passkey_words'"),
        ("TaskEvaluation.examples=0", "TaskEvaluation.examples must be a whole number of at least 1,"),
        ("PasskeyTask.digits=20", "does not fit into a block of 16"),
        ("CHECKPOINT_PATH='/no/such'", "There is no checkpoint /no/such"),
    ],
)
def test_bad_bindings(bad_input, model_dir, binding, sentence):
    assert sentence in bad_input(*arguments(model_dir, binding))


def test_short_names_stay_unambiguous_after_a_gin_file_has_used_them():
    program = """
import gin
from famx.evaluation import bindable
gin.parse_config("from __gin__ import dynamic_registration\\nfrom famx import evaluation\\n"
                 "evaluation.PasskeyEvaluation.examples = 3")
bindable.register()
gin.parse_config("EVALUATIONS = @PasskeyEvaluation()")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unset_path_or_a_stray_argument(bad_input):
    for files in ((), ("eval",), ("--gin_file=gin_configs/runs/eval.gin",)):
        assert bad_input(*files) == "CHECKPOINT_PATH is not set: add --gin.CHECKPOINT_PATH=/some/dir."
    assert bad_input("passkey_tny").startswith("There is no gin file passkey_tny. Did you mean passkey_")
    assert bad_input("eval", "--gin.RE_EVALUATE=True", "passkey") == (
        "Unknown argument passkey: settings are written --gin.NAME=VALUE."
    )


def start(*args):
    return start_process(
        [sys.executable, "-m", "famx.eval", *args], cwd=gin_utils.gin_root(), text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_the_main_beside_a_run_that_goes_on_writing(model_dir):
    process = start(*arguments(model_dir, "CHECKPOINTS='wait'", "STOP_AT_STEP=4", "TIMEOUT=60"))
    for line in process.stderr:
        if line.startswith("Checkpoint 2: task: "):
            break
    write(model_dir, 4)
    shown, text = process.communicate()
    assert process.returncode == 0 and "Traceback" not in text, text
    assert "Checkpoint 4 (3): passkey (1 of 2) ..." in text
    lines = [line.split() for line in shown.splitlines()]
    header = ["step", "1", "step", "2", "step", "4"]
    assert ["passkey", *header] in lines and ["task", *header] in lines
    rows = {line[0]: line[1:] for line in lines if line}
    assert {"hold/3", "memory/zeroed/hold/3", "memory/rms/update_1", "exact_match"} <= set(rows)
    for name in ("passkey", "task"):
        assert {p.name for p in (model_dir / "eval" / name).iterdir()} == {"1.json", "2.json", "4.json"}
    found = result(model_dir / "eval" / "passkey" / "4.json")
    assert rows["hold/3"][2] == f"{found['scalars']['hold/3']:.4f}"
    assert found["settings"]["task"]["digits"] == 1

    process = start(*arguments(model_dir, "CHECKPOINTS='wait'", "TIMEOUT=60"))
    for line in process.stderr:
        if line.startswith("Checkpoint 4: task has already been evaluated"):
            break
    process.send_signal(signal.SIGTERM)
    again, text = process.communicate(timeout=30)
    assert process.returncode == 0 and again == shown, text
    assert "Stopped. Run the same command to resume." in text
