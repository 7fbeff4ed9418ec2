"""`launch.tpu` against gcloud and workers that are stood in for: a whole life, and what may befall it."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import stubs
from absl.testing import flagsaver
from processes import start_process

from famx.base.errors import ConfigError
from launch import job as jobs
from launch import settings, tpu
from launch.commands import Commands

TRAIN = '#!/bin/bash\necho "$(basename $HOME) $*"\n'
PREEMPTED = f"""{TRAIN}
if [ ! -e $STUBS/preempted ]; then
  touch $STUBS/preempted
  {sys.executable} -IS $STUBS/preempt.py
  kill -9 0
fi
echo resumed
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder of the stubs; a training prints its worker and its arguments, and is done."""
    for name, value in stubs.install(tmp_path, "gcloud").items():
        monkeypatch.setenv(name, value)
    tools = tmp_path / "worker_bin"
    tools.mkdir()
    for name, line in {
        "mountpoint": 'test -e "$HOME/mounted"',
        "sudo": "true",
        "gcsfuse": 'echo "$@" > "$HOME/mounted"',
        "hostname": 'echo "worker-$(basename $HOME)"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "python").write_text(TRAIN)
    yield tmp_path
    stubs._kill(tmp_path)


def make_config(cloud, **changes):
    wheel = cloud / "famx-0.1.0-py3-none-any.whl"
    wheel.touch()
    fields = dict(
        name="fam", project="my-project", zone="us-west4-a", accelerator="v5litepod-16",
        bucket="my-bucket", provisioning="spot", wheel=str(wheel),
        stage_dir=str(cloud / "stage"), poll_seconds=0, restarts=2,
    )  # fmt: skip
    return settings.check(settings.tpu(**{**fields, **changes}), "tpu")


def make_job(config, **changes):
    shown, secret = settings.environment(config)
    stage = pathlib.Path(config.stage_dir) / f"famx-{config.name}"
    fields = dict(
        name=config.name, gin_files=("gin_configs/runs/pretrain.gin",),
        gin_flags=("--gin_file=gin_configs/runs/pretrain.gin", SETTING),
        model_dir=f"{config.mount}/x", shown=shown, secret=secret, stage=stage,
    )  # fmt: skip
    return jobs.Job(**{**fields, **changes})


def launch(config, dry_run=False, delete="end", **changes):
    job = make_job(config, **changes)
    with flagsaver.flagsaver(delete=delete):
        return tpu.launch(config, job, Commands(dry_run, job.secret.values()))


def actions(cloud):
    """What gcloud was asked for, questions left out: 'create', 'ssh setup', ..."""
    names = []
    for call in stubs.calls(cloud):
        call = [word for word in call if word != "alpha"]
        name, command = call[4], next((word for word in call if word.startswith("--command=")), "")
        names.append(" ".join([name, *command.split()[2:]]))
    return [name for name in names if name not in ("describe", "ssh status")]


SETTING = "--gin_bindings=MODEL_DIR = '/mnt/famx/x'"
LIFE = ["create", "scp", "ssh setup", "ssh start", "ssh follow 1"]


def test_a_whole_life(cloud, capsys):
    stubs.write(cloud, {"workers": 2})
    config = make_config(cloud, environment={"PLAIN": "a b"})
    assert launch(config) == 0
    assert actions(cloud) == [*LIFE, "delete"]
    assert stubs.read(cloud)["tpus"] == {}
    out = capsys.readouterr().out
    assert out.count("queued-resources describe") == 2, "a question that is repeated is printed once"
    assert "fam is WAITING_FOR_RESOURCES.\nfam is PROVISIONING.\n" in re.sub(r"(?m)^\$ .*\n", "", out)
    assert (
        "\n0 -m famx.train --multiprocess --exit_code_if_stopped=42"
        " --gin_file=gin_configs/runs/pretrain.gin --gin_bindings=MODEL_DIR = '/mnt/famx/x'\n" in out
    )
    assert "\n1 -m famx.train" not in out, "only worker 0 is listened to"


def test_every_worker_gets_the_files_and_mounts_the_bucket(cloud):
    stubs.write(cloud, {"workers": 2})
    assert launch(make_config(cloud, environment={"PLAIN": "a b"}), delete="never") == 0
    for home in (cloud / "workers" / "0", cloud / "workers" / "1"):
        mount = (
            "--implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 my-bucket /mnt/famx\n"
        )
        assert (home / "mounted").read_text() == mount
        assert (home / "famx-fam" / "gin_configs" / "runs" / "pretrain.gin").is_file()
        assert (home / "famx-fam" / "environment.sh").read_text() == "export PLAIN='a b'\n"
        assert (home / "famx-fam" / "exit_code").read_text() == "0\n"
    assert list(stubs.read(cloud)["tpus"]) == ["fam"]


def test_several_slices_get_names_by_number(cloud):
    assert launch(make_config(cloud, num_slices=2, provisioning="reserved"), delete="never") == 0
    given = stubs.read(cloud)["tpus"]["fam"]["given"]
    assert (given["node-count"], given["node-prefix"]) == ("2", "fam")
    assert "node-id" not in given and "reserved" in given and "spot" not in given


def test_options_of_a_request(cloud):
    config = make_config(
        cloud, network="net", subnetwork="sub", service_account="me@my-project.iam.gserviceaccount.com",
        internal_ips=True, valid_until_duration="6h", provisioning="on_demand",
    )  # fmt: skip
    assert launch(config, delete="never") == 0
    given = stubs.read(cloud)["tpus"]["fam"]["given"]
    assert given["runtime-version"] == "v2-alpha-tpuv5-lite" and given["valid-until-duration"] == "6h"
    assert given["internal-ips"] == "" and given["network"] == "net" and given["subnetwork"] == "sub"
    connecting = [call for call in stubs.calls(cloud) if call[4] in ("ssh", "scp")]
    assert connecting and all("--tunnel-through-iap" in call for call in connecting)


def test_labels_reservations_and_flex_start(cloud):
    labels = {"team": "memory", "cost-center": "42"}
    ways = {
        "reserved": (dict(reservation="my-block", labels=labels), {"reservation": "my-block"}),
        "flex_start": (
            dict(max_run_duration="24h", valid_until_duration="6h"),
            {"provisioning-model": "flex-start", "max-run-duration": "24h", "valid-until-duration": "6h"},
        ),
        "spot": (dict(labels=labels), {"spot": "", "labels": "cost-center=42,team=memory"}),
    }
    for way, (changes, expected) in ways.items():
        assert launch(make_config(cloud, provisioning=way, **changes), delete="never") == 0
        given = stubs.read(cloud)["tpus"]["fam"]["given"]
        assert given.items() >= expected.items() and ("labels" in given) == ("labels" in changes)
        assert ("spot" in given) == (way == "spot") and "reserved" not in given
        create = next(call for call in stubs.calls(cloud)[::-1] if "create" in call)
        assert (create[1] == "alpha") == (way != "spot"), "only what needs it asks gcloud alpha"
        stubs._delete(cloud, stubs.read(cloud), ["fam"], {"force": ""})


def in_bucket(cloud, **changes):
    """A config whose bucket is a folder here, of two workers."""
    stubs.write(cloud, {"workers": 2})
    return make_config(cloud, mount=str(cloud / "bucket"), **changes)


def test_the_logs_of_all_workers_are_kept_in_the_bucket(cloud, capsys):
    assert launch(in_bucket(cloud)) == 0
    logs = {path.name.split("Z-")[1]: path for path in (cloud / "bucket/x/launch_logs").iterdir()}
    assert set(logs) == {"worker-0.log", "worker-1.log"} and not (cloud / "workers/0").exists()
    for i in (0, 1):
        assert logs[f"worker-{i}.log"].read_text().startswith(f"{i} -m famx.train --multiprocess")
    out = capsys.readouterr().out
    assert "The logs of all workers are kept in gs://my-bucket/x/launch_logs." in out
    assert "--- worker-" not in out


def test_a_bucket_that_cannot_be_written_does_not_end_the_training(cloud):
    (cloud / "bucket").write_text("a file")
    assert launch(in_bucket(cloud)) == 0


def test_the_last_lines_of_the_worker_that_failed_are_shown_before_the_slices_go(cloud, capsys):
    (cloud / "python").write_text(
        f"{TRAIN}if [ $(basename $HOME) = 0 ]; then sleep 1; exit 75; fi\n"
        "for i in $(seq 50); do echo line $i; done; echo it broke; exit 1\n"
    )
    with pytest.raises(ConfigError, match="fam was lost 1 times"):
        launch(in_bucket(cloud, restarts=0))
    assert actions(cloud) == [*LIFE, "ssh last 30", "delete"]
    out = capsys.readouterr().out
    assert "--- worker-0: exited 75\n--- worker-1: exited 1\nline 22\n" in out
    assert "line 50\nit broke\n" in out and "line 21\n" not in out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_preemption_is_followed_by_a_new_request_and_the_same_command(cloud, capsys, state):
    (cloud / "python").write_text(PREEMPTED)
    here = str(pathlib.Path(__file__).parent)
    program = f"import sys; sys.path[:0] = [{here!r}]\nimport stubs\n"
    (cloud / "preempt.py").write_text(f"{program}stubs.preempt({str(cloud)!r}, 'fam', {state!r})\n")
    assert launch(make_config(cloud)) == 0
    assert actions(cloud) == [*LIFE, "delete", *LIFE, "delete"]
    out = capsys.readouterr().out
    assert "Restart 1 of 2." in out and "\nresumed\n" in out


def test_a_request_that_is_taken_away_while_it_waits_is_made_again(cloud):
    stubs.write(cloud, {"lives": [["WAITING_FOR_RESOURCES", "SUSPENDING", "SUSPENDED"]]})
    assert launch(make_config(cloud)) == 0
    assert actions(cloud) == ["create", "delete", *LIFE, "delete"]


def test_restarts_have_a_limit(cloud):
    stubs.write(cloud, {"lives": [["FAILED"]] * 3})
    with pytest.raises(ConfigError, match="fam was lost 3 times: raise --config.restarts to continue"):
        launch(make_config(cloud))
    assert actions(cloud).count("create") == 3 and stubs.read(cloud)["tpus"] == {}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("code", [42, 75])
def test_a_run_that_was_stopped_or_lost_a_worker_resumes_on_the_same_slices(cloud, code):
    once = f"if [ -e $HOME/once ]; then exit 0; fi; touch $HOME/once; exit {code}\n"
    (cloud / "python").write_text(TRAIN + once)
    assert launch(make_config(cloud)) == 0
    assert actions(cloud) == [*LIFE, *["ssh last 30"] * (code == 75), *LIFE[1:], "delete"]


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_by_itself_ends_with_its_exit_code(cloud, code):
    (cloud / "python").write_text(f"{TRAIN}exit {code}\n")
    assert launch(make_config(cloud)) == code
    assert actions(cloud) == [*LIFE, *["ssh last 30"] * (code == 1), "delete"]


def test_fresh_workers_may_refuse_the_first_connections(cloud):
    stubs.write(cloud, {"ssh_fails": 3})
    assert launch(make_config(cloud)) == 0
    assert actions(cloud)[-1] == "delete"


def test_an_installation_that_fails_ends_and_deletes(cloud):
    (cloud / "worker_bin" / "gcsfuse").write_text("#!/bin/bash\necho no such bucket >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="Installing failed on the workers of fam: see the lines above"):
        launch(make_config(cloud))
    assert actions(cloud) == ["create", "scp", *["ssh setup"] * 3, "delete"]


def test_a_refused_request_is_one_sentence(cloud, capsys):
    stubs.write(cloud, {"quota": "no quota"})
    with pytest.raises(ConfigError, match="gcloud failed to request v5litepod-16: see the lines above"):
        launch(make_config(cloud))
    assert "RESOURCE_EXHAUSTED: no quota" in capsys.readouterr().out


def test_a_question_that_gcloud_does_not_answer_is_asked_again(cloud):
    stubs.write(cloud, {"describe_fails": 2})
    assert launch(make_config(cloud)) == 0


@pytest.mark.slow
def test_slices_that_are_there_are_used_and_a_running_training_is_followed(cloud, capsys):
    (cloud / "python").write_text(f"{TRAIN}echo going; sleep 3; echo done\n")
    config = make_config(cloud)
    job = make_job(config)
    commands = Commands(dry_run=False)
    tpu.write_stage(config, job, commands)
    first = tpu.Slices(config, job, commands)
    assert first.obtain()
    for command in (
        first.copy(),
        first.ssh("setup", all_workers=True),
        first.ssh("start", all_workers=True),
    ):
        assert commands.run(*command) == 0
    before = len(actions(cloud))
    assert launch(config) == 0
    assert actions(cloud)[before:] == ["ssh follow 1", "delete"]
    out = capsys.readouterr().out
    assert "A training run is already in progress" in out and "\ngoing\ndone\n" in out


def test_starting_twice_trains_once(cloud):
    (cloud / "python").write_text(f"{TRAIN}echo x >> $HOME/starts; sleep 60\n")
    config = make_config(cloud)
    job, commands = make_job(config), Commands(dry_run=False)
    tpu.write_stage(config, job, commands)
    slices = tpu.Slices(config, job, commands)
    assert slices.obtain()
    for words in (
        slices.copy(),
        *[slices.ssh(w, all_workers=True) for w in ("setup", "setup", "start", "start")],
    ):
        assert commands.run(*words) == 0
    assert slices.status(assume="") == "running"
    starts = cloud / "workers/0/starts"
    while not starts.exists():  # the training starts in the background
        time.sleep(0.1)
    time.sleep(1)  # for a second one
    assert starts.read_text() == "x\n"


# ---------------------------------------------------------------- Ctrl-C, secrets, dry run


CTRL_C = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
import conftest, pathlib, test_tpu
with test_tpu.flagsaver.flagsaver(estimate="no"):
    sys.exit(test_tpu.launch(test_tpu.make_config(pathlib.Path({cloud!r})), delete={delete!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delete", ["end", "always"])
def test_ctrl_c_leaves_the_slices_unless_asked_to_delete_them(cloud, delete):
    stopping = (
        "trap 'echo saved > $STUBS/saved; exit 42' TERM; echo going; while true; do sleep 0.1; done\n"
    )
    (cloud / "python").write_text(TRAIN + stopping)
    here, root = pathlib.Path(__file__).parent, pathlib.Path(tpu.__file__).parent.parent
    code = CTRL_C.format(here=str(here), tests=str(here.parent), cloud=str(cloud), delete=delete)
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = start_process([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "going\n":
            process.send_signal(signal.SIGINT if delete == "always" else signal.SIGTERM)
            break
    text = "".join(lines) + process.stdout.read()
    assert process.wait() == 130, text
    if delete == "always":
        assert actions(cloud)[-2:] == ["ssh stop", "delete"] and (cloud / "saved").exists()
    else:
        assert "delete" not in actions(cloud) and "Run the same command to attach again" in text
        assert shlex.join(["gcloud", "compute", "tpus", "queued-resources", "delete", "fam"]) in text
        assert not (cloud / "saved").exists()


def test_secrets_reach_the_workers_and_nothing_else(cloud, capsys, monkeypatch):
    stubs.write(cloud, {"workers": 2})
    monkeypatch.setenv("HF_TOKEN", "hf_it's s3cr3t")
    (cloud / "python").write_text(
        f"{TRAIN}echo the token: $HF_TOKEN, $SOME_KEY; echo $HF_TOKEN > $HOME/t\n"
    )
    config = make_config(cloud, environment_from=("HF_TOKEN",), environment={"SOME_KEY": "k-123456"})
    assert launch(config, delete="never") == 0
    assert (cloud / "workers/1/t").read_text() == "hf_it's s3cr3t\n"
    for folder in (cloud / "stage" / "famx-fam", cloud / "workers" / "0" / "famx-fam"):
        assert (folder / "environment.sh").stat().st_mode & 0o777 == 0o600
    assert (cloud / "stage" / "famx-fam").stat().st_mode & 0o777 == 0o700
    assert launch(config, dry_run=True) == 0
    out, err = capsys.readouterr()
    assert "the token: ***, ***" in out
    assert "  | export HF_TOKEN='***'\n" in out and "  | export SOME_KEY='***'\n" in out
    for text in (out, err, *map(str, stubs.calls(cloud))):
        assert "s3cr3t" not in text and "123456" not in text


def test_a_dry_run_prints_exactly_what_is_run(cloud, capsys):
    stubs.write(cloud, {"lives": [["ACTIVE"]]})
    config = make_config(cloud, extras="tpu,seqio")
    assert launch(config, dry_run=True) == 0
    out = capsys.readouterr().out
    printed = [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]
    assert stubs.calls(cloud) == [] and not (cloud / "stage").exists()
    assert launch(config) == 0
    assert printed == stubs.calls(cloud)
    files = re.findall(r"(?m)^# file (\S+) \((?:mode|copy)", out)
    stage = cloud / "stage"
    assert sorted(files) == sorted(str(path) for path in stage.rglob("*") if path.is_file())
    text = (stage / "famx-fam" / "settings.sh").read_text()
    assert "EXTRAS=tpu,seqio\n" in text
    assert "".join(f"  | {line}\n" for line in text.splitlines()) in out


def test_nothing_in_a_gin_setting_is_run_by_a_shell(cloud, capsys):
    evil = "--gin_bindings=X = '$(touch /tmp/evil) `touch evil`; touch evil #\"\\'"
    assert launch(make_config(cloud), gin_flags=(evil,), delete="never") == 0
    assert f"0 -m famx.train --multiprocess --exit_code_if_stopped=42 {evil}\n" in capsys.readouterr().out
    assert not list(cloud.rglob("evil*")) and not pathlib.Path("/tmp/evil").exists()


def test_model_dir_must_lie_in_the_bucket(cloud):
    with pytest.raises(ConfigError, match="MODEL_DIR /tmp/x would be lost with the workers"):
        launch(make_config(cloud), model_dir="/tmp/x")
    assert stubs.calls(cloud) == []


def test_a_missing_gcloud_is_one_sentence(cloud, monkeypatch):
    monkeypatch.setenv("PATH", str(cloud))
    with pytest.raises(ConfigError, match="gcloud is not installed: install the Google Cloud CLI"):
        launch(make_config(cloud))


def test_the_wheel_is_built_from_this_tree_unless_one_is_given(cloud, capsys):
    assert launch(make_config(cloud, wheel=""), dry_run=True) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "pip wheel" in line)
    assert shlex.split(line)[-2:] == [f"--wheel-dir={cloud / 'stage' / 'famx-fam'}", str(jobs.ROOT)]
    with pytest.raises(ConfigError, match="--config.wheel must be the path of a famx wheel"):
        launch(make_config(cloud, wheel="/no/such.whl"))


@pytest.mark.slow
def test_worker_0_lost_sight_of_is_asked_again_from_the_next_line(cloud):
    (cloud / "python").write_text(f"{TRAIN}for i in 1 2 3; do echo line $i; sleep 1; done\n")
    config = make_config(cloud, poll_seconds=1)
    job, commands = make_job(config), Commands(dry_run=False)
    tpu.write_stage(config, job, commands)
    slices = tpu.Slices(config, job, commands)
    follow, seen = slices.ssh, []

    def cut_once(*words, all_workers):
        if words[0] == "follow":
            seen.append(words[1])
            if len(seen) == 1:  # the connection ends after a line
                time.sleep(0.5)
                return ["head", "--lines=1", str(cloud / "workers/0/famx-fam/log")]
        return follow(*words, all_workers=all_workers)

    slices.ssh = cut_once
    assert slices.train() == 0
    assert seen == ["1", "2"]
