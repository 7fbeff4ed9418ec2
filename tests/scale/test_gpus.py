"""Programs for NVIDIA GPUs: descriptions of devices, kernels, CUDA graphs, cuDNN's operations."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from famx.base.chips import Chip, find
from famx.base.errors import ConfigError
from famx.modules import DecoderConfig
from famx.scale import bounds, costs, gpus, hlo, kernels, launches, topologies
from famx.scale.gpus import GPUS

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=1)

# ---------------------------------------------------------------- names and descriptions


@pytest.mark.parametrize("name, capability", [
    ("a100", "major: 8 minor: 0 feature_extension: NONE"),
    ("h100", "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES"),
    ("h200", "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES"),
    ("b200", "major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES"),
])  # fmt: skip
def test_descriptions_name_what_the_compiler_decides_by(name, capability):
    gpu, chip = GPUS[name], find(GPUS[name].kind)
    text = gpu.description
    assert chip.name.lower() == name and chip.flops and chip.link
    assert f"cuda_compute_capability: {{ {capability} }}" in text
    for version in ("driver_version", "runtime_version", "compile_time_toolkit_version"):
        assert f'  {version}: "13.0.0"\n' in text
    assert f"memory_bandwidth: {chip.bandwidth:.0f}\n" in text
    assert text.count("{") == text.count("}") and text.count('"') % 2 == 0
    # The data sheets' peak of float32 operations: two for each lane and clock.
    peak = {"a100": 19.5, "h100": 67, "h200": 67, "b200": 75}[name]
    assert 2 * gpu.cores * gpu.lanes * gpu.clock / 1000 == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("topology, sentence", [
    ("h100:9", "Unknown topology h100:9: name the GPUs of one machine, h100 for one or up to h100:8."),
    ("a100:0", "Unknown topology a100:0: name the GPUs of one machine, a100 for one or up to a100:8."),
    ("b200:4x2", "Unknown topology b200:4x2: name the GPUs of one machine"),
    ("h100:", "Unknown topology 'h100:': use one of v4:2x2x1, "),
    ("h300", "Unknown topology 'h300': use one of v4:2x2x1, "),
])  # fmt: skip
def test_topologies_that_are_none(topology, sentence):
    with pytest.raises(ConfigError) as caught:
        topologies.devices(topology)
    assert str(caught.value).startswith(sentence)


def test_slices_are_for_tpus():
    with pytest.raises(ConfigError, match="--num_slices is for TPUs only, not for --topology=h100:8"):
        topologies.devices("h100:8", 2)


def test_missing_parts_of_the_compiler_say_how_to_install_them(monkeypatch, tmp_path):
    absent = {"jax_cuda13_plugin"}
    real = importlib.util.find_spec

    def find_spec(name):
        if name in absent:
            return None
        return importlib.util.spec_from_loader(name, None) if "plugin" in name else real(name)

    monkeypatch.setattr(gpus.importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigError, match=r'jax-cuda13-plugin: pip install "famx\[cuda13-compiler\]"'):
        topologies.devices("h100")
    absent.clear()
    monkeypatch.setattr(gpus, "_toolkits", lambda: [tmp_path])
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs the assembler ptxas and the library libdevice: pip"):
        topologies.devices("h100")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    with pytest.raises(ConfigError, match="needs the library libdevice: pip install "):
        topologies.devices("h100")


def test_toolkits_are_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("CUDA_ROOT", "/there/cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_cuda_data_dir=/here/cuda --xla_b=2")
    assert gpus._toolkits()[:2] == [pathlib.Path("/there/cuda"), pathlib.Path("/here/cuda")]


# ---------------------------------------------------------------- kernels and operations

SIZES = "q: bf16[6,128,4,64], k: bf16[6,384,2,64], own: bf16[6,128,2,64], x: f32[32,16], y: f32[16,8]"
PROGRAM = f"""HloModule m, is_scheduled=true

