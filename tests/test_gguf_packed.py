"""GGUF blocks as codes and scales: the values of `gguf`, kept quantized by both backends, and trained on."""

import jax
import numpy as np
import pytest
import tiny_model
import tiny_training
from documented_commands import typed
from gguf import GGMLQuantizationType, quants
from mlx.utils import tree_flatten

import minicpm_jax
import minicpm_mlx
from weights_io.checkpoint import open_checkpoint
from weights_io.files.gguf import BlockTensor, UnpermutedTensor
from weights_io.files.tensor import FileTensor, contiguous_strides
from weights_io.quantization.gguf import KINDS, GGUFTensor, as_packed

IDS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
SHAPE = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3}  # rows of 320 fill no super-block
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
# Relative to the file; see docs/convert.md. The embedding of tied models is in Q6_K, which MLX dequantizes.
MOST = {("jax", "q8_0"): 1.02, ("jax", "q4_0"): 1.1, ("jax", "q4_k_m"): 1.3}
MOST |= {("mlx", "q8_0"): 1.08, ("mlx", "q4_0"): 1.3, ("mlx", "q4_k_m"): 1.3}


def written(folder, outtype, **changes):
    model = tiny_model.write(folder, **{**SHAPE, **changes})
    path = folder / f"{outtype}.gguf"
    ran = typed("weights_io.convert", "--model", model, "--to", "gguf", "--outtype", outtype, "--save-path", path)
    assert ran.returncode == 0, ran.stderr
    return path


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_the_values_of_gguf(kind, head_dim, tmp_path):
    """Random bytes, so that every bit counts; the rows of q and k are in another order in the file."""
    random, block = np.random.default_rng(0), KINDS[kind]
    data = random.integers(0, 256, (16, 2 * block.bytes), dtype=np.uint8)
    for place in (0, 2) if block.size == 256 and block.minima else (0,):  # no float16 is infinite
        data.reshape(16, 2, -1)[..., place + 1] &= 0b10111111
    if kind == "Q6_K":
        data.reshape(16, 2, -1)[..., 209] &= 0b10111111
    if block.minima:
        data.reshape(16, 2, -1)[..., 3] &= 0b10111111
    (tmp_path / "blocks").write_bytes(data.tobytes())
    stored = FileTensor(tmp_path / "blocks", 0, np.dtype(np.uint8), data.shape, contiguous_strides(data.shape))
    tensor = BlockTensor(stored, (16, 2 * block.size), kind)
    found = as_packed({"x": tensor if head_dim is None else UnpermutedTensor(tensor, head_dim)})["x"]
    expected = quants.dequantize(data, GGMLQuantizationType[kind])
    if head_dim is not None:
        expected = expected.reshape(2, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(expected.shape)
    assert isinstance(found, GGUFTensor) and found.kind == kind
    for rows in (slice(0, 16), slice(3, 9)):
        packed = found.packed(rows.start, rows.stop)
        np.testing.assert_array_equal(packed.dequantize(), expected[rows])
        np.testing.assert_array_equal(found.read((rows,)), expected[rows])
        low = 0 if block.minima else -(1 << block.bits - 1)
        assert packed.codes.min() >= low and packed.codes.max() < low + (1 << block.bits)


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_model_is_held_quantized(backend, outtype, tmp_path):
    path, package = written(tmp_path, outtype), {"jax": minicpm_jax, "mlx": minicpm_mlx}[backend]
    model = package.load(path, "float32")[0]
    expected = np.array(package.load(path, "float32", dequantize=True)[0](IDS))
    np.testing.assert_allclose(np.array(model(IDS)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    half = package.load(path, "bfloat16")[0]
    if backend == "jax":
        held = sum(x.size * (0.5 if x.dtype.name == "int4" else x.dtype.itemsize) for x in jax.tree.leaves(half))
    else:
        held = sum(array.nbytes for _, array in tree_flatten(half.parameters()))
    tensors = open_checkpoint(path).tensors.values()
    data = sum(t.blocks.shape[0] * t.blocks.shape[1] if isinstance(t, GGUFTensor) else 4 * t.shape[0] for t in tensors)
    assert held < MOST[backend, outtype] * data


@pytest.mark.parametrize("changes", [{"model_type": "minicpm3", **LATENT}, {"model_type": "llama"}])
def test_other_architectures(changes, tmp_path):
    path = written(tmp_path, "q8_0", **changes)
    expected = np.array(minicpm_mlx.load(path, "float32", dequantize=True)[0](IDS))
    for package in (minicpm_jax, minicpm_mlx):
        found = np.array(package.load(path, "float32")[0](IDS))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["minicpm_jax", "minicpm_mlx"])
def test_adapters_train_on_it(backend, tmp_path):
    path = written(tmp_path, "q4_0", num_hidden_layers=1)
    (tmp_path / "base").mkdir()
    tiny_training.write_data(tmp_path / "data", tiny_training.chats(4))
    options = tiny_training.lora(
        tmp_path, tmp_path / "adapter", model=str(path), iters=2, val_batches=0, targets=("all-linear",), dropout=0.0
    )
    tiny_training.finetune(backend, options)
    fused = ("--model", path, "--adapter-path", tmp_path / "adapter", "--save-path", tmp_path / "fused")
    ran = typed("weights_io.fuse", *fused)
    assert ran.returncode == 0 and "is quantized (Q4_0" in ran.stdout, ran.stderr
    adapted = np.array(minicpm_mlx.load(path, "float32", adapter=tmp_path / "adapter")[0](IDS))
    base = np.array(minicpm_mlx.load(path, "float32")[0](IDS))
    assert np.abs(adapted - base).max() > 1e-3 * np.abs(base).max()
    found = np.array(minicpm_mlx.load(tmp_path / "fused", "float32")[0](IDS))
    np.testing.assert_allclose(found, adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
