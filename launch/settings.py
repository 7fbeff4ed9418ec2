"""What a launch can be told: the fields of each kind of config, their defaults and their checks.

A file of launch/configs/ returns `tpu()`, `gke()`, `slurm()` or `local()` with some fields changed;
`--config.FIELD=VALUE` changes one on the command line.
"""

import os
import re

from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from launch import accelerators

_COMMON = dict(
    name="famx",  # of the job and of what it creates
    gin_files=(),  # before those of --gin_file
    gin_bindings=(),  # "NAME = VALUE", before those of --gin.NAME=VALUE
    environment=ConfigDict(),  # variables of the training and their values
    environment_from=(),  # variables that are taken from where the launch runs: the place for secrets
    restarts=10,  # how often a run that was preempted or stopped is begun again
    stage_dir="~/.famx/launch",  # where files are put together
)
_WORKERS = dict(wheel="", python="3.12")  # wheel "": built from this source tree
_CLOUD = dict(
    project="",
    zone="",
    accelerator="",  # v5litepod-256: family, and chips or (v2 to v5p) cores of a slice
    num_slices=1,
    provisioning="on_demand",  # on_demand, spot or reserved
    bucket="",  # of Cloud Storage, mounted where MODEL_DIR lies
    mount="/mnt/famx",
    price_per_chip_hour=0.0,  # what you pay, for the estimate; 0: it ends at chip-hours
)
_TPU = dict(
    runtime_version="",  # "": the one for this accelerator
    network="",
    subnetwork="",
    service_account="",
    internal_ips=False,  # without external addresses; ssh then goes through IAP
    valid_until_duration="",  # how long the request may wait, such as 6h; "": without end
    poll_seconds=30,
)
_GKE = dict(
    cluster="",
    image="",  # has famx and the gin files; or
    base_image="",  # has jax: xpk adds famx's wheel and the gin files
    reservation="",  # its name, if provisioning is reserved
    priority="medium",
    bucket_gigabytes=1000,  # what Kubernetes is told of the bucket's size
)
_SLURM = dict(
    nodes=1,
    gpus_per_node=8,
    cpus_per_task=0,  # 0: the cluster's default
    memory="",  # of a node, such as 500G
    time="24:00:00",
    partition="",
    account="",
    qos="",
    constraint="",
    python="python",  # on the nodes, with famx installed
    prologue="",  # a shell file that the job sources first, for `module load` and the like
    warning_seconds=120,  # how long before the time limit the run is told to save and stop
)
_LOCAL = dict(
    platform="cpu",  # jax's name: cpu, cuda, ...
    processes=2,
    devices_per_process=1,
    grace_seconds=20,  # for the others to stop when one process died
)


def tpu(**changes) -> ConfigDict:
    """Config of `launch.tpu`: queued resources of Cloud TPU."""
    return _config("tpu", _COMMON | _WORKERS | _CLOUD | _TPU, changes)


def gke(**changes) -> ConfigDict:
    """Config of `launch.gke`: a cluster of Google Kubernetes Engine that xpk looks after."""
    return _config("gke", _COMMON | _WORKERS | _CLOUD | _GKE, changes)


def slurm(**changes) -> ConfigDict:
    """Config of `launch.slurm`."""
    return _config("slurm", _COMMON | _SLURM, changes)


def local(**changes) -> ConfigDict:
    """Config of `launch.local`."""
    return _config("local", _COMMON | _LOCAL, changes)


def _config(kind: str, fields: dict, changes: dict) -> ConfigDict:
    for name in changes:
        if name not in fields:
            raise ConfigError(f"A {kind} config has no field {name}.{nearest(name, fields)}")
    return ConfigDict({"kind": kind, **fields, **changes}, convert_dict=True)


# ---------------------------------------------------------------- checks

NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_SLURM_WORD = r"[A-Za-z0-9_.,:|&!@/=-]+"
_PATTERNS = {  # field -> pattern, and what it must be in words
    "name": (NAME, "lower-case letters, digits and hyphens, from a letter on, at most 40"),
    "project": (r"([a-z][-a-z0-9.]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "zone": (r"[a-z]+(-[a-z]+)+[0-9]+-[a-z]", "a zone such as us-west4-a"),
    "bucket": (r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]", "the name of a bucket, without gs://"),
    "mount": (r"/[A-Za-z0-9_./-]+", "an absolute path of letters, digits, _ . / and -"),
    "runtime_version": (r"[a-z0-9][-.a-z0-9]*", "a TPU software version such as v2-alpha-tpuv5-lite"),
    "network": (r"[a-z0-9][-a-z0-9./]*", "the name of a network"),
    "subnetwork": (r"[a-z0-9][-a-z0-9./]*", "the name of a subnetwork"),
    "service_account": (r"[a-z0-9][-a-z0-9.]*@[a-z0-9.-]+", "the address of a service account"),
    "valid_until_duration": (r"([0-9]+[smhd])+", "a duration such as 6h"),
    "cluster": (NAME, "lower-case letters, digits and hyphens, from a letter on, at most 40"),
    "image": (r"[a-z0-9][A-Za-z0-9_.:/@-]*", "the name of a container image"),
    "base_image": (r"[a-z0-9][A-Za-z0-9_.:/@-]*", "the name of a container image"),
    "reservation": (r"[a-z0-9][-a-z0-9./]*", "the name of a reservation"),
    "priority": (r"(very-)?(low|high)|medium", "very-low, low, medium, high or very-high"),
    "provisioning": (r"on_demand|spot|reserved", "on_demand, spot or reserved"),
    "memory": (r"[0-9]+[KMGT]?", "a size such as 500G"),
    "time": (r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "a Slurm time such as 24:00:00 or 2-00:00:00"),
    "partition": (_SLURM_WORD, "one word"),
    "account": (_SLURM_WORD, "one word"),
    "qos": (_SLURM_WORD, "one word"),
    "constraint": (_SLURM_WORD, "one word"),
    "platform": (r"[a-z0-9]+", "one of jax's platforms, such as cpu or cuda"),
}
_REQUIRED = {
    "tpu": ("name", "project", "zone", "accelerator", "bucket"),
    "gke": ("name", "project", "zone", "accelerator", "cluster", "bucket"),
    "slurm": ("name", "time"),
    "local": ("name", "platform"),
}
_AT_LEAST = {
    "num_slices": 1, "nodes": 1, "processes": 1, "devices_per_process": 1, "bucket_gigabytes": 1,
    "poll_seconds": 0, "restarts": 0, "gpus_per_node": 0, "cpus_per_task": 0, "warning_seconds": 1,
    "grace_seconds": 0, "price_per_chip_hour": 0,
}  # fmt: skip


def check(config: ConfigDict, kind: str) -> ConfigDict:
    """The config of a launcher with what it left open filled in.

    Raises ConfigError for another kind of config, for an unknown field, and for a value that cannot
    be what it stands for: nothing that passes can end a word or a line of a command.
    """
    if config.get("kind") != kind:
        what = config.get("kind") or "no"
        raise ConfigError(
            f"launch.{kind} was given a {what} config: take one made with launch.settings.{kind}()."
        )
    known = {"tpu": tpu, "gke": gke, "slurm": slurm, "local": local}[kind]()
    for name in config:
        if name not in known:
            raise ConfigError(f"A {kind} config has no field {name}.{nearest(name, known)}")
    for name in _REQUIRED[kind]:
        if not config[name]:
            raise ConfigError(f"--config.{name} is not set.")
    for name, (pattern, words) in _PATTERNS.items():
        value = config.get(name)
        if value and not re.fullmatch(pattern, value):
            raise ConfigError(f"--config.{name} must be {words}, not {value!r}.")
    for name, least in _AT_LEAST.items():
        if name in config and config[name] < least:
            raise ConfigError(f"--config.{name} must be at least {least}, not {config[name]}.")
    config = ConfigDict(config)
    if "accelerator" in config:
        slice_ = accelerators.parse(config.accelerator)
        if not config.get("runtime_version", "unused"):
            config.runtime_version = slice_.runtime
    if kind in ("tpu", "gke") and not re.fullmatch(r"3\.[0-9]+", config.python):
        raise ConfigError(f"--config.python must be a version such as 3.12, not {config.python!r}.")
    if kind == "gke" and bool(config.image) == bool(config.base_image):
        raise ConfigError("Set either --config.image or --config.base_image.")
    if kind == "gke" and (config.provisioning == "reserved") != bool(config.reservation):
        raise ConfigError("--config.provisioning='reserved' and --config.reservation go together.")
    return config


_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)


def environment(config: ConfigDict) -> tuple[dict[str, str], dict[str, str]]:
    """The variables of the training: those that may be shown, and those that are secret.

    Secret is what comes from `environment_from` or is named like a token, key or password. Raises
    ConfigError for a bad name, a value of several lines, or a variable that is not set here.
    """
    values = {name: str(value) for name, value in config.environment.items()}
    for name in config.environment_from:
        if name not in os.environ:
            raise ConfigError(f"--config.environment_from names {name}, which is not set here.")
        values[name] = os.environ[name]
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{name!r} cannot be the name of an environment variable.")
        if any(c in value for c in "\n\r\0"):
            raise ConfigError(f"The value of {name} must be a single line.")
    secret = lambda name: name in config.environment_from or _SECRET.search(name)
    shown = {name: value for name, value in values.items() if not secret(name)}
    return shown, {name: value for name, value in values.items() if secret(name)}
