"""Settings of the whole test suite: CPU, one compilation cache, reproducible hypothesis runs."""

import gc
import os
import pathlib
import sys
import tempfile

import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "optimization_level" not in os.environ.get("XLA_FLAGS", ""):  # subprocesses inherit them
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.FAST}".strip()
# Shared by the workers of one run and by later runs; subprocesses inherit it.
CACHE = pathlib.Path(tempfile.gettempdir()) / f"famx-jax-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A process that imports both triton and TensorFlow aborts; on CPUs torch does not need triton.
sys.modules.setdefault("triton", None)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from famx.data.tasks import registry  # noqa: E402

pytest_plugins = ["processes", "sampling", "fake_gcs"]

hypothesis.settings.register_profile("famx", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("famx")


def pytest_addoption(parser):
    parser.addoption("--memory", help="a memory to test as well, module:Expression")


def pytest_configure(config):
    if config.getoption("--memory"):
        import memories_table

        memories_table.add(config.getoption("--memory"))


@pytest.fixture(autouse=True)
def keep_tasks():
    """Forgets the tasks that a test registers: which tests share a process differs between runs."""
    before = dict(registry._FACTORIES)
    yield
    registry._FACTORIES.clear()
    registry._FACTORIES.update(before)


def pytest_runtest_teardown():
    """Drop compiled programs before a process reaches Linux's limit of memory maps.

    A test leaves hundreds; at vm.max_map_count, 65 530 by default, the next one crashes the process.
    """
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
