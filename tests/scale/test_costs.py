"""Operations, bytes and collectives of a program against counts made by hand."""

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fam, make_model, make_params

import famx
from famx.memories import Fam
from famx.modules import DecoderConfig, Memory
from famx.scale import collectives, costs, hlo, kernels
from famx.training.flops import train_flops

ROOT = str(pathlib.Path(famx.__file__).parent.parent)


def count(function, *args):
    return costs.count(hlo.parse(jax.jit(function).lower(*args).compile().as_text()))


def regions(program):
    return {path: (runs, region) for runs, path, region in program.walk()}


# ---------------------------------------------------------------- compiled for this machine


def test_a_body_counts_as_often_as_it_runs():
    def twice(x, w):
        inner = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]
        outer = jax.lax.scan(lambda x, _: (inner(x) + 1, None), x, None, length=5)[0]
        return outer @ w

    x, w = jnp.ones((8, 64)), jnp.ones((64, 64))
    program = count(twice, x, w)
    assert program.total("flops") == (5 * 3 + 1) * 2 * 8 * 64 * 64
    assert sorted(runs for runs, *_ in program.walk())[-1] == 15


def test_a_loop_over_a_dynamic_bound_says_that_it_is_unknown():
    function = lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
    program = count(function, jnp.ones((16, 16)), jnp.int32(7))
    assert [region.trips for _, _, region in program.walk()] == [1, None]
    assert program.total("flops") == 2 * 16**3


@pytest.mark.parametrize("sizes", [(4, 8, 16, 32), (1, 5, 7, 3)])
def test_batched_products(sizes):
    b, m, k, n = sizes
    x, y = jnp.ones((b, m, k)), jnp.ones((b, k, n))
    program = count(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), x, y)
    assert program.total("flops") == 2 * b * m * k * n


