"""A SeqIO task of one's own under t5x: shuffled, with T5's vocabulary, registered in its own module."""

import functools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf
from driving import dataset, make_optimizer, make_partitioner, run_ours, run_t5x
from own_seqio import MODULE, NAME, own_folder, own_module
from t5x import eval as t5x_eval
from t5x import infer, utils
from tiny import make_model, make_params
from trained import write_model_dir

from famx import t5x as famx_t5x
from famx.base.errors import ConfigError
from famx.data.seqio import from_seqio_vocabulary, register_text_task
from famx.data.seqio_cache import cache
from famx.data.tasks import registry
from famx.data.vocabularies import ByT5Vocabulary, ByteVocabulary, load_vocabulary, save_vocabulary
from famx.decoding import Sampling

pytestmark = pytest.mark.t5x
ROW = {"inputs": 10, "targets": 6}
OF_OWN = {"mixture_or_task_name": NAME, "task_feature_lengths": ROW}


def rows(name=NAME, **changes):
    """The first two batches of a training under t5x."""
    cfg = dataset(**{"mixture_or_task_name": name, "task_feature_lengths": {"targets": 32}, **changes})
    model = famx_t5x.T5xModel(make_model(), mixture_or_task_name=name)
    data = famx_t5x.get_dataset(cfg, 0, 1, model.FEATURE_CONVERTER_CLS, model=model)
    return [next(data) for _ in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps in one go; then the same with a stop in between; their losses, and ours."""
    own_module()
    folder = tmp_path_factory.mktemp("own")
    settings = dict(mixture_or_task_name=NAME, task_options={}, data=dataset(**OF_OWN))
    whole = run_t5x(folder / "whole", 4, **settings).losses
    first = run_t5x(folder / "cut", 2, **settings).losses
    second = run_t5x(folder / "cut", 4, **settings).losses
    ours = run_ours(folder / "ours", 4, task=NAME, options={}, lengths=ROW, packed=True)
    return folder, whole, {**first, **second}, ours


@pytest.mark.slow
def test_a_shuffled_task_is_read_in_the_same_order_after_a_resume_and_by_either_engine(trained):
    folder, whole, cut, ours = trained
    assert sorted(whole) == [1, 2, 3, 4] and cut == whole
    np.testing.assert_allclose([whole[i] for i in ours], list(ours.values()), rtol=1e-5)
    expected = from_seqio_vocabulary(own_module().VOCABULARY)
    assert load_vocabulary(folder / "cut") == load_vocabulary(folder / "ours") == expected


def of_checkpoint(folder, **options):
    """What t5x's commands need to read the run `folder`."""
    checkpoint = str(folder)
    model = famx_t5x.T5xModel(checkpoint=checkpoint, mixture_or_task_name=NAME, **options)
    return dict(
        model=model,
        dataset_cfg=dataset(
            **OF_OWN, split="validation", shuffle=False, pack=False, trim_output_features=True
        ),
        restore_checkpoint_cfg=utils.RestoreCheckpointConfig(
            path=famx_t5x.latest_checkpoint(checkpoint), mode="specific"
        ),
        partitioner=make_partitioner(),
        summarize_config_fn=lambda *args, **kwargs: None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["whole", "ours"])
def test_the_task_that_a_model_was_trained_on_is_evaluated(trained, tmp_path, engine):
    settings = of_checkpoint(trained[0] / engine)
    evaluator = functools.partial(seqio.Evaluator, logger_cls=[seqio.JSONLogger])
    (tmp_path / "inference_eval").mkdir()  # in the commands TensorBoard's logger makes it
    t5x_eval.evaluate(output_dir=str(tmp_path), inference_evaluator_cls=evaluator, **settings)
    (metrics,) = tmp_path.glob(f"**/{NAME}-metrics.jsonl")
    assert json.loads(metrics.read_text())["exact"] >= 0


@pytest.mark.slow
def test_all_samples_of_a_prompt_are_written_the_likeliest_last(trained, tmp_path):
    settings = of_checkpoint(
        trained[0] / "whole", sampling=Sampling(temperature=1.0), num_decodes=3, return_all_decodes=True
    )
    infer.infer(mode="predict_with_aux", output_dir=str(tmp_path), checkpoint_period=1, **settings)
    (path,) = tmp_path.glob("*predict_with_aux.jsonl-00000-of-00001")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        scores = line["aux"]["scores"]
        assert len(line["prediction"]) == len(scores) == 3 and scores == sorted(scores)
    assert len({text for line in lines for text in line["prediction"]}) > 3


def test_another_vocabulary_than_that_of_the_checkpoint_or_of_model_dir_gets_a_sentence(tmp_path):
    own_module()
    model = make_model(vocabulary=ByteVocabulary())
    write_model_dir(tmp_path / "bytes", model, make_params(model.module), model.vocabulary)
    settings = dict(mixture_or_task_name=NAME, optimizer=make_optimizer())
    with pytest.raises(ConfigError, match="is not that of the model"):
        famx_t5x.T5xModel(make_model(), checkpoint=str(tmp_path / "bytes"), **settings)
    with pytest.raises(ConfigError, match="another vocabulary than the task's"):
        famx_t5x.T5xModel(make_model(), model_dir=str(tmp_path / "bytes"), **settings)
    famx_t5x.T5xModel(make_model(), model_dir=str(tmp_path / "own"), **settings)
    assert load_vocabulary(tmp_path / "own") == from_seqio_vocabulary(own_module().VOCABULARY)
    famx_t5x.T5xModel(make_model(), model_dir=str(tmp_path / "own"), **settings)


@pytest.mark.parametrize("vocabulary", [seqio.ByteVocabulary(), seqio.PassThroughVocabulary(260)])
def test_vocabularies_without_bos_give_rows_that_begin_with_eos_or_padding(vocabulary, tmp_path):
    name = f"t5x_own_{type(vocabulary).__name__}"
    if isinstance(vocabulary, seqio.ByteVocabulary):
        own_module().register(name, vocabulary)
    else:
        ids = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[7, 8, 9], [5, 6]]))
        read = lambda split, shuffle_files, seed=None: ids.map(lambda x: {"targets": x})
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(read, splits=("train",)),
            preprocessors=[],
            output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
        )
    for batch in rows(name, pack=False):
        assert np.all(batch["decoder_input_tokens"][:, 0] == (vocabulary.eos_id or 0))
        assert batch["decoder_loss_weights"].sum(axis=1).min() >= 2
    famx_t5x.T5xModel(make_model(), name, optimizer=make_optimizer(), model_dir=str(tmp_path / "run"))
    saved = isinstance(vocabulary, seqio.ByteVocabulary)
    assert (tmp_path / "run" / "vocabulary.json").exists() == saved


