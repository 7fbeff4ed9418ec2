"""The memory's figures against the oracle, which keeps every attention weight."""

import dataclasses

import numpy as np
import pytest
from memories_table import REMEMBERING
from modules.helpers import config, precision, random_params, random_tokens
from modules.oracle import Oracle

from famx.analysis import MemoryMonitor
from famx.memories import Fam, Infini
from famx.modules import Decoder, Memory

S = 4
FLOAT64 = dict(dtype="float64", param_dtype="float64")
VARIANTS = {
    "plain": {},
    "GQA, M 2": dict(num_heads=4, num_kv_heads=2, head_dim=4, memory_segments=2),
    "gated, normalized, M 0": dict(memory=Fam(2, update="gated", normalize=True), memory_segments=0),
    "one layer, prefix": dict(num_layers=1, memory=Fam(3, start_from="prefix")),
}


class Watching(Oracle):
    """Notes, block after block and layer after layer, both masses and the mean square of `F`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weights, self.notes = [], []

    def attend(self, *args):
        out = super().attend(*args)
        self.weights.append(out[1])
        return out

    def block(self, w, inputs, *args):
        self.weights = []
        outputs, memory = super().block(w, inputs, *args)
        masses = [weights[:, : self.c.memory_columns].sum(axis=1).mean() for weights in self.weights]
        tokens, queries = masses[: len(inputs)], masses[len(inputs) :]
        self.notes.append([np.mean(tokens), np.mean(queries), np.mean(np.square(memory))])
        return outputs, memory


def watch(c, params, tokens):
    """`[B, blocks, layers, 3]`."""
    found = []
    for row in tokens:
        oracle = Watching(c, params)
        oracle.read(row)
        found.append(np.reshape(oracle.notes, (-1, c.num_layers, 3)))
    return np.array(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_figures_are_those_of_the_oracle(name):
    c = config(**VARIANTS[name], **FLOAT64)
    params, tokens = random_params(c), random_tokens(2, 6 * S + 3)  # what is over is not read
    with precision(c):
        health = MemoryMonitor(Decoder(c)).measure(params, tokens)
    expected = watch(c, params, tokens[:, : 6 * S])
    on_memory, on_itself, _ = np.moveaxis(expected.mean(axis=(0, 1)), -1, 0)
    np.testing.assert_allclose(health.shares["tokens_on_memory"], on_memory, atol=1e-9)
    np.testing.assert_allclose(health.shares["memory_on_itself"], on_itself, atol=1e-9)
    assert health.updates == (1, 2, 4, 6)
    rms = np.sqrt(expected[..., 2].mean(axis=0))  # [blocks, layers]
    np.testing.assert_allclose(health.figures["rms"], rms[[0, 1, 3, 5]], atol=1e-9)


def test_scalars_name_layers_and_updates():
    c = config()
    health = MemoryMonitor(Decoder(c)).measure(random_params(c), random_tokens(2, 4 * S))
    scalars = health.scalars()
    by_layer = ("tokens_on_memory", "memory_on_itself", "rms_first", "rms_last")
    assert set(scalars) == {f"memory/{k}/layer_{i}" for k in by_layer for i in (0, 1)} | {
        f"memory/rms/update_{n}" for n in (1, 2, 4)
    }
    assert scalars["memory/tokens_on_memory/layer_1"] == health.shares["tokens_on_memory"][1]
    assert scalars["memory/rms_first/layer_1"] == health.figures["rms"][0, 1]
    assert scalars["memory/rms_last/layer_0"] == health.figures["rms"][2, 0]
    second = np.sqrt(np.mean(health.figures["rms"][1] ** 2))
    assert scalars["memory/rms/update_2"] == pytest.approx(second)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", REMEMBERING)
def test_every_memory_has_figures_of_each_layer(name):
    c = config(memory=REMEMBERING[name])
    health = MemoryMonitor(Decoder(c)).measure(random_params(c), random_tokens(2, 4 * S))
    of_memory = 1 if c.memory.through_depth else c.num_layers
    assert health.figures
    for values, layers in ((health.shares, c.num_layers), (health.figures, of_memory)):
        for x in values.values():
            assert x.shape[-1] == layers and np.isfinite(x).all()


def test_the_gate_of_infini_is_the_share_of_the_memory():
    c = config(memory=Infini(), memory_segments=0)
    params = random_params(c)
    health = MemoryMonitor(Decoder(c)).measure(params, random_tokens(2, 4 * S))
    share = np.mean(1 / (1 + np.exp(-params["layers"]["memory"]["gate"])), axis=1)
    np.testing.assert_allclose(health.figures["gate"][-1], share, rtol=1e-5)
    # The first of four blocks finds nothing written.
    np.testing.assert_allclose(health.shares["tokens_on_memory"], share * 3 / 4, rtol=1e-5)


def test_nothing_is_compiled_again_whatever_the_length():
    c = config()
    monitor, params = MemoryMonitor(Decoder(c)), random_params(c)
    for blocks in (1, 3, 40):
        assert monitor.measure(params, random_tokens(2, blocks * S)).updates[-1] == blocks
    assert monitor._step._cache_size() == monitor._initial._cache_size() == 1


def test_the_training_runs_computation_settings_do_not_matter():
    c, tokens = config(), random_tokens(1, 8 * S)
    params = random_params(c)
    first, second = (
        MemoryMonitor(Decoder(dataclasses.replace(c, **changes))).measure(params, tokens)
        for changes in ({}, dict(blocks_per_chunk=3, remat="full"))
    )
    np.testing.assert_array_equal(first.shares["tokens_on_memory"], second.shares["tokens_on_memory"])
    np.testing.assert_array_equal(first.figures["rms"], second.figures["rms"])


def test_without_memory_or_a_whole_block_there_are_no_figures():
    without = config(memory=Memory())
    assert MemoryMonitor(Decoder(without)).measure(random_params(without), random_tokens(1, 8)) is None
    c = config()
    assert MemoryMonitor(Decoder(c)).measure(random_params(c), random_tokens(1, S - 1)) is None
