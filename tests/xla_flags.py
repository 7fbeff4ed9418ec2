"""XLA's flags with which small programs compile fast, also for the processes that tests start."""

import importlib.metadata

# Small models take longer to compile than to run.
FAST = "--xla_backend_optimization_level=0"
# The older emitters of fusions take a quarter of the time; jax 0.11 has no others than the newer ones.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FAST += " --xla_cpu_use_fusion_emitters=false"
