"""The script that draws what a memory attends to in images and in sound."""

import pathlib
import sys

import matplotlib.image
import pytest

from famx.base import gin_utils
from famx.training import loop

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import sequence_pictures  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("sklearn")
    made = {}
    for kind in ("album", "melody"):
        made[kind] = tmp_path_factory.mktemp("runs") / kind
        settings = {
            "MODEL_DIR": made[kind], "TRAIN_STEPS": 2, "BATCH_SIZE": 2,
            "run.Run.evaluation": None, "run.Data.curriculum": None,
            "schedules.warmup_stable_decay.warmup_steps": 1,
            "schedules.warmup_stable_decay.decay_steps": 1,
        }  # fmt: skip
        gin_utils.call_with(loop.train, [f"gin_configs/examples/{kind}_tiny.gin"], settings)
    return made


@pytest.mark.slow
def test_pictures_are_of_an_example_that_is_answered_rightly(runs, tmp_path):
    arguments = [f"--{kind}={path}" for kind, path in runs.items()]
    sequence_pictures.main([*arguments, f"--to={tmp_path}"])
    for kind in runs:
        path = tmp_path / f"{kind}_attention.png"
        assert matplotlib.image.imread(path).std() > 0.05


def test_nothing_to_draw_is_a_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit):
        sequence_pictures.main([f"--to={tmp_path}"])
    assert "give --album or --melody" in capsys.readouterr().err
