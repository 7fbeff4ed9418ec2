"""The parts of `famx.t5x`: axes, rules, optimizer states, data positions, and what is refused."""

import json

import jax
import numpy as np
import optax
import pytest
import seqio
import tensorflow as tf
from driving import BATCH, LENGTH, OPTIONS, TASK, dataset, make_optimizer  # skips without t5x
from flax.traverse_util import flatten_dict
from t5x import adafactor as t5x_adafactor
from t5x import metrics as t5x_metrics
from t5x import optimizers as t5x_optimizers
from t5x.train_state import FlaxOptimTrainState
from tiny import assert_identical, make_model, make_params
from trained import write_model_dir

from famx import t5x as famx_t5x
from famx.base.errors import ConfigError
from famx.data.seqio import as_seqio_vocabulary
from famx.data.tasks import registry
from famx.lora import Lora
from famx.mesh import LOGICAL_AXES
from famx.t5x.data import FeedIterator
from famx.t5x.metrics import as_t5x
from famx.t5x.optimizers import with_factor_rules
from famx.training.feeds import DatasetFeed, IndexedFeed, fresh_feed
from famx.training.source import Source
from famx.training.state_passing import Aged, Random
from famx.training.trainable import Trainable

pytestmark = pytest.mark.t5x
SHAPES = {"decoder_input_tokens": (BATCH, LENGTH)}


def axes_of(optimizer, **options):
    """Path -> logical axes of what t5x keeps in training."""
    model = make_model(lora=Lora(rank=2))
    model = famx_t5x.T5xModel(model, optimizer=optimizer, **options)
    make = lambda: FlaxOptimTrainState.create(
        model.optimizer_def, model.get_initial_variables(jax.random.key(0), SHAPES)
    )
    state = jax.eval_shape(make)
    flat = lambda tree: flatten_dict(tree, sep="/")
    shapes, axes = flat(state.state_dict()), flat(state.as_logical_axes().state_dict())
    assert shapes.keys() == axes.keys()
    for path, names in axes.items():
        assert names is None or len(names) == len(shapes[path].shape), path
    return axes, shapes


@pytest.mark.parametrize("trainable", ["all", "lora", "layers/query/.*"])
def test_moments_are_cut_as_their_parameters(trainable):
    axes, _ = axes_of(make_optimizer("adamw"), trainable=Trainable(trainable), state_passing=Random())
    assert tuple(axes["target/layers/query/kernel"]) == ("layers", "embed", "heads", "kv")
    assert tuple(axes["target/embedding"]) == ("vocab", "embed")
    assert tuple(axes["flax_mutables/state_passing/memory"]) == ("layers", "memory", "embed")
    moments = {path.partition("/mu/")[2]: names for path, names in axes.items() if "/mu/" in path}
    assert moments and all(names == axes[f"target/{path}"] for path, names in moments.items())
    learns = {"all": "layers/output/kernel", "lora": "layers/query/lora_b"}
    assert learns.get(trainable, "layers/query/kernel") in moments
    assert ("embedding" in moments) == (trainable == "all")


def test_factored_moments_have_axes_where_they_are_whole():
    axes, shapes = axes_of(make_optimizer("adafactor"))
    assert axes["state/param_states/1/v/final_norm/scale"] == axes["target/final_norm/scale"]
    factored = "state/param_states/1/v_row/layers/query/kernel"
    assert axes[factored] is None and len(shapes[factored].shape) == 3
    assert axes["state/param_states/1/v/layers/query/kernel"] is None  # a placeholder


def kernels(params):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "kernel" in str(path), params)


MASKED = optax.masked(optax.adafactor(1.0), kernels)


@pytest.mark.parametrize("optimizer", [optax.lion(1.0), optax.adafactor(1.0), MASKED, optax.sgd(1, 0.9)])
def test_other_transformations_are_known_too(optimizer):
    axes_of(optimizer, trainable=Trainable("lora"))


def test_an_optimizer_of_t5x_is_taken_as_it_is():
    optimizer = t5x_optimizers.adamw(0.1)
    assert famx_t5x.T5xModel(make_model(), optimizer=optimizer).optimizer_def is optimizer