def test_convolutions_count_what_meets_an_input():
    x, w = np.ones((2, 9, 3), np.float32), np.ones((4, 3, 5), np.float32)
    options = dict(window_strides=(2,), padding=[(1, 2)], rhs_dilation=(2,))
    numbers = ("NWC", "WIO", "NWC")
    program = count(
        lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options), x, w
    )
    pairs = sum(
        0 <= 2 * out + 2 * k - 1 < 9 for out in range((9 + 3 - 7) // 2 + 1) for k in range(4)
    )
    assert program.total("flops") in (0, 2 * 2 * 3 * 5 * pairs)  # 0: a library of the CPU's own
    line = (
        "  %c = f32[2,3,5]{2,1,0} convolution(%x, %w), window={size=4 stride=2 pad=1_2 rhs_dilate=2},"
        " dim_labels=b0f_0io->b0f\n"
    )
    text = (
        "HloModule m\n\nENTRY %main (x: f32[2,9,3], w: f32[4,3,5]) -> f32[2,3,5] {\n"
        "  %x = f32[2,9,3]{2,1,0} parameter(0)\n  %w = f32[4,3,5]{2,1,0} parameter(1)\n" + line + "}\n"
    )
    assert costs.count(hlo.parse(text)).total("flops") == 2 * 2 * 3 * 5 * pairs


@pytest.mark.parametrize("length", [0, 2])
def test_a_decoder_executes_what_its_sizes_say(length):
    """Dense attention to every column, every block updating the memory: all that, nothing twice."""
    model = make_model(memory=fam(length), num_layers=3, memory_segments=2, attention_backend="xla")
    c, batch, blocks = model.config, 2, 4
    length = blocks * c.block_size
    params = make_params(model.module)
    tokens = np.ones((batch, length), np.int32)
    program = count(lambda p, t: model.module.apply({"params": p}, t)[0], params, tokens)
    counted = {k: n // 3 for k, n in train_flops(c, batch, length).items()}
    pair = 4 * c.num_heads * c.head_dim
    columns = (c.memory_segments + 1) * c.block_size
    want = counted["projections"] + counted["feed_forward"] + counted["head"]
    want += batch * c.num_layers * length * columns * pair
    # The last block's update and the last layer's prompt are what the loss does not need.
    assert want + counted["memory"] <= program.total("flops") <= want + counted["memory"] * (
        blocks / (blocks - 1) * 1.25 if length else 1
    )


def test_a_training_step_without_recomputation_executes_three_passes():
    model = make_model(memory=Memory(), memory_segments=1, attention_backend="xla", num_layers=2)
    params, tokens = make_params(model.module), np.ones((2, 32), np.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    program = count(jax.grad(lambda p: model.loss(p, batch)[0]), params)
    c = model.config
    counted = train_flops(c, 2, 32)
    dense = 3 * 2 * c.num_layers * 32 * 2 * c.block_size * 4 * c.num_heads * c.head_dim
    assert program.total("flops") == sum(counted.values()) - counted["attention"] + dense


# ---------------------------------------------------------------- on eight devices

SHARDED = """
import sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
whole = lambda *spec: NamedSharding(mesh, P(*spec))
put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole(*spec))
def save(name, function, out, *args):
    text = jax.jit(function, out_shardings=out).lower(*args).compile().as_text()
    open(f"{sys.argv[1]}/{name}", "w").write(text)
save("reduce", lambda x, y: x @ y, whole("data"), put((64, 32), "data", "fsdp"), put((32, 16), "fsdp"))
save("gather", lambda x: x * 2, whole(), put((64, 32), "data", "fsdp"))
def loop(x, w):
    step = lambda x, w: (x @ jax.lax.with_sharding_constraint(w, whole()), None)
    return jax.lax.scan(step, x, w)[0]
save("loop", loop, whole("data"), put((64, 32), "data"), put((6, 32, 32), None, "fsdp"))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hlo")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": ROOT}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(directory)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return lambda name: costs.count(hlo.parse((directory / name).read_text()))


def by_kind(program):
    found = collections.defaultdict(float)
    for collective, number in program.all_collectives().items():
        found[collective.kind, collective.size] += number * collective.sent
    return dict(found)


def test_each_device_does_its_part(sharded):
    program = sharded("reduce")
    assert program.total("flops") == 2 * 64 * 32 * 16 / 8
    assert by_kind(program) == {("all-reduce", 4): 2 * 3 / 4 * 32 * 16 * 4}


def test_a_gather_over_two_axes(sharded):
    sent = sum(by_kind(sharded("gather")).values())
    # In one go, or along one axis and then the other.
    assert sent in (64 * 32 * 4 * 7 / 8, 64 * 32 * 4 * (1 / 2 + 3 / 8), 64 * 32 * 4 * (3 / 4 + 1 / 8))


def test_collectives_in_a_loop(sharded):
    program = sharded("loop")
    assert by_kind(program) == {("all-gather", 4): 6 * 3 / 4 * 32 * 32 * 4}
    assert program.total("flops") == 6 * 2 * 32 * 32 * 32


# ---------------------------------------------------------------- as the TPU compiler writes

FUSED = """HloModule m, is_scheduled=true

%slice (p0: bf16[8,16,128], p1: s32[]) -> bf16[1,16,128] {
  %p0 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  ROOT %d = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %z, %z), dynamic_slice_sizes={1,16,128}
}

%update (p0: bf16[8,16,128], p1: bf16[1,16,128], p2: s32[]) -> bf16[8,16,128] {
  %p0 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %z = s32[]{:T(128)} constant(0)
  ROOT %u = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p1, %p2, %z, %z)
}

%start (q: bf16[4,128]) -> (bf16[4,128], bf16[16,128], u32[]) {
  %q = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %s = (bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (a: bf16[4,128], b: bf16[16,128], c: f32[8,128]) -> (f32[8,128], bf16[4,128], bf16[16,128]) {
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} parameter(2)
  %g.2 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %m = f32[8,128]{1,0:T(8,128)} multiply(%c, %c)
  ROOT %t = (f32[8,128]{1,0:T(8,128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) tuple(%m, %a, %g.2)
}

ENTRY %main (x: bf16[8,16,128], i: s32[], y: bf16[4,128], c: f32[8,128], n: f32[64,1]) -> bf16[8,16,128] {
  %x = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %y = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(2)
  %c = f32[8,128]{1,0:T(8,128)} parameter(3)
  %n = f32[64,1]{1,0:T(8,128)} parameter(4)
  %f1 = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), kind=kLoop, calls=%slice
  %k = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%f1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"tiles": "{\\"rows\\": 512}"
}}
  %h = (bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%y), kind=kCustom, calls=%start
  %h0 = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%h), index=0
  %h1 = bf16[16,128]{1,0:T(8,128)(2,1)} get-tuple-element(%h), index=1
  %w = (f32[8,128]{1,0:T(8,128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) fusion(%h0, %h1, %c), kind=kCustom, calls=%beside
  %cs = (f32[64,1]{1,0:T(8,128)S(1)}, f32[64,1]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%n)
  %cd = f32[64,1]{1,0:T(8,128)S(1)} copy-done(%cs)
  ROOT %f2 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} fusion(%x, %k, %i), kind=kLoop, calls=%update
}
"""  # noqa: E501


def test_slices_updates_the_chip_s_own_memory_and_padding():
    program = costs.count(hlo.parse(FUSED))
    traffic = {name.split()[1]: moved for name, moved in program.traffic.items()}
    index = 4
    assert traffic["f1"] == traffic["f2"] == 16 * 128 * 2 + index
    assert traffic["cs"] == program.moved == 64 * 128 * 4  # one column takes a tile's 128
    assert traffic["w"] == 2 * 8 * 128 * 4


NESTED = """
%outer (p0: bf16[8,16,128], p1: s32[], p2: bf16[16,128]) -> bf16[16,128] {
  %p0 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(2)
  %in = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} fusion(%p0, %p1), kind=kLoop, calls=%slice
  %b = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%in)
  ROOT %a = bf16[16,128]{1,0:T(8,128)(2,1)} add(%b, %p2)
}

