"""Every setting of famx has a type and a range, which every main enforces before anything is built."""

import inspect
import os
import subprocess
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import optax
import pytest
from absl import flags
from configurables import FILES, clean, configurables, parse, refusal
from gin import config as gin_config

from famx import compile as compile_main
from famx import eval as eval_main
from famx import infer as infer_main
from famx import train as train_main
from famx.base import gin_utils
from famx.base.ranges import OneOf
from famx.base.schemas import UNIONS
from famx.base.values import SettingError, annotations, check
from famx.data.probes.passkey import PasskeyTask
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig
from famx.training.run import Data, Run

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(gin_utils.gin_root())}
FREE = {"decay_mask.params"}  # what no gin file sets
UNBOUNDED = {"Infini.gate_init"}  # numbers that may be negative
WRONG = {  # texts of gin, for each type of scalars, of values that only look like it
    int: ("4.0", "'4'", "True", "[4]", "{}", "-3"),
    float: ("'1e-3'", "True", "1e999", "[0.5]", "{}", "-3.0"),
    bool: ("1", "0.0", "'True'", "[True]"),
    str: ("4", "True", "['a']", "{'a': 'b'}"),
}


def parameters():
    for selector, target in configurables().items():
        for name, parameter in inspect.signature(target).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if not (target.__name__ == "Decoder" and name in ("parent", "name")):  # of flax
                    yield selector, target, parameter


def scalars(annotation: Any) -> set[Any] | None:
    """The types of scalars that an annotation allows, `None` among them; None: others, or choices."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return None if any(isinstance(item, OneOf) for item in args[1:]) else scalars(args[0])
    if origin in UNIONS:
        parts = [scalars(arg) for arg in args]
        return None if None in parts else set().union(*parts)
    if annotation in (int, float, bool, str, None, type(None)):
        return {type(None) if annotation is None else annotation}
    return None


def test_many_are_found():
    names = {target.__name__ for target in configurables().values()}
    assert {"Run", "Data", "DecoderConfig", "Fam", "infer", "evaluate", "PasskeyTask"} <= names
    assert len(names) >= 50 and len(list(parameters())) >= 350


def test_every_parameter_has_an_annotation():
    bare = [
        f"{target.__name__}.{parameter.name}" for _, target, parameter in parameters()
        if parameter.annotation in (parameter.empty, Any)
    ]  # fmt: skip
    assert set(bare) == FREE


def bounded(annotation: Any) -> bool:
    """Whether no number in an annotation is without a bound."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return args[0] in (int, float) and len(args) > 1 or bounded(args[0])
    if origin is Literal:
        return True
    return annotation not in (int, float) and all(map(bounded, args))


def test_every_number_has_a_range():
    wide = [
        f"{target.__name__}.{parameter.name}" for _, target, parameter in parameters()
        if not bounded(annotations(target).get(parameter.name))
        and "Callable" not in str(annotations(target)[parameter.name])
    ]  # fmt: skip
    assert set(wide) == UNBOUNDED


def test_a_value_of_a_wrong_type_is_refused_for_every_scalar_setting():
    refused = 0
    for selector, target, parameter in parameters():
        allowed = scalars(annotations(target).get(parameter.name))
        types = (allowed or set()) - {type(None)}
        if not types:
            continue
        wrong = set.intersection(*(set(WRONG[kind]) for kind in types)) - {"-3", "-3.0"}
        wrong |= {"-3"} if types == {int} else {"-3.0"} if types == {float} else set()
        wrong |= set() if type(None) in allowed else {"None"}
        for text in sorted(wrong):
            if f"{target.__name__}.{parameter.name}" in UNBOUNDED and text == "-3.0":
                continue
            sentence = refusal(f"{selector}.{parameter.name} = {text}")
            assert sentence is not None, (selector, parameter.name, text)
            assert sentence.startswith(f"{target.__name__}.{parameter.name} must be "), sentence
            sentence = refusal(f"{selector}.{parameter.name} = %SETTING", f"SETTING = {text}")
            assert sentence.startswith("SETTING must be ")
            refused += 1
        if types == {float}:
            with pytest.raises(SettingError):
                check("X", float("nan"), annotations(target)[parameter.name])
    assert refused > 1000