def test_adafactor_of_t5x_factors_every_parameter_that_has_two_sides():
    optimizer = t5x_adafactor.Adafactor(0.1)
    axes, shapes = axes_of(optimizer, trainable=Trainable("lora"))
    assert optimizer.hyper_params.logical_factor_rules is None  # a copy has them
    sides = lambda path: {
        name: shapes[f"state/param_states/{path}/{name}"].shape for name in ("v_row", "v_col", "v")
    }
    assert sides("layers/key/kernel") == {"v_row": (1, 16), "v_col": (1, 2, 8), "v": (1,)}
    assert sides("layers/output/kernel") == {"v_row": (1, 16), "v_col": (1, 2, 8), "v": (1,)}
    assert sides("layers/mlp/up/lora_a") == {"v_row": (1, 16), "v_col": (1, 2), "v": (1,)}
    assert sides("layers/mlp_norm/scale")["v"] == (1, 16)
    path = "layers/mlp_norm/scale"
    assert axes[f"state/param_states/{path}/v"] == axes[f"target/{path}"]


def test_rules_of_an_adafactor_win_and_one_with_a_map_stays_as_it_is():
    column = t5x_adafactor.FactorDim.COLUMN
    given = t5x_adafactor.Adafactor(0.1, logical_factor_rules={"embed": column})
    rules = with_factor_rules(given).hyper_params.logical_factor_rules
    assert rules["embed"] is column and {*LOGICAL_AXES} <= {*rules}
    for settings in ({"factored": False}, {"factor_map": t5x_adafactor.HParamMap([(".*", None)])}):
        left = t5x_adafactor.Adafactor(0.1, **settings)
        assert with_factor_rules(left) is left


def test_the_logged_learning_rate_is_the_optimizers():
    assert famx_t5x.learning_rate_fn(0.25)(7) == 0.25
    assert famx_t5x.learning_rate_fn(lambda step: 2 * step)(7) == 14


def test_parameters_begin_as_in_our_engine():
    ours = make_model().init_params(jax.random.key(3))
    model = famx_t5x.T5xModel(make_model(), random_seed=3)
    theirs = model.get_initial_variables(jax.random.key(99), SHAPES)["params"]
    assert_identical(jax.tree.leaves(ours), jax.tree.leaves(theirs))


def test_evaluation_reads_the_kept_memory_without_a_change():
    model = famx_t5x.T5xModel(make_model(), state_passing=Random(1.0), random_seed=0)
    variables = model.get_initial_variables(None, SHAPES)
    kept = {"state_passing": variables["state_passing"]}
    batch = registry.get(TASK, **OPTIONS).batch(range(BATCH), LENGTH)
    batch = {k: v for k, v in batch.items() if k.startswith("decoder")}
    loss, metrics = model.eval_fn(variables["params"], batch, kept)
    plain = make_model().loss(variables["params"], batch)[0]
    assert loss == plain and metrics["loss"].count > 0


def test_metrics_of_the_speed_are_t5xs():
    found = as_t5x({}, np.zeros((4, 32), np.int32))
    merged = {name: value.merge(value) for name, value in found.items()}
    merged = t5x_metrics.set_time_metrics_duration(merged, 2.0)
    merged = t5x_metrics.set_step_metrics_num_steps(merged, 2)
    values = {name.removeprefix("timing/"): float(x.compute()) for name, x in merged.items()}
    devices = jax.device_count()
    assert values == pytest.approx({
        "seconds": 2, "seqs": 8, "steps_per_second": 1, "seqs_per_second": 4,
        "seqs_per_second_per_core": 4 / devices, "target_tokens_per_second": 128,
        "target_tokens_per_second_per_core": 128 / devices,
    })  # fmt: skip


