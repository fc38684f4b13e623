"""Quantized folders: what the real tools packed, read bit for bit; what contradicts itself, refused in one sentence.

Each folder of tests/reference/quant was made by the tool itself (auto_gptq 0.7.1, autoawq 0.2.9, bitsandbytes 0.50.2,
mlx_lm 0.32.2); ``deq.`` in its reference.npz is the exact float32 matrix, ``logits`` the float32 forward with those.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_adapter
from mlx.utils import tree_flatten

import minicpm_jax
import minicpm_mlx
from minicpm_jax.quantization.kept import kept_bytes, kept_forms
from weights_io import convert, inspect
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.json_text import read_json
from weights_io.files.safetensors import Computed, open_file, write_file
from weights_io.quantization.affine import note_dequantized
from weights_io.quantization.entries import scheme_of_config
from weights_io.quantization.mlx_affine import quantize
from weights_io.quantization.packed import pack, unpack
from weights_io.quantization.reading import as_matrices

FOLDERS = sorted(path.name for path in (Path(__file__).parent / "reference/quant").iterdir())
WHOLE = ("gptq_int4_g32_asym_desc_act", "mlx_affine_4bit")  # the others hold this one matrix
MODULE = "model.layers.0.self_attn.k_proj"
NAME = f"{MODULE}.weight"


def opened(folder):
    """The matrix of a folder that may hold no other."""
    raw = read_json(folder / "config.json")
    _, tensors = as_matrices(ModelConfig.from_dict(raw), raw, open_file(folder / "model.safetensors"), folder)
    return tensors[NAME]


def altered(source, out, parts=None, config=None, side=None):
    """A copy with other parts of the matrix (None: without one), entries of the config, and quantize_config.json."""
    out.mkdir(exist_ok=True)
    tensors = {name: tensor for name, tensor in open_file(source / "model.safetensors").items() if MODULE in name}
    for part, array in (parts or {}).items():
        tensors.pop(f"{MODULE}.{part}", None)
        tensors |= {} if array is None else {f"{MODULE}.{part}": Computed.of(np.asarray(array))}
    write_file(out / "model.safetensors", tensors)
    raw = read_json(source / "config.json")
    raw["quantization_config"] |= config or {}
    if "quantization" in raw:
        raw["quantization"] = raw["quantization_config"]
    (out / "config.json").write_text(json.dumps(raw))
    if side is not None:
        (out / "quantize_config.json").write_text(json.dumps(side))
    return out


def part(source, name):
    return open_file(source / "model.safetensors")[f"{MODULE}.{name}"].read()


def bits_of(codes, bits):
    """[n * bits] of codes [n], the lowest first: what a stream is, written out."""
    return (codes[:, None] >> np.arange(bits) & 1).reshape(-1)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_matrix_is_the_tools_to_the_last_bit(reference, name):
    folder = reference(f"quant/{name}")
    expected = np.load(folder / "reference.npz")[f"deq.{MODULE}"]
    tensor = opened(folder)
    np.testing.assert_array_equal(tensor.read(), expected)
    for index in ((slice(3, 70),), (slice(33, 34), slice(5, 200)), (slice(0, 128), slice(7, 8)), (slice(9, 9),)):
        np.testing.assert_array_equal(tensor.read(index), expected[index])
    form = tensor.packed(5, 77)
    assert form.codes.shape == (72, 256) and form.codes.itemsize == 1
    assert form.scales.shape == (72, 256 // form.group_size)
    np.testing.assert_array_equal(form.dequantize(), expected[5:77])
    assert (form.order is not None) == ("desc_act" in name)
    assert tensor.symmetric() == (name.startswith("gptq") and bool((tensor.packed().zeros == 8).all()))
    if form.order is not None:  # the layout with groups one after the other is the same matrix, its inputs sorted
        regular = dataclasses.replace(form, codes=form.codes[:, form.order], groups=None)
        np.testing.assert_array_equal(regular.dequantize(), expected[5:77, form.order])


@pytest.mark.parametrize("name", WHOLE)
def test_both_backends_load_it_and_answer(reference, name):
    folder = reference(f"quant/{name}")
    expected = np.load(folder / "reference.npz")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "float16" and checkpoint.packed("model.norm.weight") is None
    assert checkpoint.packed(NAME, slice(4, 6)).codes.shape == (2, 256)
    assert not checkpoint.config.tie_word_embeddings  # of the one config.json does not say so
    for backend in (minicpm_jax, minicpm_mlx):
        model, _ = backend.load(folder, dtype="float32")
        logits = np.array(model(expected["input_ids"].astype(np.int32)))
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5 * np.abs(expected["logits"]).max())
        half, _ = backend.load(folder)
        assert np.isfinite(np.array(half(expected["input_ids"].astype(np.int32)))).all()


def held(model):
    """Bytes of a model's weights; an int4 array holds two numbers a byte."""
    if isinstance(model, nn.Module):
        return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return sum(x.size / 2 if x.dtype == jnp.int4 else x.nbytes for x in jax.tree.leaves(model))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("backend", [minicpm_jax, minicpm_mlx])