def test_every_default_is_allowed():
    for _, target, parameter in parameters():
        annotation = annotations(target).get(parameter.name)
        default = parameter.default
        if annotation is not None and default is not parameter.empty and "factory" not in repr(default):
            if not (target.__name__ == "TaskEvaluation" and parameter.name == "length"):
                check(f"{target.__name__}.{parameter.name}", default, annotation)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_value_of_a_shipped_file_is_allowed(path):
    with clean():
        parse(path)


# ---------------------------------------------------------------- the mains


def forget():
    gin_config.clear_config()
    gin_config._IMPORTS.clear()
    for name in ("gin_file", "gin_bindings", "gin_search_paths"):
        if name in flags.FLAGS:
            flags.FLAGS[name].unparse()


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """A function that runs a main in this process and returns its sentence; it must write nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/tmp/famx_tests_xla")

    def call(main, *args):
        forget()
        monkeypatch.setattr(sys, "argv", ["famx", *args])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            gin_utils.run(main.main, getattr(main, "define_flags", None), argument="gin_file")
        error = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in error and "In call to" not in error, error
        last = error.strip().splitlines()[-1]
        assert last.startswith("famx: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return last.removeprefix("famx: error: ")

    yield call
    forget()


PATH = "a path, such as '/some/path' or gs://bucket/name"
WHOLE = "a whole number of at least 1"
LENGTHS = "a dict of whole numbers by feature, such as {'targets': 128}"
TRAINING = [
    ("BATCH_SIZE=4.0", f"BATCH_SIZE must be {WHOLE}, not 4.0."),
    ("BATCH_SIZE='4'", f"BATCH_SIZE must be {WHOLE}, not '4'."),
    ("BATCH_SIZE=True", f"BATCH_SIZE must be {WHOLE}, not True."),
    ("BATCH_SIZE=0", f"BATCH_SIZE must be {WHOLE}, not 0."),
    ("BATCH_SIZE=None", f"BATCH_SIZE must be {WHOLE}, not None."),
    ("TASK_FEATURE_LENGTHS=128", f"TASK_FEATURE_LENGTHS must be {LENGTHS}, not 128."),
    ("TASK_FEATURE_LENGTHS={'targets': 128.0}",
     f"TASK_FEATURE_LENGTHS must be {LENGTHS}, not {{'targets': 128.0}}."),
    ("TASK_FEATURE_LENGTHS={'inputs': 128}", "TASK_FEATURE_LENGTHS must name a length for 'targets': "),
    ("TRAIN_STEPS='20'", f"TRAIN_STEPS must be {WHOLE} or None, not '20'."),
    ("TRAIN_STEPS=0", f"TRAIN_STEPS must be {WHOLE} or None, not 0."),
    ("TRAIN_STEPS=None", ""),
    ("MODEL_DIR=None", "MODEL_DIR is not set: training needs a directory for its checkpoints."),
    ("MODEL_DIR=''", "MODEL_DIR is an empty text: give a path, such as '/some/path'."),
    ("MODEL_DIR='s3://bucket/run'",
     "MODEL_DIR is the URL s3://bucket/run, and famx reads and writes files of gs:// and mounted"),
    ("MODEL_DIR='gs://bucket'",
     "MODEL_DIR is gs://bucket, which is no directory of a bucket: write it as gs://bucket/name."),
    ("MODEL_DIR=3", f"MODEL_DIR must be {PATH}, or None, not 3."),
    ("MIXTURE_OR_TASK_NAME=5", "MIXTURE_OR_TASK_NAME must be the name of a task, or an object, not 5."),
    ("LEARNING_RATE='1e-3'", "LEARNING_RATE must be a number above 0, or a schedule such as"
     " @schedules.warmup_cosine(), not '1e-3'."),
    ("LEARNING_RATE=0", "LEARNING_RATE must be a number above 0, or a schedule such as"),
    ("LEARNING_RATE=1e999", "LEARNING_RATE must be a number above 0, or a schedule such as"),
    ("RANDOM_SEED=1.5", "RANDOM_SEED must be a whole number of at least 0, not 1.5."),
    ("RANDOM_SEED=-1", "RANDOM_SEED must be a whole number of at least 0, not -1."),
    ("OPTIMIZER='adamw'", "OPTIMIZER must be an optimiser such as @optimizers.adamw(), not 'adamw'."),
    ("OPTIMIZER=@adamw", "OPTIMIZER must be an optimiser such as @optimizers.adamw(), not @"),
    ("MODEL=@Decoder()", "MODEL must be a DecoderModel (@DecoderModel() makes one), not @"),
    ("STATE_PASSING='agd'",
     "STATE_PASSING must be one of 'none', 'random', 'continuous', 'aged', not 'agd'."
     " Did you mean aged?"),
    ("XLA_OPTIONS=True", "XLA_OPTIONS must be one of 'default', 'overlap', 'graphs', not True."),
    ("TASK_OPTIONS=5",
     "TASK_OPTIONS must be a dict of options of the task, such as {'vocabulary': 'bytes'}"),
    ("TASK_OPTIONS={'digits': 2.0}", f"TASK_OPTIONS['digits'] must be {WHOLE}, not 2.0."),
    ("TASK_OPTIONS={'filler': 'repeatd'}", "TASK_OPTIONS['filler'] must be one of 'repeated', "),
    ("TASK_OPTIONS={'vocabulary': 3}", "TASK_OPTIONS['vocabulary'] must be 'bytes', the directory of a"),
    ("STAGES={'steps': 10}", "STAGES must be a tuple of dicts, one for each stage, such as"),
    ("STAGES=({'steps': 10.0}, {})",
     f"STAGES[0]['steps'] must be {WHOLE} or a number above 0 and below 1, not 10.0."),
    ("STAGES=({'steps': 10}, {'curriculum': {'newest': 2}})",
     "STAGES[1]['curriculum']['newest'] must be a number from 0 to 1, not 2."),
    ("STAGES=({'steps': 10}, {'bloks': 2})", "STAGES[1] has no 'bloks'; choose from steps, "),
    ("DecoderConfig.num_layers=2.0", f"DecoderConfig.num_layers must be {WHOLE}, not 2.0."),
    ("DecoderConfig.rope_layers=('global', 'lokal')",
     "DecoderConfig.rope_layers[1] must be one of 'global', 'local', 'none', not 'lokal'."),
    ("DecoderConfig.memory='fam'",
     "DecoderConfig.memory must be a Memory (@Memory() makes one), not 'fam'."),
    ("Fam.length=8.0", "Fam.length must be a whole number of at least 1 (for none set"),
    ("run.Every.checkpoint=0", f"Every.checkpoint must be {WHOLE}, not 0."),
    ("run.Run.checkpoints_to_keep=0", f"Run.checkpoints_to_keep must be {WHOLE} or None, not 0."),
    ("run.Run.checkpoints_to_keep=-1", f"Run.checkpoints_to_keep must be {WHOLE} or None, not -1."),
    ("run.Run.microbatches=0", f"Run.microbatches must be {WHOLE}, not 0."),
    ("run.Run.minutes='5'", "Run.minutes must be a number of at least 0 or None, not '5'."),
    ("optimizers.adamw.weight_decay='0.1'",
     "adamw.weight_decay must be a number of at least 0, not '0.1'."),
    ("optimizers.adamw.b1=1", "adamw.b1 must be a number of at least 0 and below 1, not 1."),
    ("PasskeyEvaluation.blocks=4",
     "PasskeyEvaluation.blocks must be a tuple or list of whole numbers of"),
    ("PasskeyEvaluation.examples=4.5", f"PasskeyEvaluation.examples must be {WHOLE}, not 4.5."),
    ("warmup_stable_decay.warmup_steps=1.5",
     "warmup_stable_decay.warmup_steps must be a whole number of"),
]  # fmt: skip


@pytest.mark.parametrize("binding, sentence", TRAINING, ids=[binding for binding, _ in TRAINING])
def test_train_refuses_in_a_sentence(refused, tmp_path, binding, sentence):
    args = [f"--gin.MODEL_DIR='{tmp_path}/run'", f"--gin.{binding}"]
    args = ["--gin_file=gin_configs/examples/passkey_aged.gin", *args]
    assert refused(train_main, *args).startswith(sentence)


@pytest.mark.slow
def test_train_as_a_user_runs_it(tmp_path):
    args = [f"--gin.MODEL_DIR='{tmp_path}/run'", "--gin.BATCH_SIZE=4.0"]
    command = [sys.executable, "-m", "famx", "train", "--gin_file=gin_configs/examples/passkey_aged.gin"]
    result = subprocess.run(
        [*command, *args], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"famx: error: BATCH_SIZE must be {WHOLE}, not 4.0.\n"
    assert not list(tmp_path.iterdir())


def test_a_run_takes_a_directory_below_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = DecoderConfig(vocab_size=128, num_layers=1, embed_dim=8, num_heads=2)
    model, data = DecoderModel(Decoder(config)), Data("passkey_words", {"targets": 64}, batch_size=2)
    run = Run(model, data, optax.sgd(0.1), steps=1, model_dir="~/runs/x")
    assert run.model_dir == "/home/me/runs/x"


def test_options_of_a_task_that_is_an_object_are_checked():
    data = Data(PasskeyTask(), {"targets": 64}, batch_size=2, options={"digits": 2.0})
    with pytest.raises(SettingError, match=r"TASK_OPTIONS\['digits'\] must be a whole number"):
        data.make_task()


@pytest.mark.parametrize("binding, sentence", [
    ("BATCH_SIZE=4.0", f"BATCH_SIZE must be {WHOLE}, not 4.0."),
    ("DecoderConfig.num_layers='2'", f"DecoderConfig.num_layers must be {WHOLE}, not '2'."),
    ("make_mesh.fsdp=0",
     "make_mesh.fsdp must be a whole number of at least 1, or -1 for the rest, not 0."),
    ("make_rules.preset='fdsp'", "make_rules.preset must be one of 'data', 'fsdp', 'fsdp_tensor', not"),
])  # fmt: skip
def test_compile_refuses_in_a_sentence(refused, binding, sentence):
    args = ["--gin_file=gin_configs/examples/pretrain_1b.gin", "--topology=cpu:1", f"--gin.{binding}"]
    assert refused(compile_main, *args).startswith(sentence)


INFERENCE = [
    ("BATCH_SIZE=4.0", f"BATCH_SIZE must be {WHOLE}, not 4.0."),
    ("NUM_SAMPLES='2'", f"NUM_SAMPLES must be {WHOLE}, not '2'."),
    ("TEMPERATURE='0.5'", "TEMPERATURE must be a number of at least 0, not '0.5'."),
    ("TOP_P=0", "TOP_P must be a number above 0 and at most 1, not 0."),
    ("TOP_K=2.0", f"TOP_K must be {WHOLE} or None, not 2.0."),
    ("STOP_TOKENS=5", "STOP_TOKENS must be a tuple or list of whole numbers of at least 0, not 5."),
    ("STOP_TOKENS=('</s>',)", "STOP_TOKENS[0] must be a whole number of at least 0, not '</s>'."),
    ("MAX_NEW_TOKENS=None", f"MAX_NEW_TOKENS must be {WHOLE}, not None."),
    ("CHAT_TEMPLATE='yes'", "CHAT_TEMPLATE must be True or False, not 'yes'."),
    ("MODE='scor'",
     "MODE must be one of 'predict', 'predict_with_aux', 'score', not 'scor'. Did you mean"),
    ("RANDOM_SEED=-1", "RANDOM_SEED must be a whole number of at least 0, not -1."),
    ("CHECKPOINT_PATH=None", f"CHECKPOINT_PATH must be {PATH}, not None."),
    ("INPUT_FILE=['a.jsonl']", "INPUT_FILE must be a path, such as '/some/path', not ['a.jsonl']."),
    ("OUTPUT_FILE='gs://b/out.jsonl'",
     "OUTPUT_FILE is the URL gs://b/out.jsonl, and famx reads and writes"),
    ("ADAPTER=3", f"ADAPTER must be {PATH}, or None, not 3."),
]


@pytest.mark.parametrize("binding, sentence", INFERENCE, ids=[binding for binding, _ in INFERENCE])
def test_infer_refuses_in_a_sentence(refused, tmp_path, binding, sentence):
    paths = {"CHECKPOINT_PATH": "model", "INPUT_FILE": "in.jsonl", "OUTPUT_FILE": "out.jsonl"}
    args = [f"--gin.{name}='{tmp_path / path}'" for name, path in paths.items()]
    args = ["--gin_file=gin_configs/runs/infer.gin", *args, f"--gin.{binding}"]
    assert refused(infer_main, *args).startswith(sentence)


EVALUATION = [
    ("EVALUATIONS={}", "EVALUATIONS must be a dict of at least one evaluation, such as"),
    ("EVALUATIONS=@PasskeyEvaluation()",
     "EVALUATIONS must be a dict of at least one evaluation, such as"),
    ("EVALUATIONS={'a': 'passkey'}",
     "EVALUATIONS['a'] must be an evaluation, such as @PasskeyEvaluation()"),
    ("EVALUATIONS={'a': @PasskeyEvaluation}", "EVALUATIONS['a'] must be an evaluation, such as"),
    ("EVALUATIONS={5: @PasskeyEvaluation()}",
     "EVALUATIONS must be a dict of at least one evaluation, such as"),
    ("CHECKPOINTS='lates'",
     "CHECKPOINTS must be one of 'latest', 'all', 'wait', not 'lates'. Did you mean"),
    ("STOP_AT_STEP='5'", "STOP_AT_STEP must be a whole number of at least 0 or None, not '5'."),
    ("TIMEOUT='1h'", "TIMEOUT must be a number of at least 0, not '1h'."),
    ("RE_EVALUATE=1", "RE_EVALUATE must be True or False, not 1."),
    ("EVAL_OUTPUT_DIR=5", f"EVAL_OUTPUT_DIR must be {PATH}, or None, not 5."),
    ("MODEL='model'", "MODEL must be a DecoderModel (@DecoderModel() makes one) or None, not 'model'."),
    ("PasskeyEvaluation.probes=('hld',)", "PasskeyEvaluation.probes[0] must be one of 'hold', "),
    ("PasskeyTask.digits=2.0", f"PasskeyTask.digits must be {WHOLE}, not 2.0."),
    ("TextFiles.files=5", "TextFiles.files must be a path or glob pattern, such as"),
]


@pytest.mark.parametrize("binding, sentence", EVALUATION, ids=[binding for binding, _ in EVALUATION])
def test_eval_refuses_in_a_sentence(refused, tmp_path, binding, sentence):
    args = [
        "--gin_file=gin_configs/runs/eval.gin",
        f"--gin.CHECKPOINT_PATH='{tmp_path / 'model'}'",
        "--gin.EVALUATIONS={'passkey': @PasskeyEvaluation()}",
        f"--gin.{binding}",
    ]
    assert refused(eval_main, *args).startswith(sentence)