ENTRY %main (x: bf16[8,16,128], i: s32[], y: bf16[16,128]) -> bf16[16,128] {
  %x = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %y = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %f = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%x, %i, %y), kind=kOutput, calls=%outer
}
"""


def test_a_slice_in_a_fusion_within_a_fusion_is_read_as_a_slice():
    program = costs.count(hlo.parse(FUSED.partition("%update")[0] + NESTED))
    one, index = 16 * 128 * 2, 4
    assert program.bytes == 3 * one + index  # the slice, the other term, the sum


def test_one_collective_in_several_fusions_counts_once():
    program = costs.count(hlo.parse(FUSED))
    (collective,) = program.collectives
    assert program.collectives[collective] == 1
    assert collective.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and collective.sent == 16 * 128 * 2 * 3 / 4


def test_a_kernel_that_nobody_knows_is_named():
    assert costs.count(hlo.parse(FUSED)).uncounted == {"tpu_custom_call"}
    known = costs.count(hlo.parse(FUSED), lambda instruction, _: 5.0 * (instruction.name == "k"))
    assert not known.uncounted and known.total("flops") == 5


@pytest.mark.parametrize("kind, sent", [
    ("ALL_REDUCE", 2 * 3 / 4 * 512), ("ALL_GATHER", 3 * 512), ("REDUCE_SCATTER", 3 / 4 * 512),
    ("ONE_TO_ONE", 512),
])  # fmt: skip
def test_what_the_hosts_do_between_slices(kind, sent):
    text = (
        "ENTRY %m (x: f32[128]) -> f32[128] {\n"
        "  %x = f32[128]{0:T(128)} parameter(0)\n  %a = token[] after-all()\n"
        "  %s = (f32[128]{0:T(128)}, u32[]{:S(2)}, token[]) send(%x, %a), channel_id=2,"
        ' is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:3,4}x{0:3}",'
        f'_xla_megascale_transfer_type="{kind}"}}\n'
        "  %r = (f32[128]{0:T(128)}, u32[]{:S(2)}, token[]) recv(%a), channel_id=1\n"
        "  %d = (f32[128]{0:T(128)}, token[]) recv-done(%r)\n"
        "  ROOT %g = f32[128]{0:T(128)} get-tuple-element(%d), index=0\n}\n"
    )
    program = costs.count(hlo.parse(text))
    ((collective, number),) = program.collectives.items()
    assert collective.kind.startswith(collectives.DCN) and (number, collective.sent) == (1, sent)
    assert program.bytes == 2 * 512


@pytest.mark.parametrize("text, groups", [
    ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
])  # fmt: skip
def test_groups_in_every_notation(text, groups):
    assert collectives._groups(f", replica_groups={text}, dimensions={{0}}") == groups


@pytest.mark.parametrize("numbers", ["s8", "s16", "s32"])
def test_the_tiles_of_splash_attention_are_those_that_see_something(numbers):
    config = DecoderConfig(
        vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, block_size=128, memory_segments=1,
        memory=Fam(16),
    )  # fmt: skip
    # Each block sees the one before, itself and its memory; all memories lie in one tile.
    tiles = kernels.visible_tiles(config, 3)
    assert tiles == 3 + 3 + 3
    by_hand = dataclasses.replace(config, memory_segments=0, memory=Memory())
    assert kernels.visible_tiles(by_hand, 3) == 3
    line = (
        "  %splash_mha_dq_no_residuals.1 = bf16[2,4,384,64] custom-call(%i, %q, %k, %k),"
        ' custom_call_target="tpu_custom_call"\n'
    )
    text = (
        f"ENTRY %m (i: {numbers}[1,3,3], q: bf16[2,4,384,64], k: bf16[2,4,640,64])"
        " -> bf16[2,4,384,64] {\n"
        f"  %i = {numbers}[1,3,3] parameter(0)\n  %q = bf16[2,4,384,64] parameter(1)\n"
        "  %k = bf16[2,4,640,64] parameter(2)\n" + line + "}\n"
    )
    program = costs.count(hlo.parse(text), kernels.of_model(config))
    assert program.total("flops") == 3 * 2 * 2 * 4 * tiles * 128 * 128 * 64