def test_rules_cut_our_axes_and_keep_what_may_be_whole():
    rules = dict(famx_t5x.logical_axis_rules())
    assert rules["batch"] == "data" and rules["embed"] is None and rules["memory"] is None
    assert {rules[name] for name in ("heads", "kv_heads", "mlp", "vocab")} == {"model"}
    rules = dict(famx_t5x.logical_axis_rules(may_replicate=("kv_heads", "heads")))
    assert rules["heads"] is rules["kv_heads"] is None and rules["mlp"] == "model"
    both = famx_t5x.logical_axis_rules(2, 2)
    assert ("embed", "model") in both and ("embed", "data") in both
    with pytest.raises(ConfigError, match="no logical axis named 'head'"):
        famx_t5x.logical_axis_rules(may_replicate=("head",))


def make_iterator():
    return FeedIterator(IndexedFeed(Source(registry.get(TASK, **OPTIONS), BATCH, LENGTH, 8)))


def test_the_position_is_that_of_the_checkpoint_though_a_batch_was_looked_at(tmp_path):
    make = lambda: tf.data.Dataset.range(50).shuffle(50, seed=1).map(lambda i: {"x": i[None]})
    numbers = [int(row["x"][0]) for row in make().as_numpy_iterator()]
    iterator = FeedIterator(DatasetFeed(make))
    assert iterator.element_spec["x"].shape == (1,)
    assert [int(next(iterator)["x"][0]) for _ in range(4)] == numbers[:4]
    for step in (3, 4):  # 3: t5x has looked one batch ahead
        folder = tmp_path / f"checkpoint_{step}.orbax-checkpoint-tmp" / "dataset"
        folder.mkdir(parents=True)
        iterator.save(str(folder / "train_ds-000-of-001"))
        assert json.loads((folder / "metadata").read_text())["feed"] == {"batches": step}
        again = FeedIterator(DatasetFeed(make))
        again.restore(str(folder / "train_ds-000-of-001"))
        assert int(next(again)["x"][0]) == numbers[step]
    iterator.reset()
    assert int(next(iterator)["x"][0]) == numbers[0]
    folder = folder / "process_0-of-2"  # where each of several processes saves its own
    folder.mkdir()
    iterator.save(str(folder / "train_ds-000-of-002"))
    assert json.loads((folder.parent / "metadata").read_text())["feed"] == {"batches": 1}


def test_a_position_of_our_engine_is_read_and_steps_give_the_rows(tmp_path):
    folder = tmp_path / "checkpoint_5" / "dataset"
    folder.mkdir(parents=True)
    text = json.dumps({"feed": {"curriculum": {"stage": 0, "level": 0.0}}, "pending": [[4, {}]]})
    (folder / "metadata").write_text(text)
    iterator = make_iterator()
    iterator.restore(str(folder / "train_ds-000-of-001"))
    expected = registry.get(TASK, **OPTIONS).batch(range(5 * BATCH, 6 * BATCH), LENGTH)
    batch = next(iterator)
    assert batch.keys() == expected.keys() - {"answer"}
    np.testing.assert_array_equal(batch["decoder_input_tokens"], expected["decoder_input_tokens"])


def test_texts_are_packed_as_in_our_engine_and_the_position_is_saved(tmp_path):
    (tmp_path / "a.txt").write_text("A text of some length. " * 50)
    options = {"files": str(tmp_path / "a.txt")}
    cfg = dataset(mixture_or_task_name="own_text")
    theirs = famx_t5x.get_dataset(cfg, 0, 1, None, model=make_model(), options=options)
    documents = registry.get("own_text", **options)
    ours = fresh_feed(Source(documents, BATCH, LENGTH, make_model().config.block_size))
    for step in range(3):
        assert_identical(next(theirs), ours.next(step).batch)
    folder = tmp_path / "checkpoint_3" / "dataset"
    folder.mkdir(parents=True)
    theirs.save(str(folder / "train_ds-000-of-001"))
    assert json.loads((folder / "metadata").read_text())["feed"] == ours.get_state()


