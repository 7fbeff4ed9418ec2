"""gcloud, xpk, sbatch and the rest as small programs: they take the flags that the real ones document.

`install(folder)` puts them on a path of their own. What they are called with is appended to
calls.jsonl; state.json says what is there and what is to happen. Workers are folders below workers/:
ssh runs its command there with bash, scp copies there.
"""

import json
import os
import pathlib
import sys

PROGRAM = """#!{python} -IS
import sys
sys.path[:0] = [{here!r}]
import stubs
stubs.main({folder!r}, {name!r}, sys.argv[1:])
"""
TPU_STATES = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")

# Flags by command, as documented: True takes a value, False does not, a tuple is the choice of values.
_WIDE = {"project": True, "zone": True, "quiet": False, "format": True}
_CONNECT = {"node": True, "worker": True, "batch-size": True, "tunnel-through-iap": False}
GCLOUD = {
    "create": _WIDE | {
        "accelerator-type": True, "runtime-version": True, "node-id": True, "node-count": True,
        "node-prefix": True, "spot": False, "reserved": False, "network": True, "subnetwork": True,
        "service-account": True, "internal-ips": False, "valid-until-duration": True, "async": False,
        "labels": True,
    },
    "describe": _WIDE,
    "delete": _WIDE | {"force": False, "async": False},
    "ssh": _WIDE | _CONNECT | {"command": True},
    "scp": _WIDE | _CONNECT | {"recurse": False, "compress": False},
}  # fmt: skip
# Further flags of `gcloud alpha compute tpus queued-resources create`.
ALPHA = {
    "reservation": True, "max-run-duration": True,
    "provisioning-model": ("standard", "spot", "flex-start", "reservation-bound"),
}  # fmt: skip
_XPK = {"cluster": True, "project": True, "zone": True}
_SLICES = {"tpu-type": True, "num-slices": True, "on-demand": False, "spot": False, "reservation": True}
XPK = {
    "cluster create": _XPK | _SLICES | {"enable-gcsfuse-csi-driver": False},
    "storage attach": _XPK | {
        "type": ("gcsfuse", "gcpfilestore", "parallelstore", "pd", "lustre"), "bucket": True,
        "size": True, "mount-point": True, "readonly": ("true", "false"), "auto-mount": ("true", "false"),
        "mount-options": True,
    },
    "workload create": _XPK | _SLICES | {
        "workload": True, "command": True, "docker-image": True, "base-docker-image": True,
        "script-dir": True, "env-file": True, "env": True, "storage": True, "max-restarts": True,
        "priority": ("very-low", "low", "medium", "high", "very-high"), "restart-on-exit-codes": True,
        "termination-grace-period-seconds": True,
    },
    "workload list": _XPK | {"wait-for-job-completion": True, "timeout": True, "filter-by-job": True},
    "workload delete": _XPK | {"workload": True, "force": False},
}  # fmt: skip
SBATCH = {
    "job-name": True, "nodes": True, "ntasks-per-node": True, "gpus-per-node": True, "mem": True,
    "cpus-per-task": True, "time": True, "partition": True, "account": True, "qos": True,
    "constraint": True, "output": True, "open-mode": ("append", "truncate"), "signal": True,
    "requeue": False, "parsable": False, "array": True,
}  # fmt: skip


