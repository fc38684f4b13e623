"""An adapter worked into a checkpoint, as arrays and by the command."""

import importlib
import json
import re

import numpy as np
import pytest
import tiny_adapter
from documented_commands import typed
from gguf import GGMLQuantizationType, quants

from weights_io.adapters import fuse_adapter, read_adapter, save_adapter
from weights_io.casting import Rounding
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.fuse import Options, main, step_error
from weights_io.lora import UpdateStats
from weights_io.quantization.mlx_affine import quantize
from weights_io.quantization.packed import Packed, unpack

IDS = np.random.default_rng(0).integers(3, 200, (2, 12))


def logits(backend, folder):
    return np.asarray(importlib.import_module(backend).load(folder, dtype="float32")[0](IDS))


@pytest.fixture(scope="module")
def source(reference):
    return open_checkpoint(reference("dense_2b"))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["dense_2b", "moe_8x2b"])
def test_the_weights(reference, name, dora):
    """Against the definition, in float64."""
    checkpoint = open_checkpoint(reference(name))
    adapter = tiny_adapter.make(checkpoint, ranks=(4, 2), layers=[0, 2], dora=dora)
    tensors = fuse_adapter(checkpoint, adapter)
    assert list(tensors) == list(checkpoint.tensors)
    for tensor, original in checkpoint.tensors.items():
        matrices = adapter.tensors.get(tensor.removesuffix(".weight"))
        if matrices is None:
            assert tensors[tensor] is original
            continue
        expected = original.read() + matrices.scale * matrices.b.astype(np.float64) @ matrices.a
        if dora:
            expected *= matrices.magnitude[:, None] / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(tensors[tensor].read(), expected, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_what_rounding_takes(reference):
    checkpoint = open_checkpoint(reference("dense_bf16"))
    rounding, change = Rounding(), UpdateStats()
    tensors = fuse_adapter(checkpoint, tiny_adapter.make(checkpoint, ["q_proj"]), rounding=rounding, change=change)
    q = tensors["model.layers.0.self_attn.q_proj.weight"].read()
    assert q.dtype.name == "bfloat16" and rounding.count == q.size
    assert 1e-3 < rounding.worst < 2**-8 * 1.01
    assert 1e-4 < change.error < 0.01 < change.size  # an update as large as the weights keeps nearly all of itself


def test_a_row_of_zeros_stays_one(source):
    matrices = tiny_adapter.make(source, ["q_proj"], dora=True).tensors["model.layers.0.self_attn.q_proj"]
    weight = np.zeros((len(matrices.b), matrices.a.shape[1]), np.float32)
    matrices.b[0] = 0
    assert not matrices.applied(weight)[0].any() and np.isfinite(matrices.applied(weight)).all()


@pytest.mark.parametrize("backend", ["minicpm_jax", "minicpm_mlx"])
def test_the_llama_of_it_has_the_same_logits(source, tmp_path, backend):
    save_adapter(tmp_path / "adapter", tiny_adapter.make(source), source.config, form="mlx_lm")
    for to in ("hf", "llama"):
        main(Options(model=str(source.path), adapter_path=(tmp_path / "adapter",), save_path=tmp_path / to, to=to))
    found = logits(backend, tmp_path / "hf")
    assert np.abs(found - logits(backend, source.path)).max() > 1
    np.testing.assert_allclose(logits(backend, tmp_path / "llama"), found, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name, dora", [("dense_2b", False), ("dense_2b", True), ("moe_8x2b", False)])
def test_mlx_lm_opens_it_on_our_model(reference, tmp_path, name, dora):
    """Its LoRA layers, also of experts, compute what fusing writes."""
    from mlx_lm.tuner.utils import load_adapters

    import minicpm_mlx

    checkpoint = open_checkpoint(reference(name))
    adapter = tiny_adapter.make(checkpoint, ranks=(4,) if dora else (4, 2), layers=[1, 2], dora=dora)
    save_adapter(tmp_path / "adapter", adapter, checkpoint.config, form="mlx_lm")
    main(Options(model=str(checkpoint.path), adapter_path=(tmp_path / "adapter",), save_path=tmp_path / "out"))
    model = load_adapters(minicpm_mlx.load(checkpoint.path, dtype="float32")[0], str(tmp_path / "adapter"))
    expected = logits("minicpm_mlx", tmp_path / "out")
    assert np.abs(expected - logits("minicpm_mlx", checkpoint.path)).max() > 0.1
    np.testing.assert_allclose(np.asarray(model.eval()(IDS)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("module", ["weights_io.fuse", "minicpm_jax.fuse", "minicpm_mlx.fuse"])
def test_the_command(reference, tmp_path, module):
    checkpoint = open_checkpoint(reference("dense_bf16"))
    adapter = tiny_adapter.make(checkpoint)
    save_adapter(tmp_path / "adapter", adapter, checkpoint.config)
    options = ["--model", checkpoint.path, "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "out"]
    ran = typed(module, *options)
    assert ran.returncode == 0, ran.stderr
    assert f"adapter: LoRA of rank 4, scale 2, on {len(adapter.tensors)} matrices" in ran.stdout
    assert re.search(r"rounded to bfloat16: worst relative error 0.0039, mean 0.001\d of [\d,]+ numbers", ran.stdout)
    assert re.search(r"by 0?[\d.]+ of their size .*, and rounding is 0[\d.]+ of that change", ran.stdout)
    written = open_checkpoint(tmp_path / "out")
    assert written.config == checkpoint.config and written.dtype == "bfloat16"
    for name, tensor in fuse_adapter(checkpoint, adapter).items():
        np.testing.assert_array_equal(written.tensors[name].read(), tensor.read())
    again = typed(module, *options)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr


def test_a_quantised_source_is_told(reference, tmp_path, capsys):
    path = reference("gguf") / "model-q4_0.gguf"
    checkpoint = open_checkpoint(path)
    adapter = tiny_adapter.make(checkpoint, ["q_proj"])
    save_adapter(tmp_path / "adapter", adapter, checkpoint.config)
    main(Options(model=str(path), adapter_path=(tmp_path / "adapter",), save_path=tmp_path / "out"))
    assert re.search(
        r"is quantized \(.*Q4_0.*\): the fused weights carry that error, .* about 0\.0\d+ of", capsys.readouterr().out
    )
    written = open_checkpoint(tmp_path / "out")
    for name, tensor in fuse_adapter(checkpoint, adapter).items():
        np.testing.assert_array_equal(written.tensors[name].read(), tensor.read())


@pytest.mark.parametrize(
    "flag, dtype", [("--dequantize", "bfloat16"), ("--de-quantize", "bfloat16"), (None, "float32")]
)
def test_an_adapter_of_a_packed_base(reference, tmp_path, flag, dtype):
    """It becomes float weights: the dequantized ones, with the adapter added."""
    packed, flags = tmp_path / "packed", [flag] if flag else []
    quantize = "--to", "mlx", "--quantize", "--q-group-size", 32, "--save-path", packed
    assert typed("weights_io.convert", "--model", reference("dense_bf16"), *quantize).returncode == 0
    checkpoint = open_checkpoint(packed)
    adapter = tiny_adapter.make(checkpoint, ["q_proj"])
    save_adapter(tmp_path / "adapter", adapter, checkpoint.config)
    folders = "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "fused"
    ran = typed("weights_io.fuse", "--model", packed, *folders, *flags)
    assert ran.returncode == 0, ran.stderr
    fused, name = open_checkpoint(tmp_path / "fused"), "model.layers.0.self_attn.q_proj"
    found = fused.tensors[f"{name}.weight"].read()
    assert "quantization" not in fused.raw_config and str(found.dtype) == dtype
    assert dtype == "float32" or {str(tensor.dtype) for tensor in fused.tensors.values()} == {dtype}
    expected = adapter.tensors[name].applied(checkpoint.tensors[f"{name}.weight"].read())
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1e-6 if flag is None else 2**-8)


def test_what_is_refused_leaves_nothing(source, reference, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_adapter.make(source), source.config)
    options = {"adapter_path": (tmp_path / "adapter",), "save_path": tmp_path / "out"}
    with pytest.raises(InputError, match="use the adapter with the model"):
        main(Options(model=str(reference("dense_1b")), **options))
    with pytest.raises(InputError, match="Llama format already"):
        llama = str(reference("llama_format"))
        main(Options(model=llama, **options, to="llama"))
    assert not (tmp_path / "out").exists()
    assert read_adapter(tmp_path / "adapter", source.config)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_the_error_of_a_quantised_source_without_the_source(kind):
    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    blocks = quants.quantize(weights, GGMLQuantizationType[kind])
    read = quants.dequantize(blocks, GGMLQuantizationType[kind])
    assert 0.85 < np.sqrt(step_error(read, kind) / np.sum((read - weights) ** 2, dtype=np.float64)) < 1.1


def test_the_error_of_long_groups():
    """Of 128 values with one scale; the range of 32 of them would say a quarter less."""
    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    words, scales, biases = quantize(weights, 4, 128)
    read = Packed(unpack(words.view(np.uint8), 4), scales, 4, 128, biases=biases).dequantize()
    error = np.sqrt(np.sum((read - weights) ** 2, dtype=np.float64))
    assert 0.9 < np.sqrt(step_error(read, "MLX 4-bit", 128)) / error < 1.1
    assert np.sqrt(step_error(read, "MLX 4-bit")) / error < 0.85


def test_several_adapters_are_added_with_their_weights(source, tmp_path):
    """Of different ranks, scales and targets. Against the definition, in float64."""
    made = [
        tiny_adapter.make(source, ["q_proj", "down_proj"], ranks=(4, 2)),
        tiny_adapter.make(source, ["q_proj", "v_proj"], ranks=(3,), layers=[0]),
    ]
    for name, adapter in zip("ab", made, strict=True):
        save_adapter(tmp_path / name, adapter, source.config)
    folders = [tmp_path / "a", tmp_path / "b"]
    start = ("weights_io.fuse", "--model", source.path, "--adapter-path", *folders)
    ran = typed(*start, "--weights", 0.7, -0.3, "--save-path", tmp_path / "out", "--dtype", "float32")
    assert ran.returncode == 0, ran.stderr
    found = open_checkpoint(tmp_path / "out")
    for name, original in source.tensors.items():
        expected = original.read().astype(np.float64)
        for adapter, weight in zip(made, (0.7, -0.3), strict=True):
            if (matrices := adapter.tensors.get(name.removesuffix(".weight"))) is not None:
                expected = expected + weight * matrices.scale * matrices.b.astype(np.float64) @ matrices.a
        np.testing.assert_allclose(found.tensors[name].read(), expected, rtol=1e-5, atol=1e-6, err_msg=name)

    for flags, said in [
        (("--weights", 0.7), "1 numbers for 2"),
        (("--weights", 0.7, "nan"), "nan"),
        (("--adapter-path", folders[0], folders[0]), "twice"),
    ]:
        ran = typed(*start, *flags, "--save-path", tmp_path / "not")
        assert (ran.returncode, said in ran.stderr) == (2, True), ran.stderr
