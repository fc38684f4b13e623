"""Weights in 8 and 4 bits for generation, head and all: what that does to logits, and what a step then reads."""

import importlib
import importlib.util
import json
import shutil

import pytest
import tiny_adapter
import tiny_model
from documented_commands import typed

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from minicpm_jax import fit, load  # noqa: E402
from minicpm_jax.aot import hlo_cost  # noqa: E402
from minicpm_jax.aot.report import report  # noqa: E402
from minicpm_jax.cpu import form  # noqa: E402
from minicpm_jax.cpu.form import unstack_layers  # noqa: E402
from minicpm_jax.cpu.packed import FEW_OF_GROUPS, FEW_OF_HEAD, fixed_point, on_cpu  # noqa: E402
from minicpm_jax.layers.rope import positions_of  # noqa: E402
from minicpm_jax.parallel.sharding import pad_or_trim  # noqa: E402
from minicpm_jax.quantization.model import quantize_model  # noqa: E402
from minicpm_jax.quantization.packed import (  # noqa: E402
    QuantizedWeight,
    in_tiles,
    quantize_embedding,
    quantize_weight,
)
from weights_io import catalog  # noqa: E402
from weights_io.adapters import save_adapter  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.errors import InputError  # noqa: E402
from weights_io.files.safetensors import Computed, open_file, write_file  # noqa: E402
from weights_io.quantization.released import ReleasedForm, released_form  # noqa: E402

BACKENDS = ["minicpm_jax", "minicpm_mlx"]


def weights(model):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