def test_a_module_that_registers_tasks_is_imported_first():
    own_folder()
    assert famx_t5x.seqio_task(NAME, module=MODULE) == NAME
    model = famx_t5x.T5xModel(make_model(), NAME, task_module=MODULE)
    cfg = dataset(**OF_OWN, module=MODULE)
    batch = next(famx_t5x.get_dataset(cfg, 0, 1, model.FEATURE_CONVERTER_CLS))
    assert batch["decoder_input_tokens"].shape == (4, 16) and batch["decoder_input_tokens"].min() >= 0
    for call in (famx_t5x.seqio_task, functools.partial(famx_t5x.T5xModel, make_model())):
        with pytest.raises(ConfigError, match="MIXTURE_OR_TASK_MODULE 'no_such' cannot be imported"):
            call(NAME, **{"module" if call is famx_t5x.seqio_task else "task_module": "no_such"})


def write_questions(folder):
    """Files of `scrolls_qasper`: "a10?" to "a17?" to train on, "b10?" and so on to validate."""
    (folder / "qasper").mkdir()
    for split, letter in (("train", "a"), ("validation", "b")):
        texts = {f"{i}": {"input": f"{letter}{i}?", "output": letter} for i in range(10, 18)}
        lines = [{"id": i, "pid": i, **text} for i, text in texts.items()]
        (folder / "qasper" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_the_split_the_order_and_the_length_of_inputs_are_those_asked_for(tmp_path):
    write_questions(tmp_path)
    options = {"data_dir": str(tmp_path)}
    task = registry.get("scrolls_qasper", **options)
    model = famx_t5x.T5xModel(make_model(), "scrolls_qasper", options)

    def first(**changes):
        lengths = {"inputs": 20, "targets": 12}
        cfg = dataset(mixture_or_task_name="scrolls_qasper", task_feature_lengths=lengths, **changes)
        data = famx_t5x.get_dataset(
            cfg, 0, 1, model.FEATURE_CONVERTER_CLS, model=make_model(), options=options
        )
        return next(data)["decoder_target_tokens"]

    shuffled, ordered = first(), first(shuffle=False)
    other = first(split="validation")
    assert shuffled.shape == ordered.shape == other.shape == (4, 32)
    text = lambda row: task.vocab.decode(row)
    assert text(ordered[0]).index("a10?") < text(ordered[0]).index("a11?")
    assert "a1" in text(shuffled[0]) and not np.array_equal(shuffled, ordered)
    assert "b1" in text(other[0]) and "a1" not in text(other[0])


def test_a_cache_with_options_gets_a_sentence():
    cfg = dataset(use_cached=True, mixture_or_task_name="own_text")
    options = {"files": __file__}
    with pytest.raises(ConfigError, match="reads 'own_text' as it was cached, whatever files says"):
        famx_t5x.get_dataset(cfg, 0, 1, None, model=make_model(), options=options)


def test_a_cache_of_another_vocabulary_gets_a_sentence_and_its_own_is_read(tmp_path):
    options = {"data_dir": str(tmp_path)}
    write_questions(tmp_path)
    task = registry.get("scrolls_qasper", **options)
    register_text_task(task, "own_cached", decoder_only=True)
    cache(seqio.get_mixture_or_task("own_cached"), str(tmp_path / "cache"), message=str)
    before = list(seqio.get_global_cache_dirs())
    seqio.add_global_cache_dirs([str(tmp_path / "cache")])
    try:
        (batch, _) = rows("own_cached", use_cached=True)
        assert "a1" in task.vocab.decode(batch["decoder_target_tokens"][0])
        save_vocabulary(ByT5Vocabulary(), tmp_path / "cache" / "own_cached")
        with pytest.raises(ConfigError, match="ids of another vocabulary than that of 'own_cached'"):
            rows("own_cached", use_cached=True)
    finally:
        seqio.set_global_cache_dirs(before)
