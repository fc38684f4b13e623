"""Programs for TPUs that are not there: what is counted in them, and what the command says."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from minicpm_jax.aot import report

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

from minicpm_jax import fit  # noqa: E402
from minicpm_jax.aot import hlo_cost, libtpu  # noqa: E402
from minicpm_jax.aot.flops import flops  # noqa: E402
from minicpm_jax.aot.programs import chip_bytes, config_of  # noqa: E402
from minicpm_jax.parallel.chips import CHIPS, Topology, chip_of  # noqa: E402
from minicpm_jax.parallel.sharding import default_mesh  # noqa: E402
from weights_io import catalog  # noqa: E402
from weights_io.errors import InputError  # noqa: E402
from weights_io.parameters import count  # noqa: E402

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

MIB = 2**20


def run(*arguments, module="minicpm_jax.fit"):
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)


def compiled(function, *shapes, donate=(), mesh=None, specs=()):
    """For a v5e, of arrays with these shapes (bfloat16 unless a dtype is given)."""
    devices = Topology.parse("v5e:1x1" if mesh is None else mesh).devices()
    if mesh is None:
        places = [SingleDeviceSharding(devices[0])] * len(shapes)
    else:
        places = [NamedSharding(Mesh(np.array(devices), ("x",)), spec) for spec in specs]
    arguments = [
        jax.ShapeDtypeStruct(s[:-1] if isinstance(s[-1], str) else s, s[-1] if isinstance(s[-1], str) else "bfloat16",
                             sharding=place)
        for s, place in zip(shapes, places, strict=True)
    ]  # fmt: skip
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("function", "shapes", "donate", "expected"),
    [
        # Both operands are read and the result written; 64 MiB are more than a chip's own memory holds.
        (lambda a, b: a @ b, [(8192, 4096), (4096, 8192)], (), 2 * (2 * 8192 * 4096 + 8192 * 8192)),
        # One matrix of the stack a turn.
        (
            lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
            [(24, 2048, 2048), (8, 2048)],
            (),
            2 * 24 * 2048 * 2048,
        ),
        # Sixteen rows, in place.
        (
            lambda c, x, i: jax.lax.dynamic_update_slice(c, x, (0, i, 0)),
            [(16, 65536, 128), (16, 1, 128), ("int32",)],
            (0,),
            2 * 16 * 128,
        ),
        (jnp.copy, [(16384, 8192)], (), 2 * 2 * 16384 * 8192),
        # Rows by number, of a table that is not read whole.
        (lambda t, i: t[i] * 2, [(100_000, 2048), (4096, "int32")], (), 2 * 2 * 4096 * 2048),
    ],
    ids=["product", "scan over stacked weights", "update in place", "copy", "gather"],
)
def test_bytes_of_programs_that_are_known(function, shapes, donate, expected):
    found = hlo_cost.traffic(compiled(function, *shapes, donate=donate)).hbm
    assert abs(found - expected) <= max(0.02 * expected, 8192), (found, expected)


@pytest.mark.tpu
def test_collectives_of_programs_that_are_known():
    split, whole = PartitionSpec("x"), PartitionSpec()
    text = compiled(lambda w, x: x @ w, (4096, 4096), (8, 4096), mesh="v5e:2x2", specs=(split, whole))
    assert hlo_cost.traffic(text).counts == {"all-reduce": 1}

    def layers(w, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0]

    specs = PartitionSpec(None, None, "x"), PartitionSpec("x")
    text = compiled(layers, (12, 2048, 2048), (32768, 2048), mesh="v5e:2x2", specs=specs)
    found = hlo_cost.traffic(text)
    assert set(found.counts) == {"all-gather"} and found.counts["all-gather"] in (12, 13)  # a turn ahead
    assert found.bytes["all-gather"] == found.counts["all-gather"] * 2 * 2048 * 2048


def test_the_picture_of_a_chips_memory(tmp_path):
    """Its parts sum up to what the program needs, also of one that does not compile."""
    from minicpm_jax.aot import picture

    held = {"weights": 5 * 10**9, "cache": 2 * 10**9}
    fits = report.Report("v5e:1x1", "", 17 * 10**9, 8 * 10**9, True, 7 * 10**9, held, temporaries=10**9)
    bars = [("fits", fits), ("not", report.Report("v5e:1x1", "", 17 * 10**9, 20 * 10**9, False, held=held))]
    assert [sum(picture.parts(found).values()) for _, found in bars] == [found.needed for _, found in bars]
    picture.draw(tmp_path / "memory.png", bars)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_of_a_text():
    """What XLA seldom writes: padding, memory that is not HBM, branches, a loop that says how often it runs."""
    text = """HloModule m

