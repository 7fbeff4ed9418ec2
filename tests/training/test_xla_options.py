"""`XLA_OPTIONS`: choices of compiler options, and that they reach the compiler of the training step."""

import jax
import pytest
from tiny import make_run

from famx.base import xla_options
from famx.base.errors import ConfigError
from famx.base.xla_options import CHOICES, Choice, compiler_options
from famx.training.step import make_initializer, make_train_step

MESH = {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}


@pytest.mark.parametrize("name", CHOICES)
def test_the_installed_xla_takes_every_option_with_a_program(name):
    """Every build of XLA knows the options for GPUs."""
    options = compiler_options(name, "gpu", MESH)
    assert options
    jax.jit(lambda: 0, compiler_options=options).lower().compile()


@pytest.mark.parametrize("options", [
    {"xla_gpu_enable_command_buffer": "+WHILE"}, {"xla_gpu_enable_command_buffer": "FUSION,LOOPS"},
    {"xla_gpu_no_such_option": True},
])  # fmt: skip
def test_xla_refuses_what_it_does_not_know(options):
    with pytest.raises(jax.errors.JaxRuntimeError, match="is not a valid|No such compile option"):
        jax.jit(lambda: 0, compiler_options=options).lower().compile()


@pytest.mark.parametrize("name, platform, mesh, sentence", [
    ("fast", "gpu", {}, "XLA_OPTIONS must be one of default, overlap, graphs; got 'fast'."),
    (
        "graphs", "tpu", {},
        "XLA_OPTIONS 'graphs' is for GPUs, and this run is on TPUs: choose 'default'.",
    ),
    (
        "overlap", "gpu", {"fsdp": 1},
        "XLA_OPTIONS 'overlap' changes nothing on a mesh with fsdp 1: choose 'default', or set"
        " make_mesh.fsdp.",
    ),
])  # fmt: skip
def test_choices_without_a_meaning(name, platform, mesh, sentence):
    with pytest.raises(ConfigError) as caught:
        compiler_options(name, platform, {**MESH, **mesh})
    assert str(caught.value) == sentence
    assert compiler_options("default", platform, MESH) == {}


def test_a_run_is_refused_before_anything_is_compiled():
    with pytest.raises(ConfigError, match="XLA_OPTIONS 'overlap' is for GPUs, and this run is on CPUs"):
        make_run(xla_options="overlap").ready()


def test_the_step_is_compiled_with_the_options(monkeypatch):
    """Called, and ahead of time; that XLA refuses an option shows that it came there."""
    monkeypatch.setitem(xla_options.CHOICES, "graphs", Choice("cpu", {"xla_gpu_no_such_option": True}))
    run = make_run(xla_options="graphs").ready(jax.devices()[:1])
    initialize, abstract = make_initializer(run)
    step = make_train_step(run, abstract)
    with run.on_mesh():
        lowered = step.lower(abstract, run.abstract_batch())
        with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_gpu_no_such_option'"):
            lowered.compile()
        batch = {name: jax.numpy.zeros(x.shape, x.dtype) for name, x in run.abstract_batch().items()}
        with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_gpu_no_such_option'"):
            step(initialize(jax.random.key(0)), batch)
