"""Launch configs: the fields of each kind, their defaults and their checks.

A config file, such as those in launch/configs/, returns `tpu()`, `gke()`, `slurm()` or `local()` with
some fields changed. `--config.FIELD=VALUE` overrides a field on the command line.
"""

import os
import re

from ml_collections import ConfigDict

from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from launch import accelerators

_COMMON = dict(
    name="famx",  # name of the job and of the resources that it creates
    gin_files=(),  # parsed before those of --gin_file
    gin_bindings=(),  # "NAME = VALUE", applied before those of --gin.NAME=VALUE
    environment=ConfigDict(),  # environment variables of the training: {name: value}
    environment_from=(),  # names of variables copied from the launcher's environment; use it for secrets
    restarts=10,  # maximum number of restarts after a preemption or a stop
    stage_dir="~/.famx/launch",  # local directory where the files of a launch are collected
)
_WORKERS = dict(
    wheel="",  # path of famx's wheel; "" builds it from this source tree
    python="3.12",  # Python version of the workers
    extras="tpu",  # extras of famx that the workers install: "tpu,seqio" for tasks of SeqIO
)
_CLOUD = dict(
    project="",
    zone="",
    accelerator="",  # such as v5litepod-256: family, and the slice's chips (v2 to v5p: cores)
    num_slices=1,
    provisioning="on_demand",  # on_demand, spot, reserved or (launch.tpu) flex_start
    reservation="",  # name of a reservation, if provisioning is "reserved"
    bucket="",  # Cloud Storage bucket that is mounted on the workers and holds MODEL_DIR
    mount="/mnt/famx",  # directory where the bucket is mounted
    price_per_chip_hour=0.0,  # your price, for the estimated cost; 0 estimates chip-hours only
)
_TPU = dict(
    runtime_version="",  # TPU software version; "" takes the default for the accelerator
    network="",
    subnetwork="",
    service_account="",
    internal_ips=False,  # create workers without external addresses and connect through IAP
    labels=ConfigDict(),  # labels of the slices, by which bills can be split: {name: value}
    max_run_duration="",  # time after which flex_start takes the slices away, such as 24h; at most 7 days
    valid_until_duration="",  # how long the request may wait for capacity, such as 6h; "" for ever
    poll_seconds=30,  # seconds between two queries of the state, and before a retry
)
_GKE = dict(
    cluster="",
    image="",  # container image with famx and the gin files; set this or base_image
    base_image="",  # container image with Python; xpk adds famx's wheel and the gin files
    priority="medium",
    bucket_gigabytes=1000,  # bucket size declared to Kubernetes, which demands one
    study_tasks=0,  # workloads that share the cells of a study (famx.ablate); 0: one training run
)
_SLURM = dict(
    nodes=1,
    gpus_per_node=8,
    cpus_per_task=0,  # 0 takes the cluster's default
    memory="",  # memory per node, such as 500G; "" takes the cluster's default
    time="24:00:00",  # time limit
    partition="",
    account="",
    qos="",
    constraint="",
    python="python",  # Python on the nodes that has famx installed
    prologue="",  # shell file sourced at the start of the job, for `module load` and the like
    warning_seconds=120,  # seconds before the time limit at which the run is told to save and stop
    study_tasks=0,  # tasks of an array that share the cells of a study (famx.ablate); 0: one training run
)
_LOCAL = dict(
    platform="cpu",  # JAX platform: cpu, cuda, ...
    processes=2,
    devices_per_process=1,
    grace_seconds=20,  # seconds that the other processes have to stop after one has died
)


def tpu(**changes) -> ConfigDict:
    """Config of `launch.tpu`, which trains on queued resources of Cloud TPU."""
    return _config("tpu", _COMMON | _WORKERS | _CLOUD | _TPU, changes)


def gke(**changes) -> ConfigDict:
    """Config of `launch.gke`, which trains on a Google Kubernetes Engine cluster through xpk."""
    return _config("gke", _COMMON | _WORKERS | _CLOUD | _GKE, changes)


def slurm(**changes) -> ConfigDict:
    """Config of `launch.slurm`, which trains on GPU nodes of a Slurm cluster."""
    return _config("slurm", _COMMON | _SLURM, changes)


def local(**changes) -> ConfigDict:
    """Config of `launch.local`, which trains in several processes on this machine."""
    return _config("local", _COMMON | _LOCAL, changes)