%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %near = f32[8,64]{1,0:T(8,128)S(1)} negate(%x)
  %far = f32[8,64]{1,0:T(8,128)} negate(%near)
  ROOT %t = (s32[], f32[8,64]{1,0:T(8,128)}) tuple(%i, %far)
}

%end (q: (s32[], f32[8,64])) -> pred[] {
  %q = (s32[], f32[8,64]{1,0:T(8,128)}) parameter(0)
  ROOT %data = pred[] custom-call(%q), custom_call_target="Anything"
}

ENTRY %main (a: f32[8,64]) -> f32[8,64] {
  %a = f32[8,64]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %t0 = (s32[], f32[8,64]{1,0:T(8,128)}) tuple(%zero, %a)
  %w = (s32[], f32[8,64]{1,0:T(8,128)}) while(%t0), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,64]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""  # noqa: E501
    assert hlo_cost.traffic(text).hbm == 5 * 2 * 8 * 128 * 4


def test_a_collective_beside_a_loop_counts_once():
    """What it is doing stands in the loop's fusions too, under its channel, which pass on its arrays; the loop's own
    count each turn, sums of several arrays too, which XLA gives a channel that others have."""
    text = """HloModule m

%began (a: f32[8]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%a), channel_id=5, dimensions={0}
}

%goes_on (b: f32[8]) -> f32[64] {
  %b = f32[8]{0} parameter(0)
  ROOT %h = f32[64]{0} all-gather(%b), channel_id=5, dimensions={0}
}

%sums (c: f32[8], d: f32[8]) -> (f32[4], f32[4]) {
  %c = f32[8]{0} parameter(0)
  %d = f32[8]{0} parameter(1)
  %both = (f32[8]{0}, f32[8]{0}) all-reduce(%c, %d), channel_id=5
  %one = f32[8]{0} get-tuple-element(%both), index=0
  %other = f32[8]{0} get-tuple-element(%both), index=1
  %k = f32[4]{0} dynamic-slice(%one), dynamic_slice_sizes={4}
  %l = f32[4]{0} dynamic-slice(%other), dynamic_slice_sizes={4}
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%k, %l)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %f = f32[64]{0} fusion(%p), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%goes_on
  %u = (f32[4]{0}, f32[4]{0}) fusion(%p, %p), kind=kCustom, calls=%sums
  ROOT %r = f32[8]{0} all-reduce(%p), channel_id=6
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = f32[64]{0} fusion(%x), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%began
  ROOT %w = f32[8]{0} while(%x), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    found = hlo_cost.traffic(text)
    assert (found.counts, found.bytes) == (
        {"all-gather": 1, "all-reduce": 5, "reduce-scatter": 5},
        {"all-gather": 64 * 4, "all-reduce": 5 * 8 * 4, "reduce-scatter": 5 * 2 * 8 * 4},
    )


def test_arithmetic_is_counted_before_compiling():
    def program(w, x):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None), x, w)[0]

    w, x = jax.ShapeDtypeStruct((5, 64, 64), "float32"), jax.ShapeDtypeStruct((3, 64), "float32")
    assert flops(jax.jit(program).trace(w, x).jaxpr) == 5 * 2 * 3 * 64 * 64
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(program(w, x))))
    assert flops(step.trace(w, x).jaxpr) == 4 * 5 * 2 * 3 * 64 * 64  # forwards twice, to inputs, to weights
    nested = jax.jit(lambda w, x: jax.jit(jax.jit(program))(w, x))  # a closed jaxpr inside of another
    assert flops(nested.trace(w, x).jaxpr) == 5 * 2 * 3 * 64 * 64


def test_bytes_of_arguments_on_a_chip():
    place = SingleDeviceSharding(jax.devices()[0])
    shapes = [jax.ShapeDtypeStruct((3, 5), dtype, sharding=place) for dtype in ("int4", "bfloat16", "bool")]
    assert chip_bytes(shapes) == 8 + 30 + 15


def test_the_table_of_chips():
    for chip in CHIPS.values():
        assert 20e12 < chip.flops < 1e15 and 0.5e12 < chip.bandwidth < 3e12 and chip.hbm >= 16 * 2**30
        assert 50 < chip.flops / chip.bandwidth < 600  # operations a byte
    assert (CHIPS["v5e"].flops, CHIPS["v5e"].bandwidth, CHIPS["v5e"].hbm) == (197e12, 0.82e12, 16 * 2**30)
    assert str(Topology.parse("v5e:2x2").doubled()) == "v5e:4x2" and Topology.parse("v4:2x2x1").chips == 4


def test_the_mesh_that_a_job_gets():
    """Rows of a chip's cache are whole registers of 128, so eight chips have 6 heads of 64 each, for 36 in all; of 8
    heads they would have 2 each, as four have without zeros."""
    assert default_mesh(config_of("minicpm-2b"), 8, training=True) == "fsdp=8"
    assert default_mesh(config_of("minicpm-2b"), 8, training=False) == "tensor=8"
    assert default_mesh(config_of("minicpm-1b"), 8, training=False) == "fsdp=2,tensor=4"
    assert default_mesh(config_of("minicpm-1b"), 4, training=False) == "tensor=4"
    assert default_mesh(config_of("minicpm-moe-8x2b"), 8, training=False) == "tensor=8"
    assert default_mesh(config_of("minicpm-2b"), 1, training=False) == "fsdp=1"
    assert count(config_of("Pico")) == catalog.find("pico").parameters  # which is here


@pytest.mark.tpu
@pytest.mark.parametrize("job", ["generate", "prefill", "lora", "finetune", "pretrain"])
def test_every_job_compiles(job):
    compiled = fit.compile_job("pico", job=job, batch=2, seq=64)
    memory = compiled.memory_analysis()
    if job in ("finetune", "pretrain"):  # masters and two moments in float32, which the step writes where they lie
        assert 12 * 1_296_000 <= memory.alias_size_in_bytes <= memory.argument_size_in_bytes < 13 * 1_296_000
    else:
        assert 2 * 1_296_000 <= memory.argument_size_in_bytes < 3 * 1_296_000


@pytest.mark.tpu
def test_decoding_of_the_2b_reads_its_weights_and_its_cache_once():
    """Weights of 5,449,761,792 bytes and a cache of 1,509,949,440, one v5e. Measured: 36,864 bytes more of arguments,
    0.3 MB of temporaries, 0.8 MB more of traffic."""
    compiled = fit.compile_job("minicpm-2b", "v5e:1x1", "generate", seq=4096)
    need, memory, text = 5_449_761_792 + 1_509_949_440, compiled.memory_analysis(), compiled.as_text()
    assert need <= memory.argument_size_in_bytes < 1.0001 * need
    assert memory.temp_size_in_bytes < MIB
    assert need <= hlo_cost.traffic(text).hbm < 1.001 * need
    copies = [i for i, _ in hlo_cost.Program(text).instructions() if i.opcode in ("copy", "copy-start", "transpose")]
    assert all(i.buffers[0].size < MIB for i in copies)


@pytest.mark.tpu(since="0.0.48")
def test_eight_chips_decode_with_their_heads_of_the_2b_and_copy_no_cache():
    """36 heads as 6 on each chip, 4,096 slots of 2 x 40 x 384 numbers: 0.25 GB of cache. Measured: 0.8 MB of
    temporaries, with libtpu 0.0.48 1.5."""
    job = fit.job_of(fit.Options("minicpm-2b", "v5e:2x4", "generate", max_seq_length=4096))
    found = report.report(job)
    assert found.mesh == "tensor=8" and found.aliased >= 4096 * 2 * 40 * 384 * 2
    assert found.temporaries < 2 * MIB and found.hbm_traffic < 1.01e9
    assert set(found.collectives) == {"all-reduce"}


@pytest.mark.tpu(since="0.0.48")
@pytest.mark.parametrize(
    ("mesh", "counts"), [(None, {"all-reduce": 81}), ("fsdp=8", {"all-reduce": 162, "collective-permute": 80})]
)
def test_rows_of_a_cache_lie_on_chips_of_their_own(mesh, counts):
    """8 rows of the 2B, in int8. Over tensor a step adds up the words, and twice in each layer; over fsdp a chip has
    one row, and each layer gathers and scatters once besides, and passes heads on to the next chips, 0.6 MB in all.
    Measured: at most 0.5 MB of temporaries, with libtpu 0.0.48 1.1."""
    found = report.report(fit.job_of(fit.Options("minicpm-2b", "v5e:2x4", batch_size=8, kv_bits=8, mesh=mesh)))
    assert found.temporaries < 2 * MIB and found.hbm_traffic < 1.01 * found.arguments < 2.1e9
    assert {kind: of["count"] for kind, of in found.collectives.items() if of["count"] > 40} == counts
    assert sum(of["bytes"] for of in found.collectives.values()) < 21e6


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """Of the 2B, as small sums XLA adds up otherwise."""
    shape = {**catalog.find("minicpm-2b").config, "num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("2b") / "config.json"
    path.write_text(json.dumps(shape))
    return str(path)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("mesh", "reductions", "scattered", "gathered", "words"),
    [  # measured: 3 all-reduces of 43,048 bytes, 1.377 GB, 1.696 GB; 13 of 67,624 bytes, 0.794 GB, 1.125 GB
        ("fsdp=8", 3, 1.38e9, 1.71e9, r"1,\d+,122753"),
        ("fsdp=4,tensor=2", 13, 0.80e9, 1.14e9, r"2,\d+,61377"),
    ],
)
def test_training_over_chips_gathers_weights_and_scatters_gradients(
    two_layers, mesh, reductions, scattered, gathered, words
):
    """Activations too, which tensor adds up once each. Norms' gradients and the sums of losses are all that all chips
    add up, nothing goes from all to all, and a chip has the logits of its own rows and words alone."""
    text = fit.compile_job(
        two_layers, "v5e:2x4", "finetune", batch_size=8, max_seq_length=1024, mesh=mesh, grad_checkpoint=True
    ).as_text()
    found = hlo_cost.traffic(text)
    assert set(found.counts) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found.counts["all-reduce"] <= reductions and found.bytes["all-reduce"] < 100_000
    assert 0.98 * scattered < found.bytes["reduce-scatter"] < scattered
    assert 0.98 * gathered < found.bytes["all-gather"] < gathered
    assert re.search(rf"f32\[{words}\]", text) and not re.search(r"f32\[8,\d+,(122753|61377)\]", text)


@pytest.mark.tpu
def test_a_v4_is_one_device_and_older_chips_are_two():
    for topology, dtype, devices, hbm in (("v4:2x2x1", "bfloat16", 4, 32), ("v3:2x2", "float32", 8, 16)):
        job = fit.job_of(fit.Options("pico", topology, batch_size=8, max_seq_length=64, dtype=dtype))
        assert len(job.devices) == devices and report.report(job).hbm == hbm * 2**30


@pytest.mark.tpu
@pytest.mark.parametrize("shape", ["1x1", "1x2", "2x1", "2x4", "1x8"])
def test_a_topology_may_be_smaller_than_a_host(shape):
    """Which libtpu before 0.0.50 has to be told."""
    for topology in (f"v5e:{shape}", f"v4:{shape}x1"):
        assert len(Topology.parse(topology).devices()) == Topology.parse(topology).chips


@pytest.mark.parametrize(
    ("release", "given", "told"),
    [
        ("0.0.42", "", ["--WINDOWED=100000", "--TILES=false"]),
        ("0.0.50.1", "--a=b", ["--a=b", "--WINDOWED=100000", "--TILES=false"]),
        ("0.0.52", "--WINDOWED=1", ["--WINDOWED=1"]),
        ("0.1.0", "", ["--WINDOWED=100000"]),
    ],
)
def test_what_each_release_of_libtpu_is_told(release, given, told, monkeypatch):
    """It ends the process at a flag that it does not know; what a user gave stands."""
    flags = {"WINDOWED": libtpu.WINDOWED, "TILES": libtpu.TILES}

    def spelled(text):
        return re.sub("WINDOWED|TILES", lambda found: flags[found[0]], text)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    monkeypatch.setattr(os, "environ", {"LIBTPU_INIT_ARGS": spelled(given)})
    libtpu.tell_libtpu()
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [spelled(flag) for flag in told]


@pytest.mark.tpu
def test_jax_names_the_chips_as_the_table_does():
    for chip in CHIPS.values():
        assert {chip_of(each.device_kind) for each in Topology.parse(chip.example).devices()} == {chip}


@pytest.mark.tpu
def test_the_command_says_what_it_takes():
    ran = run("--model", "pico", "--job", "generate", "--max-seq-length", 256)
    assert ran.returncode == 0, ran.stderr
    first, memory, *_ = ran.stdout.splitlines()
    assert first == "generate of pico on v5e:1x1: a token of each of 1 rows, cache of 256 slots"
    assert memory.startswith("memory a chip") and memory.endswith(": fits") and "of 17.18 GB" in memory
    for said in ("arguments", "temporaries", "compiling", "HBM traffic", "GFLOP a chip", "at most", "tokens/s"):
        assert said in ran.stdout
    assert all(
        re.fullmatch(r"(starting JAX|\w+ .*generate of pico for v5e:1x1) \.\.", x) for x in ran.stderr.splitlines()
    )


@pytest.mark.tpu
def test_figures_as_json():
    ran = run("--model", "pico", "--topology", "v5e:2x2", "--max-seq-length", 64, "--json")
    figures = json.loads(ran.stdout)
    assert figures["fits"] and figures["needed"] < figures["hbm"] == 16 * 2**30
    assert figures["mesh"] and figures["collectives"]["all-reduce"]["count"] > 0
    assert figures["tokens_per_second"] > 1000


@pytest.mark.tpu
def test_what_does_not_fit_and_what_would():
    ran = run("--model", "minicpm-2b", "--max-seq-length", 65536)
    assert ran.returncode == 0, ran.stderr
    assert "29.61 GB of 17.18 GB: does not fit" in ran.stdout
    assert "--topology v6e:1x1: 29.61 GB of 34.36 GB a chip" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:1x1"], "not of the form v5e:2x4; the chips are v2, v3, v4 and 3 more"),
        (["--topology", "v5e:2"], "v5e comes as v5e:2x2"),
        (["--topology", "v5e:0x2"], "v5e comes as v5e:2x2"),
        pytest.param(["--topology", "v5e:3x1"], "cannot be", marks=pytest.mark.tpu),
        pytest.param(["--topology", "v4:3x2x1"], "try v4:2x2x1.", marks=pytest.mark.tpu),
        pytest.param(["--topology", "v3:2x2"], "v3 in bfloat16; compute in float32", marks=pytest.mark.tpu),
        pytest.param(["--mesh", "fsdp=3"], "--mesh fsdp=3 is for 3 devices; there are 1", marks=pytest.mark.tpu),
        pytest.param(["--mesh", "rows=1"], "the axes are data, fsdp", marks=pytest.mark.tpu),
        pytest.param(["--model", "minicpm-3b"], "did you mean", marks=pytest.mark.tpu),
        pytest.param(["--model", "omnilmm-12b"], "does not hold the config.json", marks=pytest.mark.tpu),
        pytest.param(["--batch-size", "0"], "at least 1", marks=pytest.mark.tpu),
        pytest.param(
            ["--model", "pico", "--topology", "v5e:2x2", "--job", "lora", "--batch-size", "3"],
            "--batch-size 3 does not divide over the 4 devices",
            marks=pytest.mark.tpu,
        ),
        pytest.param(["--job", "finetune", "--quantize", "4"], "leave it out of --job finetune", marks=pytest.mark.tpu),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(arguments, said):
    ran = run(*arguments)
    told = [line for line in ran.stderr.splitlines() if not line.endswith(" ..")]  # of the progress
    assert (ran.returncode, ran.stdout, len(told)) == (2, "", 1), ran.stderr
    assert said in told[0]


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'minicpm-jax-mlx\[fit\]'"):
        Topology.parse("v5e:1x1").devices()


def test_two_names_of_one_option_are_refused():
    with pytest.raises(InputError, match="batch is the former name of batch_size; give one of them"):
        fit.compile_job("pico", batch=1, batch_size=2)