def install(folder: pathlib.Path, *names: str) -> dict[str, str]:
    """Makes the programs; returns the environment in which they stand before all others."""
    programs = folder / "bin"
    programs.mkdir()
    here = str(pathlib.Path(__file__).parent)
    for name in names:
        path = programs / name
        path.write_text(PROGRAM.format(python=sys.executable, here=here, folder=str(folder), name=name))
        path.chmod(0o755)
    write(folder, {})
    (folder / "workers").mkdir()
    return {"PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def calls(folder: pathlib.Path) -> list[list[str]]:
    """The commands that were run, in order."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(folder) -> dict:
    return json.loads(pathlib.Path(folder, "state.json").read_text())


def write(folder, state: dict) -> None:
    path = pathlib.Path(folder, "state.json")
    path.with_suffix(".new").write_text(json.dumps(state))
    path.with_suffix(".new").replace(path)


def main(folder: str, name: str, argv: list[str]) -> None:
    with open(f"{folder}/calls.jsonl", "a") as file:
        file.write(json.dumps([name, *argv]) + "\n")
    state = read(folder)
    code = {"gcloud": gcloud, "xpk": xpk, "sbatch": sbatch, "squeue": squeue, "srun": srun,
            "scontrol": scontrol, "compile": compile_step}[name](folder, state, argv)  # fmt: skip
    sys.exit(code)


def preempt(folder: str, name: str, state: str) -> None:
    """Takes slices away, as seen from a worker."""
    there = read(folder)
    there["tpus"][name]["states"] = [state]
    write(folder, there)


def refuse(sentence: str) -> None:
    print(f"ERROR: {sentence}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str], known: dict) -> tuple[list[str], dict]:
    """Positional words and flags, where all are known and each has a value or has none, as it must."""
    words, given = [], {}
    for arg in argv:
        if not arg.startswith("--"):
            words.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        kind = known.get(name)
        if kind is None or bool(equals) != (kind is not False):
            refuse(f"unrecognized arguments: {arg}")
        if isinstance(kind, tuple) and value not in kind:
            refuse(f"argument --{name}: invalid choice: {value}")
        given[name] = value
    return words, given


# ---------------------------------------------------------------- TPU


def gcloud(folder, state, argv):
    alpha, argv = argv[0] == "alpha", argv[argv[0] == "alpha" :]
    if argv[:3] != ["compute", "tpus", "queued-resources"] or argv[3] not in GCLOUD:
        refuse(f"Invalid choice: {argv[:4]}")
    action = argv[3]
    words, given = parse(argv[4:], GCLOUD[action] | (ALPHA if alpha and action == "create" else {}))
    if "quiet" not in given or "project" not in given or "zone" not in given:
        refuse("would prompt")
    return globals()[f"_{action}"](folder, state, words, given)


def _create(folder, state, words, given):
    (name,) = words
    if name in state.get("tpus", {}):
        refuse(f"ALREADY_EXISTS: {name}")
    if ("node-id" in given) == ("node-count" in given) or ("node-count" in given) != (
        "node-prefix" in given
    ):
        refuse("Exactly one of (--node-id | --node-count --node-prefix) must be specified.")
    if (
        "spot" in given
        and "reserved" in given
        or ("max-run-duration" in given) != (given.get("provisioning-model") == "flex-start")
        or not {"accelerator-type", "runtime-version"} <= given.keys()
    ):
        refuse("INVALID_ARGUMENT")
    if state.get("quota"):
        refuse(f"RESOURCE_EXHAUSTED: {state['quota']}")
    lives = state.setdefault("lives", [])  # what happens to the next requests, in order
    tpu = {"states": lives.pop(0) if lives else list(TPU_STATES), "given": given}
    state.setdefault("tpus", {})[name] = tpu
    write(folder, state)
    for i in range(state.get("workers", 1)):
        home = pathlib.Path(folder, "workers", str(i))
        (home / ".local/bin").mkdir(parents=True)
        uv = home / ".local/bin/uv"
        uv.write_text(UV.format(python=sys.executable))
        uv.chmod(0o755)
    return 0


def _describe(folder, state, words, given):
    (name,) = words
    tpu = state.get("tpus", {}).get(name)
    if given.get("format") != "value(state.state)":
        refuse("unexpected format")
    if state.get("describe_fails", 0):
        state["describe_fails"] -= 1
        write(folder, state)
        print("ERROR: (gcloud) UNAVAILABLE: the service is busy", file=sys.stderr)
        return 1
    if tpu is None:
        print(f"ERROR: (gcloud.describe) NOT_FOUND: Resource '{name}' was not found", file=sys.stderr)
        return 1
    print(tpu["states"][0])
    if len(tpu["states"]) > 1:
        tpu["states"].pop(0)
        write(folder, state)
    return 0


def _delete(folder, state, words, given):
    import shutil

    (name,) = words
    tpus = state.get("tpus", {})
    if name not in tpus:
        print("ERROR: NOT_FOUND", file=sys.stderr)
        return 1
    if "force" not in given:
        refuse("FAILED_PRECONDITION: the nodes are still there")
    del tpus[name]
    write(folder, state)
    _kill(folder)
    shutil.rmtree(f"{folder}/workers")
    os.mkdir(f"{folder}/workers")
    return 0


def _kill(folder):
    """Ends what runs on the workers, as a preemption does."""
    import signal

    for pid in pathlib.Path(folder, "workers").glob("*/famx-*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass


def _homes(folder, state, words, given):
    name = words[-1].rstrip(":") if words else ""
    if state.get("tpus", {}).get(name, {}).get("states", [""])[0] != "ACTIVE":
        print("ERROR: the node is not READY", file=sys.stderr)
        sys.exit(1)
    homes = sorted(pathlib.Path(folder, "workers").iterdir())
    if (given.get("node"), given.get("worker")) == ("all", "all"):
        return homes
    return [homes[int(given["node"]) + int(given["worker"])]]


def _ssh(folder, state, words, given):
    import subprocess

    for home in _homes(folder, state, words, given):
        if state.get("ssh_fails", 0):
            state["ssh_fails"] -= 1
            write(folder, state)
            print("Permission denied (publickey).", file=sys.stderr)
            return 255
        path = f"{folder}/worker_bin{os.pathsep}/usr/bin{os.pathsep}/bin"
        env = {"HOME": str(home), "PATH": path, "STUBS": str(folder)}
        env["FAMX_TEST"] = os.environ.get("FAMX_TEST", "")  # ends with its test, see processes.py
        code = subprocess.run(["bash", "-c", given["command"]], cwd=home, env=env).returncode
        if code:
            return code
    return 0


def _scp(folder, state, words, given):
    import shutil

    source, _ = words
    for home in _homes(folder, state, words, given):
        shutil.copytree(source, home / os.path.basename(source), dirs_exist_ok=True)
    return 0


# On a worker: `uv venv` makes a python whose `-m famx.train` does what state.json says.
UV = """#!{python} -IS
import os, sys
if sys.argv[1] == "venv":
    assert sys.argv[2:5] == ["--quiet", "--allow-existing", "--python"], sys.argv
    os.makedirs("venv/bin", exist_ok=True)
    with open("venv/bin/python", "w") as file:
        file.write(os.environ.get("PYTHON_STUB") or open(os.environ["STUBS"] + "/python").read())
    os.chmod("venv/bin/python", 0o755)
else:
    assert sys.argv[1:6] == ["pip", "install", "--quiet", "--python", "venv/bin/python"], sys.argv
    requirement = sys.argv[6]
    assert requirement.startswith(("famx[tpu] @ file:///", "famx[tpu,seqio] @ file:///")), requirement
    assert os.path.isfile(requirement.partition("file://")[2]), requirement
"""


# ---------------------------------------------------------------- famx.compile

COMPILE = {"gin_file": True, "gin_bindings": True, "topology": True, "num_slices": True, "json": True}


def compile_step(folder, state, argv):
    """What `python -m famx.compile` does; state.json has its report, if there is one, and its code."""
    if argv[:2] != ["-m", "famx.compile"]:
        refuse(f"not famx.compile: {argv[:2]}")
    words, given = parse(argv[2:], COMPILE)
    if words or not {"topology", "num_slices", "json"} <= given.keys():
        refuse(f"bad arguments: {argv}")
    print("train on a slice: what famx.compile says")
    if state.get("report"):
        pathlib.Path(given["json"]).write_text(json.dumps([state["report"]]))
    return state.get("compile_code", 0)


# ---------------------------------------------------------------- GKE


def xpk(folder, state, argv):
    action = " ".join(argv[:2])
    if action not in XPK:
        refuse(f"invalid choice: {action}")
    words, given = parse(argv[2:], XPK[action])
    if "cluster" not in given:
        refuse("the following arguments are required: --cluster")
    if action == "storage attach" and "size" not in given:
        refuse("--size is required when attaching gcsfuse storage.")
    if action == "workload create":
        if ("docker-image" in given) == ("base-docker-image" in given):
            refuse("give one image")
        if "script-dir" in given and not os.path.isdir(given["script-dir"]):
            refuse("Directory path is invalid.")
        state["environment_file"] = pathlib.Path(given["env-file"]).read_text()
        names = [line for line in state["environment_file"].splitlines() if "=" not in line]
        state["environment"] = {name: os.environ[name] for name in names}
        write(folder, state)
        for name in names:  # xpk may show what it applies
            print(f"{name}={os.environ[name]}")
    if action == "workload list":
        return state.get("workload_code", 0)
    return state.get("xpk_code", 0)


# ---------------------------------------------------------------- Slurm


def sbatch(folder, state, argv):
    (script,), given = parse(argv, SBATCH)
    if state.get("sbatch_error"):
        refuse(state["sbatch_error"])
    lines = pathlib.Path(script).read_text().splitlines()
    _, options = parse([line.split(" ", 1)[1] for line in lines if line.startswith("#SBATCH ")], SBATCH)
    if any(c.isspace() for value in options.values() for c in value):
        refuse("a value of two words")
    state["options"] = options
    write(folder, state)
    print("4711;cluster" if "parsable" in given else "Submitted batch job 4711")
    return 0


def squeue(folder, state, argv):
    if state.get("queued"):
        print(state["queued"])
    return 0


def srun(folder, state, argv):
    flags = [word for word in argv[: argv.index("-m") - 1]]
    parse(flags, {"wait": True, "cpus-per-task": True})
    keep = ("JAX_LOCAL_DEVICE_IDS", "HF_TOKEN", "PLAIN")
    state["srun"] = {
        "flags": flags,
        "argv": argv[len(flags) :],
        "cwd": os.getcwd(),
        "env": {k: os.environ.get(k) for k in keep},
    }
    write(folder, state)
    return state.get("srun_code", 0)


def scontrol(folder, state, argv):
    assert argv == ["requeue", "4711"], argv
    state["requeued"] = state.get("requeued", 0) + 1
    write(folder, state)
    return 0
