"""Short runs of both engines on the same task, in this process, with the loss of every step."""

import functools

import jax
import pytest
from tiny import BLOCK, BLOCKS, make_model, make_run

pytest.importorskip(
    "t5x.trainer",
    reason="t5x is not installed: see docs/t5x.md",
    exc_type=ImportError,
)

from t5x import partitioning, train, trainer, utils  # noqa: E402

from famx import t5x as famx_t5x  # noqa: E402
from famx.training import loop, optimizers  # noqa: E402
from famx.training.run import Every  # noqa: E402
from famx.training.run_log import read_metrics  # noqa: E402

TASK, BATCH, LENGTH = "passkey_words", 4, BLOCKS * BLOCK
OPTIONS = {"digits": 1, "header": False, "filler": "random_words"}


def make_optimizer(name="adamw"):
    """With a weight decay, and factored moments even for narrow matrices."""
    if name == "adafactor":
        return optimizers.adafactor(1e-2, weight_decay=0.1, min_dim_size_to_factor=4)
    return optimizers.adamw(1e-2, weight_decay=0.1)


def run_ours(model_dir, steps, model=None, optimizer="adamw", **changes):
    """`loop.train`; the loss of each of its steps."""
    settings = dict(
        model_dir=str(model_dir),
        model=model,
        task=TASK,
        options=OPTIONS,
        lengths={"targets": LENGTH},
        steps=steps,
        batch_size=BATCH,
        optimizer=make_optimizer(optimizer),
        every=Every(log=1),
    )
    loop.train(make_run(**{**settings, **changes}))
    return {line["step"]: line["loss"] for line in read_metrics(str(model_dir))}


class Recorder(trainer.BaseAction):
    """Notes the loss after every step, and the last training state."""

    def __init__(self):
        self.losses, self.state = {}, None

    def run(self, train_state, metrics_by_task):
        self.state = train_state
        self.losses[int(train_state.step)] = float(metrics_by_task["train"]["loss"].value)
        return False


def dataset(**changes):
    settings = dict(
        mixture_or_task_name=TASK,
        task_feature_lengths={"targets": LENGTH},
        split="train",
        batch_size=BATCH,
        shuffle=True,
        seed=0,
        pack=True,
        trim_output_features=False,
    )
    return utils.DatasetConfig(**{**settings, **changes})


def make_partitioner(submesh=(1, 1, 1, 1), **rules):
    return partitioning.PjitPartitioner(
        model_parallel_submesh=submesh, logical_axis_rules=famx_t5x.logical_axis_rules(**rules)
    )


def run_t5x(
    model_dir, steps, model=None, optimizer="adamw", partitioner=None, data=None, initial=None, **options
):
    """`t5x.train.train`; its `Recorder`. `options` are those of `T5xModel`."""
    recorder, model = Recorder(), model or make_model()
    settings = dict(
        mixture_or_task_name=TASK,
        task_options=OPTIONS,
        optimizer=make_optimizer(optimizer),
        model_dir=str(model_dir),
        random_seed=0,
        checkpoint=initial,
    )
    initializer = utils.TrainStateInitializer
    if initial is not None:
        initializer = functools.partial(famx_t5x.Initializer, initial_checkpoint_path=initial)
    train.train(
        model=famx_t5x.T5xModel(model, **{**settings, **options}),
        train_dataset_cfg=data or dataset(),
        train_eval_dataset_cfg=None,
        infer_eval_dataset_cfg=None,
        checkpoint_cfg=utils.CheckpointConfig(
            save=utils.SaveCheckpointConfig(dtype=None, period=steps, save_dataset=True)
        ),
        partitioner=partitioner or make_partitioner(),
        trainer_cls=functools.partial(
            trainer.Trainer, learning_rate_fn=lambda step: 0.0, num_microbatches=None
        ),
        model_dir=str(model_dir),
        total_steps=steps,
        eval_steps=0,
        eval_period=0,
        stats_period=1,
        random_seed=0,
        summarize_config_fn=lambda *args, **kwargs: None,
        get_dataset_fn=functools.partial(famx_t5x.get_dataset, model=model, options=OPTIONS),
        concurrent_metrics=False,
        actions={"TRAIN": [recorder]},
        train_state_initializer_cls=initializer,
    )
    recorder.state = jax.device_get(recorder.state)
    return recorder