def test_any_task_of_seqios_is_read_through_t5xs_own_pipeline():
    name = famx_t5x.seqio_task(TASK, OPTIONS)
    assert name.startswith(f"{TASK}_") and name == famx_t5x.seqio_task(TASK, dict(OPTIONS))
    assert name != famx_t5x.seqio_task(TASK, {**OPTIONS, "digits": 2})
    model = famx_t5x.T5xModel(make_model(), mixture_or_task_name=name)
    theirs, ours = (
        famx_t5x.get_dataset(dataset(mixture_or_task_name=one), 0, 1, model.FEATURE_CONVERTER_CLS,
                             model=model, options=options)
        for one, options in ((name, None), (TASK, OPTIONS))
    )  # fmt: skip
    for _ in range(3):
        a, b = next(theirs), next(ours)
        for feature in a:
            np.testing.assert_array_equal(a[feature], b[feature])


def test_a_task_takes_the_vocabulary_of_the_checkpoint_unless_it_is_its_own(tmp_path):
    texts = {"files": __file__}
    for kind, folder in (("passkey_words", "words"), ("passkey_bytes", "bytes")):
        model = make_model(vocabulary=registry.get(kind).vocab)
        write_model_dir(tmp_path / folder, model, make_params(model.module), model.vocabulary)
    for folder, same in (("bytes", True), ("words", False)):
        name = famx_t5x.seqio_task("own_text", texts, str(tmp_path / folder))
        vocabulary = seqio.get_mixture_or_task(name).output_features["targets"].vocabulary
        assert (name == famx_t5x.seqio_task("own_text", texts)) == same
        assert (vocabulary == as_seqio_vocabulary(registry.get("passkey_bytes").vocab)) == same


def test_the_vocabulary_is_the_tasks():
    model = famx_t5x.T5xModel(make_model(), mixture_or_task_name=TASK)
    vocabulary = seqio.get_mixture_or_task(TASK).output_features["targets"].vocabulary
    assert model.input_vocabulary == model.output_vocabulary == vocabulary
    converter = model.FEATURE_CONVERTER_CLS(pack=False)
    assert (converter.bos_id, converter.pad_id) == (vocabulary.bos_id, vocabulary.pad_id)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"model": None}, "MODEL is not set"),
        ({"state_passing": Aged()}, "STATE_PASSING is 'none' or 'random', which Aged is not"),
        ({"trainable": Trainable(frozen_dtype="bfloat16")}, "FROZEN_DTYPE is None"),
        ({"stages": ({"steps": 1},)}, r"STAGES is \(\): t5x has no stages"),
        ({"trainable": Trainable("lora")}, "the model has no adapters"),
        ({"mixture_or_task_name": "passkey_wrods"}, "The nearest name is 'passkey_words'"),
        (
            {"mixture_or_task_name": TASK, "task_options": {"digit": 1}},
            r"The task passkey_words has no option 'digit'. Did you mean digits\?",
        ),
        ({"model": make_model(vocab_size=50), "mixture_or_task_name": TASK}, "the model's only 50"),
        ({"model_dir": "runs/a"}, "MODEL_DIR must be an absolute path"),
        ({"num_decodes": 2}, "NUM_DECODES is 2, but without a temperature"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(options, sentence):
    settings = {"model": make_model(), "optimizer": make_optimizer(), **options}
    with pytest.raises(ConfigError, match=sentence):
        famx_t5x.T5xModel(**settings)


def test_a_vocabulary_that_is_not_the_tasks_gets_a_sentence():
    model = make_model(vocabulary=registry.get("passkey_bytes").vocab)
    with pytest.raises(ConfigError, match="is not that of the model"):
        famx_t5x.T5xModel(model, mixture_or_task_name=TASK)


def test_a_directory_of_another_model_gets_a_sentence(tmp_path):
    famx_t5x.T5xModel(make_model(), optimizer=make_optimizer(), model_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="differing in num_layers"):
        famx_t5x.T5xModel(make_model(num_layers=2), optimizer=make_optimizer(), model_dir=str(tmp_path))


def test_rows_shorter_than_a_block_get_a_sentence():
    with pytest.raises(ConfigError, match="shorter than a block"):
        short = dataset(task_feature_lengths={"targets": 4})
        famx_t5x.get_dataset(short, 0, 1, None, model=make_model(), options=OPTIONS)


def test_no_checkpoint_gets_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="There is no checkpoint"):
        famx_t5x.latest_checkpoint(str(tmp_path))