%product (a: f32[32,16], b: f32[16,8]) -> f32[32,8] {{
  %a = f32[32,16]{{1,0}} parameter(0)
  %b = f32[16,8]{{1,0}} parameter(1)
  ROOT %d = f32[32,8]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%body (t: (s32[], f32[32,16], f32[16,8])) -> (s32[], f32[32,16], f32[16,8]) {{
  %t = (s32[], f32[32,16]{{1,0}}, f32[16,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %u = f32[32,16]{{1,0}} get-tuple-element(%t), index=1
  %v = f32[16,8]{{1,0}} get-tuple-element(%t), index=2
  %g = f32[32,8]{{1,0}} fusion(%u, %v), kind=kCustom, calls=%product, backend_config={{"fusion_backend_config":{{"kind":"__triton_nested_gemm_fusion"}}}}
  %c = f32[32,16]{{1,0}} copy(%u)
  %j = s32[] fusion(%i), kind=kLoop, calls=%next
  ROOT %r = (s32[], f32[32,16]{{1,0}}, f32[16,8]{{1,0}}) tuple(%j, %c, %v)
}}

%next (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %s = s32[] add(%p, %one)
}}

%condition (t: (s32[], f32[32,16], f32[16,8])) -> pred[] {{
  %t = (s32[], f32[32,16]{{1,0}}, f32[16,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main ({SIZES}) -> f32[32,16] {{
  %q = bf16[6,128,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[6,384,2,64]{{3,2,1,0}} parameter(1)
  %own = bf16[6,128,2,64]{{3,2,1,0}} parameter(2)
  %x = f32[32,16]{{1,0}} parameter(3)
  %y = f32[16,8]{{1,0}} parameter(4)
  %all = (bf16[6,4,128,64]{{3,1,2,0}}, f32[6,4,128]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "PADDING"}}}}
  %lse = f32[6,4,128]{{2,1,0}} get-tuple-element(%all), index=1
  %causal = (bf16[6,4,128,64]{{3,1,2,0}}, f32[6,4,128]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %own, %own), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "CAUSAL"}}}}
  %back = (bf16[6,4,128,64]{{3,1,2,0}}, bf16[6,2,128,64]{{3,1,2,0}}, bf16[6,2,128,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %own, %own, %lse, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "CAUSAL"}}}}
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %t = (s32[], f32[32,16]{{1,0}}, f32[16,8]{{1,0}}) tuple(%start, %x, %y)
  %w = (s32[], f32[32,16]{{1,0}}, f32[16,8]{{1,0}}) while(%t), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %out = f32[32,16]{{1,0}} get-tuple-element(%w), index=1
}}
"""  # noqa: E501


def test_kernels_count_as_often_as_their_loop_runs():
    program = costs.count(hlo.parse(PROGRAM), kernels.of_model(CONFIG))
    ((_, _, outside), (runs, _, inside)) = program.walk()
    assert (runs, inside.kernels) == (5, 3)  # a product, a copy, the counter
    assert outside.kernels == 4  # three calls of cuDNN, a copy
    assert program.total("kernels") == 4 + 5 * 3


def test_a_loop_whose_end_is_computed_also_runs_its_condition():
    text = re.sub(r', backend_config=\{"known_trip_count".*', "", PROGRAM)
    program = costs.count(hlo.parse(text), kernels.of_model(CONFIG))
    assert program.total("kernels") == 4 + 5 * (3 + 1)


def test_operations_of_cudnn_and_of_products_within_fusions():
    program = costs.count(hlo.parse(PROGRAM), kernels.of_model(CONFIG))
    product = lambda rows, columns: 2 * 6 * 4 * rows * columns * 64
    causal = product(128, 128) / 2
    assert sum(flops for flops, _ in program.work) == 2 * product(128, 384) + (2 + 5) * causal
    assert program.inner[0].flops == 2 * 32 * 16 * 8
    assert not program.uncounted


@pytest.mark.parametrize("rows, columns, pairs", [(8, 8, 32), (8, 12, 32), (8, 6, 18 + 12)])
def test_a_causal_mask_starts_in_the_first_row_and_column(rows, columns, pairs):
    instruction = hlo.parse(PROGRAM).computations["main"].instructions["back"]
    queries, keys = (hlo.Array("bf16", (1, length, 1, 1)) for length in (rows, columns))
    assert kernels.of_model(CONFIG)(instruction, [queries, keys, keys]) == 5 * 2 * pairs


# ---------------------------------------------------------------- collectives

COLLECTIVES = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[4,8], q: f32[2], x: f32[32,16], y: f32[16,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[2]{0} parameter(1)
  %x = f32[32,16]{1,0} parameter(2)
  %y = f32[16,8]{1,0} parameter(3)
  %s = ((f32[4,8]{1,0}, f32[2]{0}), (f32[16,8]{1,0}, f32[8]{0})) all-gather-start(%p, /*index=1*/%q), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %z = f32[32,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d = (f32[16,8]{1,0}, f32[8]{0}) all-gather-done(%s)
  %g = f32[16,8]{1,0} get-tuple-element(%d), index=0
  %r = ((f32[16,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%g), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
  %o = f32[4,8]{1,0} reduce-scatter-done(%r)
  %a = f32[4,8]{1,0} all-reduce(%o), channel_id=1, replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  ROOT %c = f32[4,8]{1,0} copy(%a)
}
"""  # noqa: E501


