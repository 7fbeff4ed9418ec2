"""Training on a SeqIO task: the rows are SeqIO's, and a run that stopped continues with the next."""

import numpy as np
import pytest
from own_seqio import NAME as OWN
from own_seqio import own_module
from tiny import assert_identical, make_run

seqio = pytest.importorskip("seqio", reason="seqio is not installed")
tf = pytest.importorskip("tensorflow")

from famx.base.errors import ConfigError  # noqa: E402
from famx.data import seqio as seqio_tasks  # noqa: E402
from famx.data.probes.passkey import PasskeyTask  # noqa: E402
from famx.data.tasks import registry  # noqa: E402
from famx.data.vocabularies import load_vocabulary  # noqa: E402
from famx.training import loop  # noqa: E402
from famx.training.feeds import SeqioFeed, lane_feed  # noqa: E402
from famx.training.run import Every  # noqa: E402
from famx.training.run_log import read_metrics  # noqa: E402
from famx.training.source import Source  # noqa: E402

NAME, LENGTH = "passkey_for_the_feed", 96


@pytest.fixture(scope="module")
def task():
    seqio_tasks.register_made(NAME, PasskeyTask(header=False))
    return registry.get(NAME)


def test_rows_are_those_of_the_task_and_resume_is_exact(task):
    feed = SeqioFeed(Source(task, 4, LENGTH, 32))
    batches = [feed.next(step).batch for step in range(3)]
    ours = PasskeyTask(header=False).batch(range(4), LENGTH)
    for name, rows in batches[0].items():
        np.testing.assert_array_equal(rows, ours[name])
    state = feed.get_state()
    expected = feed.next(3).batch
    again = SeqioFeed(Source(task, 4, LENGTH, 32))
    again.set_state(state)
    for name, rows in again.next(3).batch.items():
        np.testing.assert_array_equal(rows, expected[name])


def test_rows_cannot_be_lanes(task):
    with pytest.raises(ConfigError, match="rows, not documents"):
        lane_feed(Source(task, 4, LENGTH, 32), 64, 10)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("packed", [False, True])
def test_a_shuffled_task_is_read_in_one_order_however_often_it_is_begun(packed):
    own_module()
    source = Source(registry.get(OWN), 4, 16, 8, packed=packed)
    feed = SeqioFeed(source)
    batches = [feed.next(step).batch for step in range(16)]  # more than an epoch unless packed
    assert batches[0]["decoder_input_tokens"].min() >= 0  # T5's vocabulary says -1 for bos
    assert np.all(batches[0]["decoder_input_tokens"][:, 0] == 1) or packed
    first = {tuple(row) for row in batches[0]["decoder_target_tokens"]}
    assert first != {tuple(row) for row in batches[1]["decoder_target_tokens"]}
    for step in (0, 7, 0):
        feed.set_state({"batches": step})
        assert_identical(feed.next(step).batch, batches[step])
        again = SeqioFeed(source)
        again.set_state({"batches": step})
        assert_identical(again.next(step).batch, batches[step])


def test_a_resumed_run_goes_on_with_the_rows_of_a_shuffled_task(tmp_path):
    module = own_module()

    def losses(name, steps):
        run = make_run(
            task=OWN, options={}, lengths={"inputs": 10, "targets": 6}, batch_size=4, steps=steps,
            model_dir=str(tmp_path / name), every=Every(log=1, checkpoint=2),
        )  # fmt: skip
        loop.train(run)
        return {line["step"]: line["loss"] for line in read_metrics(run.model_dir)}

    whole = losses("whole", 6)
    assert losses("cut", 2) == {step: whole[step] for step in (1, 2)}
    assert losses("cut", 6) == whole
    saved = load_vocabulary(tmp_path / "cut")
    assert saved == seqio_tasks.from_seqio_vocabulary(module.VOCABULARY)
    assert saved.vocab_size == module.VOCABULARY.vocab_size


@pytest.mark.parametrize(
    "vocabulary", [seqio.ByteVocabulary(), seqio.PassThroughVocabulary(300, eos_id=5)]
)
def test_vocabularies_without_bos_give_rows(vocabulary):
    name = f"own_{type(vocabulary).__name__}"
    if isinstance(vocabulary, seqio.ByteVocabulary):
        task = own_module().register(name, vocabulary)
    else:
        ids = {"targets": [[7, 8, 9]]}
        read = lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(ids)
        task = seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(read, splits=("train",)),
            preprocessors=[seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(vocabulary, add_eos=True)},
        )
    row = SeqioFeed(Source(task, 1, 32, 8)).next(0).batch
    assert row["decoder_input_tokens"][0, 0] == vocabulary.eos_id
    assert vocabulary.eos_id in row["decoder_target_tokens"]


def test_a_model_with_too_few_ids_for_seqios_vocabulary_gets_a_sentence(tmp_path):
    name = "own_wide_ids"
    own_module().register(name, seqio.ByteVocabulary(extra_ids=100))
    run = make_run(task=name, options={}, model_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="has 359 tokens, the model's only 260"):
        loop.train(run)
