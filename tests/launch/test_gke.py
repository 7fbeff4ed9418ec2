"""`launch.gke` against an xpk that is stood in for."""

import pathlib
import shlex

import pytest
import stubs
from absl.testing import flagsaver

from famx.base.errors import ConfigError
from launch import gke, settings
from launch.commands import Commands
from launch.job import Job


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, value in stubs.install(tmp_path, "xpk").items():
        monkeypatch.setenv(name, value)
    return tmp_path


def make_config(folder, **changes):
    wheel = folder / "famx-0.1.0-py3-none-any.whl"
    wheel.touch()
    fields = dict(
        name="fam", project="my-project", zone="us-west4-a", accelerator="v5litepod-16",
        bucket="my_bucket", cluster="my-cluster", base_image="python:3.12", wheel=str(wheel),
        stage_dir=str(folder / "stage"), restarts=3, num_slices=2,
    )  # fmt: skip
    return settings.check(settings.gke(**{**fields, **changes}), "gke")


def launch(
    config, dry_run=False, gin_flags=("--gin_bindings=X = 'a b'",), model_dir="/mnt/famx/x", **flags
):
    shown, secret = settings.environment(config)
    stage = pathlib.Path(config.stage_dir) / "famx-fam"
    job = Job("fam", ("gin_configs/runs/pretrain.gin",), gin_flags, model_dir, shown, secret, stage)
    with flagsaver.flagsaver(**flags):
        return gke.launch(config, job, Commands(dry_run, job.secret.values()))


def given(call):
    return dict(word[2:].partition("=")[::2] for word in call if word.startswith("--"))


def test_a_workload_is_submitted_waited_for_and_deleted(cluster):
    assert launch(make_config(cluster)) == 0
    create, wait, delete = stubs.calls(cluster)
    assert [call[1:3] for call in (create, wait, delete)] == [
        ["workload", "create"], ["workload", "list"], ["workload", "delete"],
    ]  # fmt: skip
    flags = given(create)
    assert (flags["tpu-type"], flags["num-slices"], flags["max-restarts"]) == ("v5litepod-16", "2", "3")
    assert flags["restart-on-exit-codes"] == "42,75" and flags["storage"] == "my-bucket"
    assert flags["command"] == "exec bash run.sh" and flags["base-docker-image"] == "python:3.12"
    assert given(wait)["wait-for-job-completion"] == "fam" and given(delete)["workload"] == "fam"
    stage = cluster / "stage" / "famx-fam"
    *_, install, last = (stage / "run.sh").read_text().splitlines()
    assert install.startswith('pip install --quiet "famx[tpu] @ file://')
    words = "exec python -m famx.train --multiprocess --exit_code_if_stopped=42".split()
    assert shlex.split(last) == [*words, "--gin_bindings=X = 'a b'"]
    assert (stage / "gin_configs" / "runs" / "pretrain.gin").is_file()
    assert (stage / "famx-0.1.0-py3-none-any.whl").is_file()


def test_an_image_of_ones_own_runs_the_training_itself(cluster):
    config = make_config(cluster, base_image="", image="gcr.io/my-project/famx:1")
    assert launch(config, wait=False) == 0
    (create,) = stubs.calls(cluster)
    flags = given(create)
    assert flags["docker-image"] == "gcr.io/my-project/famx:1" and "script-dir" not in flags
    assert flags["command"].startswith("exec python -m famx.train --multiprocess ")


def test_the_code_of_a_workload_that_fails_is_handed_on(cluster):
    stubs.write(cluster, {"workload_code": 125})
    assert launch(make_config(cluster), delete="never") == 125
    assert len(stubs.calls(cluster)) == 2


def test_a_cluster_is_created_with_the_bucket_attached(cluster):
    config = make_config(cluster, provisioning="reserved", reservation="my-reservation")
    assert launch(config, create_cluster=True, wait=False) == 0
    create, attach, _ = stubs.calls(cluster)
    assert given(create)["reservation"] == "my-reservation" and "spot" not in given(create)
    assert attach[1:4] == ["storage", "attach", "my-bucket"]
    assert given(attach)["bucket"] == "my_bucket" and given(attach)["mount-point"] == "/mnt/famx"


