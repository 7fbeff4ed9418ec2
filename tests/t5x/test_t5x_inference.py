"""Evaluation, inference and the interactive model of t5x, on a text task with inputs."""

import json
import types

import jax
import numpy as np
import pytest
from driving import dataset, make_optimizer, make_partitioner, run_t5x  # skips without t5x
from t5x import eval as t5x_eval
from t5x import infer, interactive_model, utils
from tiny import make_model

import famx.data
from famx import t5x as famx_t5x
from famx.model_dir.loading import load_model

pytestmark = [pytest.mark.slow, pytest.mark.t5x]
TASK, ROW = "scrolls_qasper", {"inputs": 7, "targets": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of training under t5x: the task, its options, and a MODEL_DIR."""
    tmp_path = tmp_path_factory.mktemp("trained")
    (tmp_path / "qasper").mkdir()
    for split, size in (("train", 9), ("validation", 3)):
        lines = [{"id": f"{i}", "pid": f"{i}", "input": f"Q{i}?", "output": f"a{i}"} for i in range(size)]
        (tmp_path / "qasper" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"data_dir": str(tmp_path)}
    name = famx_t5x.seqio_task(TASK, options)
    run_t5x(
        tmp_path / "run", 2, mixture_or_task_name=TASK, task_options=options,
        data=dataset(mixture_or_task_name=name),
    )  # fmt: skip
    return types.SimpleNamespace(name=name, options=options, run=str(tmp_path / "run"))


def restored(trained):
    """What t5x's mains need: the checkpoint's own model, and where it is."""
    model = famx_t5x.T5xModel(
        checkpoint=trained.run, mixture_or_task_name=TASK, task_options=trained.options)
    path = famx_t5x.latest_checkpoint(trained.run)
    return dict(
        model=model,
        restore_checkpoint_cfg=utils.RestoreCheckpointConfig(path=path, mode="specific"),
        partitioner=make_partitioner(),
        summarize_config_fn=lambda *args, **kwargs: None,
    )


def rows(trained, **changes):
    return dataset(
        mixture_or_task_name=trained.name, split="validation", shuffle=False, pack=False, batch_size=2,
        **{"task_feature_lengths": ROW, **changes},
    )  # fmt: skip


def test_every_mode_of_inference_gives_what_the_decoder_gives(trained, tmp_path):
    model = load_model(trained.run)
    vocabulary, apply = model.model.vocabulary, jax.jit(model.model.module.apply)
    length = sum(ROW.values())

    def log_p(tokens):
        """After each of `bos, *tokens`."""
        row = np.zeros((1, length + 1), np.int32)
        row[0, : len(tokens) + 1] = [vocabulary.bos_id, *tokens]
        return jax.nn.log_softmax(apply({"params": model.params}, row)[0][0].astype(np.float32))

    found = {}
    for mode in ("predict", "score", "predict_with_aux"):
        infer.infer(mode=mode, dataset_cfg=rows(trained), output_dir=str(tmp_path),
                    checkpoint_period=1, **restored(trained))  # fmt: skip
        path = tmp_path / f"{trained.name}-{mode}.jsonl-00000-of-00001"
        found[mode] = [json.loads(line) for line in path.read_text().splitlines()]
    examples = famx.data.get(TASK, **trained.options).examples("validation")
    for i, example in enumerate(examples):
        inputs = vocabulary.encode(example["inputs"])[: ROW["inputs"]]
        targets = [*vocabulary.encode(example["targets"]), vocabulary.eos_id]
        text, score = [], 0.0
        while len(text) < length - len(inputs) and vocabulary.eos_id not in text:
            last = log_p([*inputs, *text])[len(inputs) + len(text)]
            text.append(int(last.argmax()))
            score += float(last.max())
        both = log_p([*inputs, *targets])
        right = sum(float(both[len(inputs) + j, token]) for j, token in enumerate(targets))
        assert found["score"][i]["score"] == pytest.approx(right, rel=1e-4)
        prediction = vocabulary.decode(text)
        for mode in ("predict", "predict_with_aux"):
            assert found[mode][i]["inputs"]["inputs_pretokenized"] == example["inputs"]
            assert found[mode][i]["prediction"] == prediction
        assert found["predict_with_aux"][i]["aux"]["scores"] == pytest.approx(score, rel=1e-4)


def test_evaluation_logs_the_tasks_own_metrics(trained, tmp_path):
    seqio = pytest.importorskip("seqio")
    logged = []

    class Logger(seqio.Logger):
        def __call__(self, task_name, step, metrics, dataset, inferences, targets):
            logged.append((task_name, step, metrics, inferences))

    class Evaluator(seqio.Evaluator):
        def __init__(self, **kwargs):
            super().__init__(**{**kwargs, "logger_cls": [Logger]})

    t5x_eval.evaluate(
        dataset_cfg=rows(trained, task_feature_lengths=None), output_dir=str(tmp_path),
        inference_evaluator_cls=Evaluator, **restored(trained),
    )  # fmt: skip
    ((name, step, metrics, inferences),) = logged
    assert (name, step) == (trained.name, 2)
    task = famx.data.get(TASK, **trained.options)
    expected = task.evaluate("validation", inferences["prediction"])
    assert {key: value.value for key, value in metrics.items()} == pytest.approx(expected)


def test_the_interactive_model_trains_predicts_and_scores(trained, tmp_path):
    model = famx_t5x.T5xModel(
        make_model(), optimizer=make_optimizer(), mixture_or_task_name=TASK,
        task_options=trained.options,
    )  # fmt: skip
    interactive = interactive_model.InteractiveModel(
        batch_size=2, task_feature_lengths=ROW, output_dir=str(tmp_path / "out"),
        partitioner=make_partitioner(), model=model, dtype=None, restore_mode="specific",
        checkpoint_path="", input_shapes={"decoder_input_tokens": (2, sum(ROW.values()))},
    )  # fmt: skip
    examples = [{"input": "Q1?", "target": "a1"}, {"input": "Q2?", "target": "a2"}]
    interactive.train_step(examples)
    assert interactive.step == 1
    predictions, aux = interactive.predict_with_aux(examples)
    assert [x["targets_pretokenized"] for x, _ in predictions] == [b"a1", b"a2"]
    scores = [score for _, score in interactive.score(examples)]
    assert np.all(np.array([scores, aux["scores"]]) < 0)
    assert interactive.evaluate(examples, [count]) == {"count": 2}
    interactive.trainer.close()


def count(targets, predictions):
    return {"count": len(predictions)}