def _config(kind: str, fields: dict, changes: dict) -> ConfigDict:
    for name in changes:
        if name not in fields:
            raise ConfigError(f"A {kind} config has no field {name}.{nearest(name, fields)}")
    return ConfigDict({"kind": kind, **fields, **changes}, convert_dict=True)


# ---------------------------------------------------------------- checks

# Values end up in command lines and batch scripts, so none of these patterns lets a value contain
# anything that has a meaning for a shell.
_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_NAME_WORDS = "lower-case letters, digits and hyphens, starting with a letter, at most 40 characters"
_SLURM_WORD = r"[A-Za-z0-9_.,:|&!@/=-]+"
_PATTERNS = {  # {field: (pattern, description for the error message)}
    "name": (_NAME, _NAME_WORDS),
    "project": (r"([a-z][-a-z0-9.]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "zone": (r"[a-z]+(-[a-z]+)+[0-9]+-[a-z]", "a zone such as us-west4-a"),
    "bucket": (r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]", "a bucket, such as gs://my-bucket or my-bucket"),
    "extras": (r"[a-z0-9-]+(,[a-z0-9-]+)*", "names of extras with commas between them"),
    "mount": (r"/[A-Za-z0-9_./-]+", "an absolute path of letters, digits, _ . / and -"),
    "runtime_version": (r"[a-z0-9][-.a-z0-9]*", "a TPU software version such as v2-alpha-tpuv5-lite"),
    "network": (r"[a-z0-9][-a-z0-9./]*", "the name of a network"),
    "subnetwork": (r"[a-z0-9][-a-z0-9./]*", "the name of a subnetwork"),
    "service_account": (r"[a-z0-9][-a-z0-9.]*@[a-z0-9.-]+", "the address of a service account"),
    "valid_until_duration": (r"([0-9]+[smhd])+", "a duration such as 6h"),
    "max_run_duration": (r"([0-9]+[smhd])+", "a duration such as 24h"),
    "cluster": (_NAME, _NAME_WORDS),
    "image": (r"[a-z0-9][A-Za-z0-9_.:/@-]*", "the name of a container image"),
    "base_image": (r"[a-z0-9][A-Za-z0-9_.:/@-]*", "the name of a container image"),
    "reservation": (r"[a-z0-9][-a-z0-9./]*", "the name of a reservation"),
    "priority": (r"(very-)?(low|high)|medium", "very-low, low, medium, high or very-high"),
    "provisioning": (
        r"on_demand|spot|reserved|flex_start", "on_demand, spot, reserved or, with launch.tpu, flex_start"
    ),
    "memory": (r"[0-9]+[KMGT]?", "a size such as 500G"),
    "time": (r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "a Slurm time such as 24:00:00 or 2-00:00:00"),
    "partition": (_SLURM_WORD, "one word"),
    "account": (_SLURM_WORD, "one word"),
    "qos": (_SLURM_WORD, "one word"),
    "constraint": (_SLURM_WORD, "one word"),
    "platform": (r"[a-z0-9]+", "a JAX platform such as cpu or cuda"),
}
_LABEL = r"[a-z][-_a-z0-9]{0,62}", r"[-_a-z0-9]{0,63}"
_REQUIRED = {
    "tpu": ("name", "project", "zone", "accelerator", "bucket"),
    "gke": ("name", "project", "zone", "accelerator", "cluster", "bucket"),
    "slurm": ("name", "time"),
    "local": ("name", "platform"),
}
_AT_LEAST = {
    "num_slices": 1, "nodes": 1, "processes": 1, "devices_per_process": 1, "bucket_gigabytes": 1,
    "poll_seconds": 0, "restarts": 0, "gpus_per_node": 0, "cpus_per_task": 0, "warning_seconds": 1,
    "grace_seconds": 0, "price_per_chip_hour": 0, "study_tasks": 0,
}  # fmt: skip


def check(config: ConfigDict, kind: str) -> ConfigDict:
    """Checks a config and fills in defaults that depend on other fields.

    Args:
      config: the config.
      kind: "tpu", "gke", "slurm" or "local".

    Returns:
      A copy of the config.

    Raises:
      ConfigError: the config is of another kind, has an unknown field, lacks a required value, or has
        a value of the wrong form.
    """
    if config.get("kind") != kind:
        given = config.get("kind") or "no"
        raise ConfigError(
            f"launch.{kind} was given a {given} config: use one made by launch.settings.{kind}()."
        )
    known = {"tpu": tpu, "gke": gke, "slurm": slurm, "local": local}[kind]()
    for name in config:
        if name not in known:
            raise ConfigError(f"A {kind} config has no field {name}.{nearest(name, known)}")
    config = ConfigDict(config)
    if "bucket" in config:
        config.bucket = config.bucket.removeprefix("gs://").rstrip("/")
    for name in _REQUIRED[kind]:
        if not config[name]:
            raise ConfigError(f"--config.{name} is not set.")
    for name, (pattern, description) in _PATTERNS.items():
        value = config.get(name)
        if value and not re.fullmatch(pattern, value):
            raise ConfigError(f"--config.{name} must be {description}, not {value!r}.")
    for name, minimum in _AT_LEAST.items():
        if name in config and config[name] < minimum:
            raise ConfigError(f"--config.{name} must be at least {minimum}, not {config[name]}.")
    if "accelerator" in config:
        slice_ = accelerators.parse(config.accelerator)
        if not config.get("runtime_version", "unused"):
            config.runtime_version = slice_.runtime
    if kind in ("tpu", "gke") and not re.fullmatch(r"3\.[0-9]+", config.python):
        raise ConfigError(f"--config.python must be a version such as 3.12, not {config.python!r}.")
    if kind == "gke" and bool(config.image) == bool(config.base_image):
        raise ConfigError("Set exactly one of --config.image and --config.base_image.")
    if kind in ("tpu", "gke"):
        _check_provisioning(config, kind)
    if config.get("study_tasks"):
        _check_study(config)
    return config


def _check_provisioning(config: ConfigDict, kind: str) -> None:
    """Raises ConfigError if how slices are obtained and what belongs to it do not fit together."""
    reserved, flexible = (config.provisioning == way for way in ("reserved", "flex_start"))
    if config.reservation and not reserved or kind == "gke" and reserved and not config.reservation:
        raise ConfigError(
            "Set --config.reservation if and only if --config.provisioning is 'reserved'."
        )
    if kind == "gke":
        if flexible:
            raise ConfigError("--config.provisioning=flex_start is for launch.tpu: choose another one.")
        return
    if flexible != bool(config.max_run_duration):
        raise ConfigError(
            "Set --config.max_run_duration if and only if --config.provisioning is 'flex_start'."
        )
    for name, value in config.labels.items():
        if not (re.fullmatch(_LABEL[0], str(name)) and re.fullmatch(_LABEL[1], str(value))):
            raise ConfigError(
                f"The label {name}={value} of --config.labels must have lower-case letters, digits, _ and"
                " - alone, at most 63 each, and a letter first."
            )


def _check_study(config: ConfigDict) -> None:
    """Raises ConfigError if tasks of a study would have several processes: a cell is trained by one."""
    if config.get("nodes", 1) > 1 or config.get("num_slices", 1) > 1:
        raise ConfigError(
            "Each task of a study has one node or slice: set --config.nodes or --config.num_slices to 1,"
            " and their number in --config.study_tasks."
        )
    if "accelerator" in config and not accelerators.parse(config.accelerator).of_one_host:
        raise ConfigError(
            f"Each cell of a study is trained by one process, but {config.accelerator} has several hosts:"
            " set --config.accelerator to a slice of one host, such as v5litepod-8."
        )


_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)


def environment(config: ConfigDict) -> tuple[dict[str, str], dict[str, str]]:
    """Environment variables of the training.

    Returns:
      `(shown, secret)`. Variables of `environment_from`, and those named like a token, key or
      password, are secret: launchers mask their values in all output.

    Raises:
      ConfigError: an invalid name, a value with several lines, or a variable of `environment_from`
        that is not set.
    """
    values = {name: str(value) for name, value in config.environment.items()}
    for name in config.environment_from:
        if name not in os.environ:
            raise ConfigError(f"--config.environment_from names {name}, which is not set.")
        values[name] = os.environ[name]
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{name!r} is not a valid name of an environment variable.")
        if any(c in value for c in "\n\r\0"):
            raise ConfigError(f"The value of {name} must be a single line.")
    secret = lambda name: name in config.environment_from or _SECRET.search(name)
    shown = {name: value for name, value in values.items() if not secret(name)}
    return shown, {name: value for name, value in values.items() if secret(name)}
