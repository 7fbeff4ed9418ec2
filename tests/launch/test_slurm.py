"""`launch.slurm` against an sbatch that is stood in for; its script runs under bash."""

import os
import pathlib
import subprocess
import sys

import pytest
import stubs

from famx.base.errors import ConfigError
from launch import settings, slurm
from launch.commands import Commands
from launch.job import Job

EVIL = "--gin_bindings=X = '$(touch evil) `touch evil`; touch evil #\"\\'"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, value in stubs.install(tmp_path, "sbatch", "squeue", "srun", "scontrol").items():
        monkeypatch.setenv(name, value)
    return tmp_path


def launch(folder, dry_run=False, **changes):
    fields = dict(name="fam", nodes=2, stage_dir=str(folder / "stage"), restarts=3)
    config = settings.check(settings.slurm(**{**fields, **changes}), "slurm")
    shown, secret = settings.environment(config)
    stage = pathlib.Path(config.stage_dir) / "famx-fam"
    job = Job("fam", ("gin_configs/runs/pretrain.gin",), (EVIL,), "/shared/x", shown, secret, stage)
    return slurm.launch(config, job, Commands(dry_run, job.secret.values()))


def run_script(folder, **environment):
    """What Slurm does on the first node; the exit code."""
    script = folder / "stage" / "famx-fam" / "job.sh"
    env = {**os.environ, "SLURM_JOB_ID": "4711", **environment}
    return subprocess.run(["bash", script], env=env, cwd=folder).returncode


def test_the_options_of_a_job(cluster, capsys):
    assert launch(
        cluster, partition="gpu", account="me", qos="high", constraint="h100&ib", memory="500G",
        cpus_per_task=32, time="2-00:00:00",
    ) == 0  # fmt: skip
    options = stubs.read(cluster)["options"]
    log = str(cluster / "stage" / "famx-fam-%j.log")
    assert options == {
        "job-name": "fam", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "mem": "500G",
        "cpus-per-task": "32", "time": "2-00:00:00", "partition": "gpu", "account": "me", "qos": "high",
        "constraint": "h100&ib", "output": log, "open-mode": "append", "signal": "TERM@120",
        "requeue": "",
    }  # fmt: skip
    assert f"Submitted job 4711. Log: {log.replace('%j', '4711')}." in capsys.readouterr().out