@pytest.mark.parametrize("experts", [0, 8])
def test_loading_packs_what_a_loaded_model_would_be_packed_to(tmp_path, experts):
    """Tensor by tensor, and over a mesh: the same numbers, with zeros behind them."""
    shape = {"hidden_size": 64, "intermediate_size": 64}
    if experts:
        shape |= {"num_experts": experts, "num_experts_per_tok": 2}
    folder = tiny_model.write(tmp_path, **shape)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    expected = weights(quantize_model(load(folder)[0], 8, head=True))
    for where in (None, mesh):
        found = weights(load(folder, quantize=8, mesh=where)[0])
        assert found.keys() == expected.keys()
        for path, array in found.items():
            assert array.dtype == expected[path].dtype
            wanted = pad_or_trim(np.asarray(expected[path]), array.shape)
            np.testing.assert_array_equal(np.asarray(array), wanted, err_msg=path)
    packed = [x for x in jax.tree.leaves(load(folder, quantize=8, mesh=mesh)[0]) if x.dtype == jnp.int8]
    assert len(packed) == 8
    assert all(len({str(shard.index) for shard in x.addressable_shards}) >= 4 for x in packed[:-1])


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("out", [96, 33])  # an odd number of outputs has no pairs
@pytest.mark.parametrize("pack", ["8 bits", "4 bits", "head"])
def test_products_on_a_cpu_are_those_of_float32(pack, out):
    """Against float64, one row and many, of numbers of unlike sizes."""
    weight = random(out, 1920) * 0.02
    packed = quantize_embedding(weight) if pack == "head" else quantize_weight(weight, int(pack[0]), 64)
    turned, exact = on_cpu(packed), np.asarray(packed[...], np.float64)
    np.testing.assert_array_equal(turned[...], packed[...])
    assert (turned.shape, turned.dtype) == (packed.shape, packed.dtype)
    most = 0.6 if pack == "4 bits" and out % 2 == 0 else 1.1  # bytes, with the scales
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(turned)) < most * weight.size
    for rows in (1, FEW_OF_GROUPS, FEW_OF_GROUPS + 1, FEW_OF_HEAD + 1):
        x = random(rows, 1920) * jnp.exp(random(1920))
        wanted = np.asarray(x, np.float64) @ exact.T
        for shape in ((rows, 1920), (rows, 1, 1920)):
            y = np.asarray(jax.jit(lambda weight, x: weight.times(x))(turned, x.reshape(shape)))
            assert y.shape == (*shape[:-1], out)
            error = np.sqrt(np.mean((y.reshape(wanted.shape) - wanted) ** 2)) / wanted.std()
            assert error < 1e-6  # measured: at most 4e-7
        half = turned.times(x.astype(jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        assert np.abs(np.asarray(half, np.float64) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_whole_numbers_are_off_by_half_a_unit():
    x = jnp.concatenate([random(3, 64), jnp.zeros((1, 64))])
    for count in (3, 4):
        digits, units = fixed_point(x, count)
        places = 128.0 ** np.arange(count)[::-1, None, None]
        said = np.sum(np.asarray(digits, np.float64) * places, axis=0) * np.asarray(units, np.float64)
        assert np.all(np.abs(said - np.asarray(x)) <= 0.51 * units + 2e-7 * np.abs(x))
        np.testing.assert_allclose(units[:3, 0] * 127 * 128 ** (count - 1), jnp.abs(x[:3]).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_on_a_cpu_keeps_its_weights_packed(tmp_path, bits):
    """The same logits; and a program that has no weight unpacked, of any layer."""
    shape = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 3}
    model = load(tiny_model.write(tmp_path, **shape), quantize=bits, dtype="float32")[0]
    listed = unstack_layers(model)
    loaded = load(tmp_path / "model", quantize=bits, dtype="float32", decoding=True)[0]
    for path, leaf in weights(listed).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(weights(loaded)[path]), err_msg=path)
    for ids in (np.arange(3)[None], np.arange(24).reshape(2, 12)):
        expected = np.asarray(model(ids))
        np.testing.assert_allclose(listed(ids), expected, atol=1e-5 * np.abs(expected).max())
    one = jnp.zeros((1, 1), int)
    step = jax.jit(lambda model: model.hidden_states(one, positions_of(model.config, one.shape)))
    compiled = step.lower(listed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2048 * 2  # of 9 such matrices


@pytest.mark.parametrize(
    ("bits", "experts", "dora"), [(8, 0, False), (4, 0, True), (4, 4, False), (None, 0, True), (None, 4, False)]
)
def test_loaded_for_decoding_with_an_adapter(reference, tmp_path, monkeypatch, bits, experts, dora):
    """The logits of the model that is not for decoding, in float32; whole weights of a file in bfloat16."""
    monkeypatch.setattr(form, "has_matrix_unit", lambda: True)
    folder = reference("dense_bf16")
    if bits is not None or experts:
        more = {"num_experts": experts, "num_experts_per_tok": 2} if experts else {}
        folder = tiny_model.write(tmp_path, hidden_size=64, intermediate_size=64, **more)
    checkpoint = open_checkpoint(folder)
    save_adapter(tmp_path / "adapter", tiny_adapter.make(checkpoint, dora=dora), checkpoint.config)
    how = {"dtype": "float32", "adapter": tmp_path / "adapter", "quantize": bits}
    stacked, ready = (load(folder, **how, decoding=decoding)[0] for decoding in (False, True))
    assert len(ready.model.layers) == checkpoint.config.num_hidden_layers
    for ids in (np.arange(3)[None], np.arange(24).reshape(2, 12)):
        expected = np.asarray(stacked(ids))
        np.testing.assert_allclose(ready(ids), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command(backend):
    """pico in 8 bits still adds up."""
    options = ["--prompt", "12 + 7 = ?", "--quantize", "8", "--max-tokens", "16", "--verbose", "False"]
    ran = typed(f"{backend}.generate", *options)
    assert ran.stdout == "12 + 7 = 19\n", ran.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bits", "said"), [(3, "quantize is 3; it must be 4 or 8"), (8, "rows of .* \\(144\\) are not a multiple")]
)
def test_what_cannot_be(reference, backend, bits, said):
    with pytest.raises(InputError, match=said):
        importlib.import_module(backend).load(reference("dense_1b"), quantize=bits)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "layers", "all_of_it"), [(8, 0.0093, 0.0217), (4, 0.159, 0.160)])
def test_logits_of_pico(bits, layers, all_of_it):
    """Root mean square of the error over the standard deviation of the logits, as measured; a tenth more is wrong."""
    model, tokenizer = load(dtype="float32")
    ids = jnp.asarray([tokenizer.encode("The quick brown fox jumps over the lazy dog. A model reads one word a time.")])
    logits = model(ids)
    for head, measured in ((False, layers), (True, all_of_it)):
        error = quantize_model(load(dtype="float32")[0], bits, head)(ids) - logits
        relative = float(jnp.sqrt(jnp.mean(error**2)) / jnp.std(logits))
        print(f"{bits} bits, head {head}: {relative:.4f}")
        assert 0.5 * measured < relative < 1.1 * measured


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 128), (8, 384)])
def test_the_form_for_a_tpu_is_the_same_matrix(bits, group):
    """Of act-order and zero points: to the last bit as it is read, and in products of few and of many rows."""
    width, out, rng = 384, 48, np.random.default_rng(group)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (2, width, out))
    zeros = rng.integers(-3, 4, (2, width // group, out))
    order = np.stack([rng.permutation(width) for _ in range(2)])
    scales, kind = jnp.abs(random(2, width // group, out)), jnp.int4 if bits == 4 else jnp.int8
    parts = jnp.asarray(codes, kind), scales, jnp.float32, jnp.asarray(zeros, kind), None, jnp.asarray(order, jnp.int16)
    packed = QuantizedWeight(*parts)
    tiled = in_tiles(packed)
    assert tiled.scales.shape[1] == tiled.zeros.shape[1] == (1 if group == width else -(-width // group // 8) * 8)
    wide = np.empty((2, width, out), np.float32)
    for layer, place in enumerate(order):
        groups = np.arange(width) // group
        wide[layer, place] = (codes[layer] - zeros[layer, groups]) * np.asarray(scales)[layer, groups]
    for weight in (packed, tiled):
        np.testing.assert_array_equal(np.asarray(weight[...]), wide.swapaxes(1, 2))
    for rows in (1, 40):
        x = random(2, rows // 2 or 1, width)
        one = jax.tree.map(lambda leaf: leaf[1], tiled)
        expected, gradient = np.asarray(x) @ wide[1], np.broadcast_to(wide[1].sum(1), x.shape)
        np.testing.assert_allclose(np.asarray(one.times(x)), expected, atol=1e-5 * np.abs(expected).max())
        found = np.asarray(jax.grad(lambda x, weight: jnp.sum(weight.times(x)))(x, one))
        np.testing.assert_allclose(found, gradient, atol=1e-5 * np.abs(gradient).max())


def test_the_form_of_a_released_file():
    of_gptq = frozenset({"order"})
    assert released_form("gptq-int4", "minicpm-2b") == ReleasedForm(4, 32, of_gptq | {"zeros"})
    assert released_form("gptq-int4", "minicpm4-8b") == ReleasedForm(4, 128, of_gptq)
    assert released_form("gptq-int8", "minicpm-2b") == ReleasedForm(8, 128, of_gptq)
    with pytest.raises(InputError, match="'gptq'; it must be 4, 8 or one of gptq-int4") as raised:
        released_form("gptq", "minicpm-2b")
    assert raised.value.option == "quantize"


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_head_in_8_bits(reference, backend):
    """On request, beside layers that stay as the file has them, or whole ones. Measured: errors of 0.4 to 0.8 %."""
    load = pytest.importorskip(backend).load
    for name in ("quant/gptq_int4_g32_asym_desc_act", "dense_untied"):
        folder = reference(name)
        ids = np.load(folder / "reference.npz")["input_ids"]
        plain, logits = (np.asarray(load(folder, "float32", head_bits=bits)[0](ids)) for bits in (None, 8))
        error = np.abs(logits - plain).max() / np.abs(plain).max()
        print(f"{backend} {name}: {error:.4f}")
        assert 1e-4 < error < 0.01
    with pytest.raises(InputError, match="head_bits is 4; it must be 8"):
        load(folder, head_bits=4)


def test_zero_points_in_the_middle_are_not_kept(reference, tmp_path):
    """Of symmetric GPTQ; but those of all layers are, where one has others."""
    folder = reference("quant/gptq_int4_g32_asym_desc_act")
    stored, first = open_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj"
    shutil.copy(folder / "config.json", tmp_path)
    for last in (None, first):
        middle = {name: x for name, x in stored.items() if name.endswith(".qzeros") and name != f"{last}.qzeros"}
        middle = {name: Computed.of(np.full(x.shape, 0x77777777, np.int32)) for name, x in middle.items()}
        write_file(tmp_path / "model.safetensors", stored | middle)
        weight = load(tmp_path, "float32")[0].model.layers.mlp.up_proj.weight
        assert (weight.zeros is None) == (last is None)
        expected = open_checkpoint(tmp_path).tensors[f"{first}.weight"].read()
        np.testing.assert_array_equal(np.asarray(weight[...][0]), expected)


@pytest.mark.tpu(since="0.0.52")
@pytest.mark.parametrize(
    ("quantize", "head_bits", "most"),
    [("gptq-int4", None, 0.37), ("gptq-int4", 8, 0.32), ("gptq-int8", None, 0.56), ("gptq-int8", 8, 0.53)],
)
def test_a_step_of_a_released_file_reads_it_as_it_is(quantize, head_bits, most):
    """Of the 2B's bytes in bfloat16, beside the cache: GPTQ with act-order, in 4 bits in groups of 32 with zero points,
    and in 8 bits in groups of 128. Measured: 0.3637, 0.3118, 0.5597 and 0.5078, and 0.3 MB of temporaries."""
    found = report(fit.job_of(fit.Options("minicpm-2b", quantize=quantize, head_bits=head_bits)))
    read = (found.hbm_traffic - 1_509_949_440) / 5_449_761_792
    print(f"{quantize}, head {head_bits}: {read:.4f} of the weights' bytes, {found.temporaries:,} of temporaries")
    assert read <= most and found.temporaries < 1 << 20
    assert 0.999 * found.arguments < sum(found.held.values()) <= found.arguments


@pytest.mark.tpu(since="0.0.52")
@pytest.mark.parametrize("job", ["generate", "prefill"])
def test_eight_chips_read_a_released_file_as_it_is(job):
    """Measured of the 2B: 0.8 and 0.9 MB of temporaries. A chunk of a prompt reads 663.4 MB, with the cache."""
    found = report(fit.job_of(fit.Options("minicpm-2b", "v5e:2x4", job, quantize="gptq-int4")))
    assert found.mesh == "tensor=8" and found.temporaries < 1 << 20
    assert found.hbm_traffic < (1.001 if job == "generate" else 1.26) * found.arguments
    assert set(found.collectives) == {"all-reduce", "all-gather"}


@pytest.mark.tpu(since="0.0.52")
@pytest.mark.parametrize("model", ["minicpm-2b", "minicpm4-8b"])
def test_a_chunk_of_a_prompt_unpacks_no_matrix_to_memory(tmp_path, model):
    """Four layers: in 4 bits less HBM traffic than in bfloat16. The 8B's matrices of 4,096 x 16,384 went through HBM as
    bfloat16: 1.25 GB in each layer."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**catalog.find(model).config, "num_hidden_layers": 4}))
    whole, packed = (
        report(fit.job_of(fit.Options(str(path), job="prefill", quantize=bits))) for bits in (None, "gptq-int4")
    )
    print(f"{model}: {packed.hbm_traffic:,} of {whole.hbm_traffic:,}; {packed.temporaries:,} of temporaries")
    assert packed.hbm_traffic < 0.6 * whole.hbm_traffic and packed.temporaries < 2e6


@pytest.mark.tpu(since="0.0.48")
@pytest.mark.parametrize(("bits", "most"), [(8, 0.53), (4, 0.3)])
def test_a_step_of_the_2b_reads_the_weights_as_they_are_kept(bits, most):
    """Of the weights' 5,449,761,792 bytes in bfloat16, beside the cache; measured: 0.514 and 0.290, with libtpu 0.0.48
    0.523 and 0.299, no copy of them."""
    compiled = fit.compile_job("minicpm-2b", "v5e:1x1", "generate", seq=4096, quantize=bits)
    weights, cache = 5_449_761_792, 1_509_949_440
    read = (hlo_cost.traffic(compiled.as_text()).hbm - cache) / weights
    print(f"{bits} bits: {read:.4f} of the weights' bytes")
    assert read < most
    assert compiled.memory_analysis().argument_size_in_bytes < cache + most * weights
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6  # measured with libtpu 0.0.50: 2.0e6


@pytest.mark.tpu
def test_eight_chips_copy_no_packed_weight_of_the_2b():
    """6,144 neurons in place of 5,760, so that a chip has 768, whole registers and groups: 1.2 MB of temporaries and
    0.653 GB of traffic were measured; of 720 neurons 143 MB and 0.953 GB."""
    compiled = fit.compile_job("minicpm-2b", "v5e:2x4", "generate", seq=4096, quantize=8)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4e6  # measured with libtpu 0.0.48: 2.9e6
    assert hlo_cost.traffic(compiled.as_text()).hbm < 1.01 * memory.argument_size_in_bytes