def test_it_stays_quantized_in_memory(reference, tmp_path, name, backend):
    """At most 1.05 times the file, in its own dtype; adapters act on it as on the dequantized weights."""
    folder = reference(f"quant/{name}")
    expected, size = np.load(folder / "reference.npz"), (folder / "model.safetensors").stat().st_size
    half, _ = backend.load(folder)
    assert held(half) < 1.05 * size
    if backend is minicpm_jax:
        checkpoint = open_checkpoint(folder)
        assert held(half) == kept_bytes(checkpoint, kept_forms(checkpoint), "float16")
    checkpoint = open_checkpoint(folder)
    save_adapter(tmp_path, tiny_adapter.make(checkpoint, dora=True), checkpoint.config)
    ids = expected["input_ids"].astype(np.int32)
    kept, _ = backend.load(folder, "float32", decoding=True)
    exact, _ = backend.load(folder, "float32", dequantize=True)
    assert held(kept) < 2 * size < held(exact)
    for rows in (ids, ids[:1, :1]):  # on a CPU few rows have a product of their own
        scale = np.abs(expected["logits"]).max()
        np.testing.assert_allclose(np.array(kept(rows)), np.array(exact(rows)), rtol=0, atol=1e-5 * scale)
    adapted = [backend.load(folder, "float32", tmp_path, dequantize=whole)[0](ids) for whole in (False, True)]
    assert np.abs(np.array(adapted[1]) - expected["logits"]).max() > 0.01 * scale
    np.testing.assert_allclose(np.array(adapted[0]), np.array(adapted[1]), rtol=0, atol=1e-5 * np.abs(adapted[1]).max())


def test_what_is_dequantized_is_said(reference, capsys):
    checkpoint = dataclasses.replace(
        open_checkpoint(reference("dense_eps")), tensors={NAME: opened(reference("quant/bnb_nf4"))}
    )
    note_dequantized(checkpoint, {NAME})
    assert capsys.readouterr().err == ""
    note_dequantized(checkpoint, ())
    assert capsys.readouterr().err == "note: 1 matrix is dequantized in memory (bitsandbytes nf4 in groups of 64)\n"


@pytest.mark.parametrize("name", WHOLE)
def test_it_stays_quantized_over_a_mesh(reference, name):
    folder = reference(f"quant/{name}")
    expected = np.load(folder / "reference.npz")
    model, _ = minicpm_jax.load(folder, "float32", mesh=jax.make_mesh((2, 4), ("fsdp", "tensor")))
    qweight = model.model.layers.mlp.up_proj.weight.qweight
    assert qweight.dtype == jnp.int4 and qweight.sharding.shard_shape(qweight.shape)[2] == qweight.shape[2] // 4
    logits = np.array(model(expected["input_ids"].astype(np.int32)))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5 * np.abs(expected["logits"]).max())


def test_inspect_tells_the_format(reference, capsys):
    inspect.main(inspect.Options(str(reference(f"quant/{WHOLE[0]}"))))
    said = capsys.readouterr().out
    assert "float16; tensors stored as float16 (7), GPTQ 4-bit in groups of 32 (14)" in said
    assert "config.json has no tie_word_embeddings; the stored head is taken, which differs" in said
    assert "several dtypes" not in said