def test_combined_collectives_and_those_that_share_a_channel():
    """A sum over a single device exchanges nothing."""
    program = costs.count(hlo.parse(COLLECTIVES))
    sent = {x.kind: (x.bytes, n) for x, n in program.all_collectives().items()}
    assert sent == {"all-gather": (4 * (16 * 8 + 8), 1), "reduce-scatter": (4 * 16 * 8, 1)}


@pytest.mark.parametrize("link, share", [(204, 0.5), (816, 1), (102, 0.25)])
def test_work_beside_a_collective_hides_it(link, share):
    """A product of a second beside a gather of two seconds, or half of one, or four."""
    product = 2 * 32 * 16 * 8
    chip = Chip("x", flops=product, memory=1, bandwidth=1e9, link=link)
    program = costs.count(hlo.parse(COLLECTIVES))
    network = bounds.Network([None] * 4, chip)
    hidden = bounds.hidden_seconds(program, chip, network)
    seconds = lambda kind: {x.kind: s for x, s in hidden.items()}[kind]
    assert seconds("all-gather") == pytest.approx(share * 544 * 3 / 4 / link)
    assert seconds("reduce-scatter") == 0


def test_collectives_at_once_share_the_work_beside_them():
    """So that no work hides more than its own time; a loop between them counts with all its runs."""
    second = '  %s2 = ((f32[2]{0}), f32[8]{0}) all-gather-start(%q), replica_groups={{0,1,2,3}}\n  %z ='
    end = "  %d2 = f32[8]{0} all-gather-done(%s2)\n  %d ="
    text = COLLECTIVES.replace("  %z =", second).replace("  %d =", end)
    (_, one), (_, other), _ = costs.count(hlo.parse(text)).beside
    assert one == other == [(32 * 16 * 8, 4 * (32 * 8 + 32 * 16 + 16 * 8) / 2)]
    gather = "  %g = (f32[32,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%x), replica_groups={{0,1}}"
    text = PROGRAM.replace("  %w =", f"{gather}\n  %w =")
    text = text.replace("  ROOT %out", "  %h = f32[64,16]{1,0} all-gather-done(%g)\n  ROOT %out")
    program = costs.count(hlo.parse(text), kernels.of_model(CONFIG))
    ((_, beside),) = program.beside
    (loop,) = program.inner
    assert beside == [(loop.total("flops"), loop.total("bytes"))] and loop.flops > 0


# ---------------------------------------------------------------- launches

THUNKS = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy         [source       | sink        ] kCopy
    002: kCustomKernel [source       | sink        ] fusion grid: [1, 1, 1] threads: [1, 1, 1]
003: kWhile         [prev=000 (1) | next=010 (1)]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        005: kCuDnn [source | next=006 (1)]
        006: kDynamicSliceFusion [prev=005 (1) | sink] params=1, results=1
            007: kCopy [source | sink] kCopy
    008: kWhile         [prev=000 (1) | sink]
condition:
        No thunks.      body:
        000: kCommandBuffer [source | sink]
            009: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
        010: kDynamicSliceFusion [prev=005 (1) | sink] params=1, results=1
            011: kCopy [source | sink] kCopy
    012: kConditional [prev=000 (1) | sink]
      false_branch:
        013: kCopy [source | sink] kCopy
      true_branch:
        014: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
        015: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