def test_secrets_pass_through_the_environment_alone(cluster, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_123456")
    config = make_config(
        cluster, environment_from=("HF_TOKEN",), environment={"PLAIN": "a b", "MY_KEY": "key_789012"}
    )
    assert launch(config) == 0
    state = stubs.read(cluster)
    assert sorted(state["environment_file"].splitlines()) == ["HF_TOKEN", "MY_KEY", "PLAIN=a b"]
    assert state["environment"] == {"HF_TOKEN": "hf_123456", "MY_KEY": "key_789012"}
    out, err = capsys.readouterr()
    assert "MY_KEY=***" in out and "HF_TOKEN=***" in out
    for text in (out, err, *map(str, stubs.calls(cluster))):
        assert "123456" not in text and "789012" not in text


def test_a_dry_run_prints_exactly_what_is_run(cluster, capsys):
    config = make_config(cluster)
    assert launch(config, dry_run=True, create_cluster=True) == 0
    out = capsys.readouterr().out
    printed = [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]
    assert stubs.calls(cluster) == [] and not (cluster / "stage").exists()
    assert launch(config, create_cluster=True) == 0
    assert printed == stubs.calls(cluster)


@pytest.mark.parametrize(
    "changes,job,sentence",
    [
        ({"environment": {"A": 'x"y'}}, {}, "xpk cannot pass on the value of A"),
        ({}, {"gin_flags": ("--gin_bindings=X = '$(HOME)'",)}, "Kubernetes would expand"),
        ({}, {"model_dir": "/home/x"}, "MODEL_DIR /home/x would be lost with the workers"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(cluster, changes, job, sentence):
    with pytest.raises(ConfigError) as caught:
        launch(make_config(cluster, **changes), **job)
    assert sentence in str(caught.value) and stubs.calls(cluster) == []


def test_what_xpk_refuses_is_one_sentence(cluster):
    stubs.write(cluster, {"xpk_code": 1})
    with pytest.raises(ConfigError, match="xpk failed to submit fam: see the lines above"):
        launch(make_config(cluster))
    with pytest.raises(ConfigError, match="xpk failed to prepare the cluster my-cluster"):
        launch(make_config(cluster), create_cluster=True)


def test_a_missing_xpk_is_one_sentence(cluster, monkeypatch):
    monkeypatch.setenv("PATH", str(cluster))
    with pytest.raises(ConfigError, match="xpk is not installed: install it with `pip install xpk`"):
        launch(make_config(cluster))


STUDY = dict(num_slices=1, accelerator="v5litepod-8", study_tasks=3)


def test_workloads_share_a_study(cluster):
    """One for each task; the first that fails gives the exit code."""
    stubs.write(cluster, {"workload_code": 1})
    assert launch(make_config(cluster, **STUDY)) == 1
    called = stubs.calls(cluster)
    names = ["fam-0", "fam-1", "fam-2"]
    assert [call[1:3] for call in called] == [["workload", what] for what in 3 * ["create"] + 3 * ["list"]
                                              + 3 * ["delete"]]  # fmt: skip
    assert [given(call)["workload"] for call in called[:3] + called[6:]] == 2 * names
    assert [given(call)["wait-for-job-completion"] for call in called[3:6]] == names
    assert [given(call)["command"] for call in called[:3]] == [f"exec bash run.sh {i}" for i in range(3)]
    last = (cluster / "stage" / "famx-fam" / "run.sh").read_text().splitlines()[-1]
    words = 'exec python -m famx.ablate --exit_code_if_stopped=42 --task="$1" --tasks=3 '
    assert last == words + "'--gin_bindings=X = '\"'\"'a b'\"'\"''"


def test_an_image_of_ones_own_runs_the_tasks_itself(cluster):
    config = make_config(cluster, base_image="", image="gcr.io/my-project/famx:1", **STUDY)
    assert launch(config, wait=False) == 0
    commands = [given(call)["command"] for call in stubs.calls(cluster)]
    assert ["--task=2 --tasks=3" in command for command in commands] == [False, False, True]


def test_a_task_of_a_study_has_one_host(cluster):
    with pytest.raises(ConfigError, match="but v5litepod-16 has several hosts: set --config.accelerator"):
        make_config(cluster, num_slices=1, study_tasks=2)
    with pytest.raises(ConfigError, match="The study's directory /tmp/x would be lost with the workers"):
        launch(make_config(cluster, **STUDY), model_dir="/tmp/x")