def test_inspect_tells_what_contradicts(reference, tmp_path):
    folder = altered(reference("quant/gptq_int4"), tmp_path, {"scales": None})
    assert [re.sub(".*lacks", "lacks", each) for each in inspect.without_tokenizer(folder)[0].problems][0].startswith(
        "lacks scales"
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_stream_of_bits_there_and_back(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64), dtype=np.uint8)
    data = pack(codes, bits)
    for row, packed in zip(codes, data, strict=True):
        np.testing.assert_array_equal(np.unpackbits(packed, bitorder="little"), bits_of(row, bits))
    np.testing.assert_array_equal(unpack(data, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantize_is_mlx_to_the_last_bit(bits, dtype):
    """Groups of zeros, of tiny and of equal numbers, of one sign, and others."""
    values = np.random.default_rng(bits).normal(0, 0.05, (16, 256)).astype(np.float32)
    values[0], values[1], values[2, :64] = 0, np.abs(values[1]), -np.abs(values[2, :64])
    values[3, :128], values[4, :32] = 1e-8, 0.25
    matrix = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for group in (32, 64, 128):
        expected = mx.quantize(mx.array(matrix.astype(np.float32)).astype(getattr(mx, dtype)), group, bits)
        words, scales, biases = quantize(matrix, bits, group)
        np.testing.assert_array_equal(words, np.array(expected[0]))
        for own, theirs in zip((scales, biases), expected[1:], strict=True):
            assert own.dtype == matrix.dtype
            np.testing.assert_array_equal(own.astype(np.float32), np.array(theirs.astype(mx.float32)))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_other_bits_of_mlx_read_as_mlx_reads_them(reference, tmp_path, bits):
    """Of a module that config.json names, and of one whose shapes alone tell (as mlx_lm takes it)."""
    matrix = np.random.default_rng(bits).normal(size=(128, 256)).astype(np.float16)
    parts = quantize(matrix, bits, 32)
    expected = mx.dequantize(mx.array(parts[0]), *(mx.array(x.astype(np.float32)) for x in parts[1:]), 32, bits)
    named = dict(zip(("weight", "scales", "biases"), parts, strict=True))
    for config in ({MODULE: {"group_size": 32, "bits": bits}}, {}):
        tensor = opened(altered(reference("quant/mlx_affine_4bit"), tmp_path, named, config))
        assert tensor.kind == f"MLX {bits}-bit in groups of 32"
        np.testing.assert_array_equal(tensor.read(), np.array(expected))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_of_gptq(reference, tmp_path, bits, version):
    """Columns of qweight and rows of qzeros are streams; in 3 bits code 10 lies in two words, as auto_gptq packs it."""
    rng, most = np.random.default_rng(bits), (1 << bits) - 1
    codes, zeros = rng.integers(0, most + 1, (256, 128)), rng.integers(1, most + 1, (2, 128))
    scales = rng.normal(size=(2, 128)).astype(np.float16)

    def words(streams):
        return np.stack([np.packbits(bits_of(s, bits), bitorder="little").view(np.int32) for s in streams])

    parts = {"qweight": words(codes.T).T, "qzeros": words(zeros - (version == "gptq")), "scales": scales}
    if bits == 3:
        word, following = (parts["qweight"][i].view(np.uint32) for i in (0, 1))
        np.testing.assert_array_equal(word >> 30 | (following & 1) << 2, codes[10])
    config = {"bits": bits, "checkpoint_format": version}
    tensor = opened(altered(reference("quant/gptq_int4"), tmp_path, parts, config))
    expected = (codes - np.repeat(zeros, 128, axis=0)).astype(np.float32) * np.repeat(scales, 128, axis=0)
    np.testing.assert_array_equal(tensor.read(), expected.T)
    np.testing.assert_array_equal(tensor.read((slice(37, 41),)), expected.T[37:41])


def test_a_matrix_whose_rows_share_blocks(reference, tmp_path):
    """bitsandbytes' blocks go on from row to row where 64 does not divide it: the neutral form has shorter groups."""
    rng, size = np.random.default_rng(0), 8 * 40
    table = np.sort(rng.normal(size=16)).astype(np.float32)
    codes, scales = rng.integers(0, 16, size), rng.random(5).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 40]}
    parts = {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": scales,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    source = reference("quant/bnb_nf4")
    raw = read_json(altered(source, tmp_path, parts) / "config.json")
    raw |= {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensor = opened(tmp_path)
    expected = (table[codes] * np.repeat(scales, 64)).reshape(8, 40)
    assert tensor.packed().group_size == 8 and tensor.arithmetic == "bfloat16"
    np.testing.assert_array_equal(tensor.read(), expected)
    np.testing.assert_array_equal(tensor.read((slice(3, 6),)), expected[3:6])


GPTQ, AWQ, BNB, MLX = "gptq_int4", "awq_int4", "bnb_nf4_double", "mlx_affine_8bit"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (GPTQ, {"bits": 5}, "bits is 5, and GPTQ files are read in 2, 3, 4, 8 bits"),
        (GPTQ, {"bits": True}, "bits is true"),
        (GPTQ, {"bits": None}, "bits is null"),
        (GPTQ, {"group_size": 0}, "group_size is 0; it must be a positive number, or -1"),
        (GPTQ, {"group_size": 96}, r"qzeros in .* is int32 \[2, 16\], and .* makes it int32 \[3, 16\]"),
        (
            GPTQ,
            {"bits": 8},
            r"qweight in .* is int32 \[32, 128\], and .* makes it int32 \[64, 128\] for .*\[128, 256\]",
        ),
        (GPTQ, {"group_size": 32}, r"qzeros in .* is int32 \[2, 16\], and .* makes it int32 \[8, 16\]"),
        (GPTQ, {"quant_method": "awq"}, "quantization_config.damp_percent = 0.01 is not understood"),
        (GPTQ, {"quant_method": "exl2"}, 'quant_method "exl2" is not read here; take the model\'s GPTQ, AWQ'),
        (GPTQ, {"quant_method": "gptq_marlin"}, "is repacked for the Marlin kernel; take the model's GPTQ"),
        (GPTQ, {"checkpoint_format": "marlin"}, "is repacked for the Marlin kernel"),
        (GPTQ, {"is_marlin_format": True}, "is repacked for the Marlin kernel"),
        (GPTQ, {"checkpoint_format": "bitblas"}, "has the format .*bitblas.*, which is not read here"),
        (GPTQ, {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic = .* is not read here"),
        (GPTQ, {"key_of_tomorrow": 1}, "quantization_config.key_of_tomorrow = 1 is not understood and may change"),
        (AWQ, {"bits": 8}, "bits is 8, and AWQ files are read in 4 bits"),
        (GPTQ, {"checkpoint_format": "gptq", "format": "gptq_v2"}, "which is not read here"),
        (GPTQ, {"checkpoint_format": ["gptq"]}, "which is not read here"),
        (AWQ, {"version": "gemv"}, 'version = "gemv" is not read here'),
        (AWQ, {"version": "marlin"}, "is repacked for the Marlin kernel"),
        (AWQ, {"group_size": 100}, "rows of 256 in .* are not divided by the group size 100"),
        (BNB, {"load_in_8bit": True}, "load_in_4bit true and load_in_8bit true; one of the two"),
        (
            BNB,
            {"load_in_4bit": False, "load_in_8bit": True},
            r"has weight.absmax, .* which bitsandbytes in 8 bits does not use",
        ),
        (BNB, {"bnb_4bit_quant_storage": "bfloat16"}, 'bnb_4bit_quant_storage = "bfloat16" is not read here'),
        (MLX, {"bits": 7}, "bits is 7, and MLX files are read in 2, 3, 4, 5, 6, 8 bits"),
        (MLX, {"group_size": 16}, "group_size is 16; it must be 32, 64, 128"),
        (MLX, {"mode": "mxfp4"}, 'mode "mxfp4" is not read here; take the model\'s affine MLX files'),
        (MLX, {MODULE: {"mode": "nvfp4"}}, f'{MODULE}.mode "nvfp4" is not read here'),
        (MLX, {MODULE: {"bits": 4}}, r"weight in .* is uint32 \[128, 64\], and .* makes it uint32 \[128, 32\]"),
        (MLX, {MODULE: {"bits": 8, "rank": 4}}, "k_proj.rank is not understood"),
        (MLX, {MODULE: False}, "k_proj in .* is packed, and .* says false of it"),
        (MLX, {MODULE: 8}, "k_proj = 8 is not understood"),
        (MLX, {"model.layers.0.k_proj": {"bits": 8}}, "names model.layers.0.k_proj, which is no matrix of the model"),
        (MLX, {"model.layers.1.mlp.up_proj": {"bits": 8}}, "up_proj is packed, and the file holds it whole"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused(reference, tmp_path, name, config, message):
    with pytest.raises(InputError, match=message):
        opened(altered(reference(f"quant/{name}"), tmp_path, config=config))


def test_the_two_entries_of_mlx_must_agree():
    entry = {"bits": 4, "group_size": 64}
    assert scheme_of_config({"quantization_config": entry}, "config.json").bits == 4  # mlx_lm wrote one at first
    with pytest.raises(InputError, match="contradict each other"):
        scheme_of_config({"quantization": entry, "quantization_config": entry | {"bits": 8}}, "config.json")
    with pytest.raises(InputError, match="quantization is \\[4\\]; it must be an object"):
        scheme_of_config({"quantization": [4]}, "config.json")


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        (GPTQ, {"g_idx": np.full(256, 2, np.int32)}, "g_idx in .* names group 2 of 2"),
        (GPTQ, {"g_idx": np.full(256, -1, np.int32)}, "g_idx in .* names group -1 of 2"),
        (GPTQ, {"g_idx": np.zeros(255, np.int32)}, r"g_idx in .* is int32 \[255\]"),
        (GPTQ, {"qweight": np.zeros((31, 128), np.int32)}, r"qweight in .* is int32 \[31, 128\]"),
        (GPTQ, {"qweight": np.zeros((16, 256), np.int32)}, "is repacked for the Marlin kernel"),
        ("gptq_int4_desc_act", {"g_idx": None}, "k_proj in .* lacks g_idx, .* which desc_act of .* requires"),
        (
            GPTQ,
            {"qweight": None, "B": np.zeros((16, 256), np.int32), "s": np.ones((2, 128), np.float16)},
            "is repacked for the Marlin kernel",
        ),
        (GPTQ, {"qzeros": None}, "k_proj in .* lacks qzeros, which GPTQ requires"),
        (
            GPTQ,
            {"qzeros": np.full((2, 16), -1, np.int32)},
            "has zero points of 0, which AutoGPTQ's first format cannot",
        ),
        (GPTQ, {"scales": np.ones((2, 128), np.int32)}, r"scales in .* is int32 .* makes it float \[2, 128\]"),
        (GPTQ, {"weight": np.ones((128, 256), np.float16)}, "has weight, which GPTQ does not use"),
        (GPTQ, {"SCB": np.ones(128, np.float32)}, "has SCB, which GPTQ does not use"),
        (AWQ, {"g_idx": np.zeros(256, np.int32)}, "has g_idx, which AWQ does not use"),
        (MLX, {"biases": None}, "lacks biases, which MLX requires"),
        (MLX, {"scales": np.ones((128, 4), np.uint8)}, "scales in .* is uint8"),
        (BNB, {"weight.quant_map": None}, "lacks weight.quant_map, which bitsandbytes in 4 bits requires"),
        (BNB, {"weight.nested_absmax": None}, "lacks weight.nested_absmax"),
        (BNB, {"weight.absmax": np.zeros(100, np.uint8)}, r"absmax in .* is uint8 \[100\]"),
        (BNB, {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape":1}', np.uint8)}, "has quant_type null"),
        (BNB, {"weight.quant_state.bitsandbytes__nf4": np.zeros(9999, np.uint8)}, "is no JSON text of at most 4096"),
        ("bnb_int8", {"weight_format": np.uint8(2)}, "weight_format in .* is 2, an order of columns"),
        ("bnb_int8", {"SCB": None}, "lacks SCB"),
    ],
)
def test_parts_that_contradict_their_format_are_refused(reference, tmp_path, name, parts, message):
    with pytest.raises(InputError, match=message):
        opened(altered(reference(f"quant/{name}"), tmp_path, parts)).read()


def test_quantize_config_json(reference, tmp_path):
    """Alone, as older tools wrote it; where it contradicts config.json in what the tensors do not tell."""
    source = reference("quant/gptq_int4_g32_asym")
    whole = read_json(source / "quantize_config.json")
    expected = opened(source).read()

    def folder(side, **config):
        altered(source, tmp_path, config=config, side=side)
        return tmp_path

    raw = read_json(folder(whole) / "config.json")
    for key in ({"quantization_config": None}, {}):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **key}))
        np.testing.assert_array_equal(opened(tmp_path).read(), expected)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": None}))
    (tmp_path / "quantize_config.json").unlink()
    with pytest.raises(InputError, match="holds 1 packed matrices .* and neither config.json nor quantize_config.json"):
        opened(tmp_path)
    with pytest.raises(InputError, match="has the bits 4 and .*quantize_config.json 8; correct the one"):
        opened(folder({**whole, "bits": 8}))
    with pytest.raises(InputError, match='has the format "gptq" and .*quantize_config.json "gptq_v2"'):
        opened(folder({**whole, "checkpoint_format": "gptq_v2"}, checkpoint_format="gptq"))
    assert opened(folder({**whole, "checkpoint_format": "gptq_v2"})).zero_offset == 0


def test_a_file_cut_short_and_weights_that_are_whole(reference, tmp_path):
    source = reference(f"quant/{WHOLE[0]}")
    shutil.copytree(source, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="is truncated"):
        open_checkpoint(tmp_path / "cut")
    shutil.copytree(reference("dense_2b"), tmp_path / "whole")
    raw = read_json(tmp_path / "whole/config.json") | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    raw["quantization_config"]["group_size"] = 32
    (tmp_path / "whole/config.json").unlink()
    (tmp_path / "whole/config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"says that the weights are packed \(GPTQ\), and none is; remove the key"):
        open_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize(("name", "bits"), [("dense_eps", 4), ("moe_8x2b", 3)])
def test_convert_packs_as_mlx_lm_does(reference, tmp_path, name, bits):
    """mlx_lm opens the folder, holds the numbers it would have packed itself, and gives our logits."""
    from mlx_lm.utils import load_model

    for out, more in (("whole", {}), ("packed", {"quantize": True, "q_bits": bits, "q_group_size": 32})):
        convert.main(convert.Options(str(reference(name)), to="mlx", save_path=tmp_path / out, **more))
    model, config = load_model(tmp_path / "packed", trust_remote_code=True)
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    theirs, _ = load_model(tmp_path / "whole", trust_remote_code=True)
    held = dict(tree_flatten(model.parameters()))
    packed = {key.removesuffix(".scales") for key in held if key.endswith(".scales")}
    nn.quantize(theirs, 32, bits, class_predicate=lambda path, module: path in packed)
    assert "model.embed_tokens" in packed and "model.layers.0.mlp.gate" not in packed
    for key, array in tree_flatten(theirs.parameters()):
        assert mx.array_equal(held[key], array), key
    ids = np.arange(24)[None] % open_checkpoint(reference(name)).config.vocab_size
    expected = np.array(model(mx.array(ids)))
    for backend in (minicpm_jax, minicpm_mlx):
        own, _ = backend.load(tmp_path / "packed")
        np.testing.assert_allclose(np.array(own(ids.astype(np.int32))), expected, rtol=0, atol=1e-4)


def test_experts_that_mlx_lm_has_saved_stacked(reference, tmp_path):
    """As its convert writes a model of ours that it holds."""
    from mlx_lm.utils import load_model, save_model

    packing = {"quantize": True, "q_group_size": 32}
    convert.main(convert.Options(str(reference("moe_8x2b")), to="mlx", save_path=tmp_path / "apart", **packing))
    model, _ = load_model(tmp_path / "apart", trust_remote_code=True)
    save_model(tmp_path / "stacked", model)
    shutil.copy(tmp_path / "apart/config.json", tmp_path / "stacked")
    apart, stacked = (open_checkpoint(tmp_path / each) for each in ("apart", "stacked"))
    for name in apart.tensors:
        np.testing.assert_array_equal(stacked.read(name, "float32"), apart.read(name, "float32"))


def test_a_packed_folder_converts_to_whole_weights_and_back(reference, tmp_path, capsys):
    source = reference("quant/mlx_affine_4bit")
    convert.main(convert.Options(str(source), to="hf", save_path=tmp_path / "whole"))
    whole, packed = open_checkpoint(tmp_path / "whole"), open_checkpoint(source)
    assert "quantization" not in whole.raw_config and whole.packed(NAME) is None
    np.testing.assert_array_equal(whole.read(NAME, "float32"), packed.read(NAME, "float32"))
    convert.main(convert.Options(str(source), to="mlx", save_path=tmp_path / "again", quantize=True, q_bits=8))
    again = open_checkpoint(tmp_path / "again")
    assert again.tensors[NAME].kind == "MLX 8-bit in groups of 64" and again.packed(NAME).scales.dtype == np.float16
    assert "16 matrices in 8 bits and groups of 64, as MLX packs them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hf", "quantize": True}, "quantize packs in MLX's form; use it with to mlx"),
        ({"to": "mlx", "q_bits": 8}, "q_bits is only used with quantize"),
        (
            {"to": "mlx", "quantize": True, "q_group_size": 128},
            "group size 128 .* no matrix; choose a smaller q_group_size",
        ),
    ],
)
def test_packing_that_cannot_be_is_refused_and_leaves_nothing(reference, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        convert.main(convert.Options(str(reference("dense_eps")), save_path=tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())