def test_one_process_per_node_has_all_the_gpus_and_the_environment(cluster, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_it's")
    prologue = cluster / "my prologue.sh"
    prologue.write_text("export MODULES=loaded\n")
    assert launch(
        cluster, gpus_per_node=4, cpus_per_task=16, environment={"PLAIN": "a b"},
        environment_from=("HF_TOKEN",), prologue=str(prologue),
    ) == 0  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    assert run_script(cluster) == 0
    seen = stubs.read(cluster)["srun"]
    words = ["python", "-m", "famx.train", "--multiprocess", "--exit_code_if_stopped=42", EVIL]
    assert seen["flags"] == ["--wait=60", "--cpus-per-task=16"]
    assert seen["argv"] == words and not list(cluster.rglob("evil"))
    assert seen["env"] == {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3", "HF_TOKEN": "hf_it's", "PLAIN": "a b"}
    stage = cluster / "stage" / "famx-fam"
    assert seen["cwd"] == str(stage) and (stage / "gin_configs/runs/pretrain.gin").is_file()
    assert (stage / "environment.sh").stat().st_mode & 0o777 == 0o600
    assert "hf_it" not in (stage / "job.sh").read_text()


@pytest.mark.parametrize("code,before,queued", [
    (42, 0, 1), (42, 2, 1), (42, 3, 0), (75, 0, 1), (75, 3, 0), (1, 0, 0), (2, 0, 0), (0, 0, 0),
])  # fmt: skip
def test_a_run_that_was_stopped_is_queued_again_so_often(cluster, code, before, queued):
    assert launch(cluster) == 0
    stubs.write(cluster, {"srun_code": code})
    assert run_script(cluster, SLURM_RESTART_COUNT=str(before)) == (0 if queued else code)
    assert stubs.read(cluster).get("requeued", 0) == queued


def test_a_job_that_is_cancelled_is_not_queued_again(cluster):
    assert launch(cluster) == 0
    (cluster / "bin" / "srun").write_text("#!/bin/bash\nkill -TERM $PPID; sleep 0.2; exit 42\n")
    assert run_script(cluster) == 42
    assert "requeued" not in stubs.read(cluster)


def test_a_dry_run_prints_the_script_and_runs_nothing(cluster, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_123456")
    assert launch(cluster, dry_run=True, environment_from=("HF_TOKEN",)) == 0
    out = capsys.readouterr().out
    assert stubs.calls(cluster) == [] and not (cluster / "stage").exists()
    assert "export HF_TOKEN='***'" in out and "123456" not in out
    assert launch(cluster, environment_from=("HF_TOKEN",)) == 0
    script = cluster / "stage" / "famx-fam" / "job.sh"
    assert "".join(f"  | {line}\n" for line in script.read_text().splitlines()) in out
    assert f"$ sbatch --parsable {script}\n" in out


def test_a_job_of_the_same_name_is_not_submitted_twice(cluster):
    stubs.write(cluster, {"queued": "4700"})
    with pytest.raises(ConfigError, match="Job 4700 is already named fam: cancel it with scancel"):
        launch(cluster)


def test_what_sbatch_refuses_is_one_sentence(cluster):
    stubs.write(cluster, {"sbatch_error": "invalid partition"})
    with pytest.raises(ConfigError, match="sbatch rejected the job: ERROR: invalid partition"):
        launch(cluster)


def test_a_missing_sbatch_is_one_sentence(cluster, monkeypatch):
    monkeypatch.setenv("PATH", str(cluster))
    with pytest.raises(ConfigError, match="sbatch is not installed: run this on a login node"):
        launch(cluster)


def test_a_stage_that_slurm_would_misread_is_refused(cluster):
    with pytest.raises(ConfigError, match="--config.stage_dir must not contain spaces or %"):
        launch(cluster, stage_dir=str(cluster / "my stage"))


def test_tasks_of_an_array_share_a_study(cluster, capsys):
    """Each with a cell on each GPU; famx.ablate knows the task by Slurm's variables."""
    assert launch(cluster, nodes=1, gpus_per_node=4, study_tasks=3) == 0
    options = stubs.read(cluster)["options"]
    log = str(cluster / "stage" / "famx-fam-%A_%a.log")
    assert (options["array"], options["nodes"], options["output"]) == ("0-2", "1", log)
    assert f"Log: {log.replace('%A_%a', '4711_TASK')}." in capsys.readouterr().out
    assert run_script(cluster) == 0
    seen = stubs.read(cluster)["srun"]
    flags = ["--exit_code_if_stopped=42", "--processes=4", "--gpus=4", EVIL]
    words = ["python", "-m", "famx.ablate", *flags]
    assert seen["argv"] == words and seen["env"]["JAX_LOCAL_DEVICE_IDS"] is None
    stubs.write(cluster, {"srun_code": 42})
    assert run_script(cluster) == 0 and stubs.read(cluster)["requeued"] == 1


def test_a_task_of_a_study_has_one_node(cluster):
    with pytest.raises(ConfigError, match="Each task of a study has one node or slice: set --config.nod"):
        launch(cluster, study_tasks=3)
    assert launch(cluster, nodes=1, gpus_per_node=0, study_tasks=1) == 0
    assert "--processes" not in (cluster / "stage" / "famx-fam" / "job.sh").read_text()


def test_a_study_is_checked_and_its_gin_files_are_staged(tmp_path):
    root = pathlib.Path(slurm.__file__).resolve().parents[1]
    words = [
        sys.executable, "-m", "launch.slurm", "--config=launch/configs/slurm_8gpu.py", "--dry_run",
        "--config.nodes=1", "--config.study_tasks=2", f"--config.stage_dir={tmp_path}",
        "--gin_file=gin_configs/studies/memories.gin",
    ]  # fmt: skip
    run = lambda *more: subprocess.run([*words, *more], cwd=root, capture_output=True, text=True)
    done = run("--gin.STUDY_DIR='/shared/study'")
    assert done.returncode == 0, done.stderr
    for name in ("studies/memories.gin", "examples/passkey_short.gin", "models/tiny.gin"):
        assert f"gin_configs/{name} (copy of" in done.stdout, name
    assert "#SBATCH --array=0-1" in done.stdout and "-m famx.ablate" in done.stdout
    done = run("--gin.STUDY_DIR='study'")
    assert done.returncode == 2 and "must be an absolute path, not study" in done.stderr