016: kCopy          [prev=003 (1) | sink        ] kCopy
"""


def test_graphs_and_single_launches_by_loop():
    program = launches.parse(THUNKS)
    assert (program.graphs, program.single) == (1, 1)
    (loop,) = program.inner
    assert (loop.graphs, loop.single) == (1, 0)
    assert [(x.graphs, x.single) for x in loop.inner] == [(1, 1), (0, 2)]


def test_a_loop_within_a_graph_launches_nothing():
    text = "000: kCommandBuffer [source | sink]\n" + re.sub("^", "    ", THUNKS, flags=re.MULTILINE)
    program = launches.parse(text.replace("    condition:", "condition:"))
    assert (program.graphs, program.single) == (1, 0)
    assert [(x.graphs, x.single) for x in program.inner[0].inner] == [(0, 0), (0, 0)]


def test_launches_of_other_loops_than_the_programs_are_unknown():
    region = costs.count(hlo.parse(PROGRAM))
    known = launches.Launches(2, 1, [launches.Launches(1, 0)])
    pairs = [(runs, x.kernels, y) for runs, _, x, y in launches.by_region(region, known)]
    assert pairs == [(1, 4, known), (5, 3, known.inner[0])]
    pairs = [y for *_, y in launches.by_region(region, launches.Launches(2, 1))]
    assert pairs[1] is None


# ---------------------------------------------------------------- with the compiler


def compile_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "famx.compile", "--gin_file=gin_configs/runs/pretrain.gin",
         "--gin_file=gin_configs/models/tiny.gin", "--gin_file=gin_configs/meshes/fsdp.gin",
         "--gin.DecoderConfig.num_layers=2", "--gin.TASK_FEATURE_LENGTHS={'targets': 64}", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": ""},
    )  # fmt: skip


def test_a_step_for_gpus_that_are_not_there(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'famx[cuda13-compiler]'")
    out = tmp_path / "out.json"
    bfloat16 = "--gin.DecoderConfig.dtype='bfloat16'"
    run = compile_main("--topology=h100", bfloat16, "--gin.BATCH_SIZE=4", f"--json={out}")
    assert run.returncode == 0, run.stderr
    (train,) = json.loads(out.read_text())
    assert train["chip"]["name"] == "H100" and train["available"] == 80e9
    cache, workspaces = train["notes"]  # no loop or kernel is unknown
    assert "L2 cache" in cache and workspaces.startswith("workspaces of cuDNN are chosen on the device")
    assert 1 < train["flops"] / train["model_flops"] < 2
    scans = [row for row in train["kernels"] if row["loop"].endswith("scan_memory")]
    # Two layers of two blocks. Each iteration is one CUDA graph.
    assert [(row["pass"], row["runs"], row["graphs"], row["single launches"]) for row in scans] == [
        ("forward", 4, 1, 0), ("backward", 4, 1, 0),
    ]  # fmt: skip
    assert all(5 < row["kernels"] < 60 for row in scans)
    assert train["launched"]["kernels"] == sum(row["runs"] * row["kernels"] for row in train["kernels"])
    assert 0 < train["launched"]["graphs"] < train["launched"]["kernels"] / 5
    assert train["bound"]["scheduled"] >= train["bound"]["roofline"] > 0
    assert " kernels; " in run.stdout and "\nkernels and launches: " in run.stdout


def test_a_token_is_one_graph(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'famx[cuda13-compiler]'")
    out = tmp_path / "out.json"
    run = compile_main(
        "--topology=h100", "--programs=prefill,decode", "--inference_batch_size=4", f"--json={out}",
        "--gin.DecoderConfig.dtype='bfloat16'", "--gin.BATCH_SIZE=4",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    prefill, decode = json.loads(out.read_text())
    token = decode["each"]["token"]
    assert (token["graphs"], token["single launches"]) == (1, 0)
    (loop,) = (row for row in decode["kernels"] if row["loop"].endswith("tokens"))
    assert loop["runs"] == 8 and loop["kernels"] == token["kernels"] < 60
    block = prefill["each"]["block"]
    assert 0 < block["graphs"] < block["kernels"] == round(prefill["launched"]["kernels"] / 8)
    assert f"; a token {token['kernels']} kernels, 1 graphs, 0 single launches" in run.stdout


def test_a_step_for_gpus_that_does_not_fit(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'famx[cuda13-compiler]'")
    out = tmp_path / "out.json"
    run = compile_main("--topology=h100:8", f"--gin.BATCH_SIZE={2**21}", f"--json={out}")
    assert run.returncode == 1, run.stderr
    (train,) = json.loads(out.read_text())
    assert not train["fits"] and train["needed"] > 80e9
    assert {row["axes"] for row in train["collectives"]} == {"fsdp"}
    assert train["bound"]["interconnect"] > 0 and train["chip"]["link"] == 450e9
    assert "does not fit" in run.stdout and "Try a smaller loss_chunk" in run.stdout


def report_of(tmp_path, *arguments):
    out = tmp_path / "out.json"
    run = compile_main("--gin.DecoderConfig.dtype='bfloat16'", f"--json={out}", *arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())[0], run.stdout


def test_graphs_that_hold_loops_and_collectives(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'famx[cuda13-compiler]'")
    two = ["--topology=h100:2", "--gin.BATCH_SIZE=2"]
    train, _ = report_of(tmp_path, *two, "--gin.XLA_OPTIONS='graphs'")
    assert (train["launched"]["graphs"], train["launched"]["single launches"]) == (1, 0)


def test_gathers_ahead_of_their_iteration(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'famx[cuda13-compiler]'")
    shares = []
    for choice in ("default", "overlap"):
        fsdp = ["--topology=h100:2", "--gin.BATCH_SIZE=2", f"--gin.XLA_OPTIONS='{choice}'"]
        train, printed = report_of(tmp_path, *fsdp)
        seconds = sum(row["seconds"] for row in train["collectives"])
        shares.append(sum(row["seconds"] * row["hidden"] for row in train["collectives"]) / seconds)
        assert f"; {shares[-1]:.0%} of the collectives' time beside other work" in printed
    assert 0 <= shares[0] < shares[1] <= 1
