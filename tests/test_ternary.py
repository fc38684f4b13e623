"""Ternary weights (BitCPM4's): found by their values, packed in 2 bits without an error, opened by everyone."""

import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from documented_commands import typed

import minicpm_jax
import minicpm_mlx
from weights_io.checkpoint import open_checkpoint
from weights_io.files.safetensors import Computed, open_file, write_file
from weights_io.parameters import target_parameters

IDS = np.random.default_rng(0).integers(3, 300, (2, 9)).astype(np.int32)


def ternary(folder, group=64, dtype="bfloat16", but=()):
    """A tiny model whose layers have -s, 0 and s in each group; ``but``: the tensors that are as before."""
    shape = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.3}
    path = tiny_model.write(folder, dtype=dtype, **shape)
    config = open_checkpoint(path).config
    names = {name for p in target_parameters(config, ("all-linear",)) for name in p.hf_names(config)}
    tensors = {name: tensor.read() for name, tensor in open_file(path / "model.safetensors").items()}
    for name in names - set(but):
        groups = tensors[name].astype(np.float32).reshape(-1, group)
        scales = np.abs(groups).mean(axis=1, keepdims=True).astype(tensors[name].dtype).astype(np.float32)
        values = np.clip(np.rint(groups / scales), -1, 1) * scales
        values[0] = 0  # a group without any other value
        tensors[name] = values.reshape(tensors[name].shape).astype(tensors[name].dtype)
    write_file(path / "model.safetensors", {name: Computed.of(array) for name, array in tensors.items()})
    return path, names


@pytest.mark.parametrize(("group", "dtype", "packs"), [(64, "bfloat16", 64), (32, "float32", 32)])
def test_convert_packs_them_exactly(tmp_path, group, dtype, packs):
    """Every value of every tensor; the logits of both backends and of mlx_lm; all else is whole."""
    from mlx_lm.utils import load_model

    odd = "model.layers.1.mlp.up_proj.weight"
    path, names = ternary(tmp_path, group, dtype, but=[odd])
    ran = typed("minicpm_mlx.convert", "--hf-path", path, "--mlx-path", tmp_path / "packed", "-q", "--ternary")
    assert f"{len(names) - 1} matrices in 2 bits and groups of {packs}, as MLX packs them" in ran.stdout, ran.stderr
    source, packed = open_checkpoint(path), open_checkpoint(tmp_path / "packed")
    assert packed.dtype == dtype
    for name, tensor in packed.tensors.items():
        np.testing.assert_array_equal(tensor.read().astype(np.float32), source.read(name, "float32").astype(np.float32))
        assert (packed.packed(name) is not None) == (name in names - {odd})
    expected = np.array(minicpm_mlx.load(path, "float32")[0](IDS))
    close = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    for backend in (minicpm_jax, minicpm_mlx):
        np.testing.assert_allclose(np.array(backend.load(tmp_path / "packed", "float32")[0](IDS)), expected, **close)
    theirs, _ = load_model(tmp_path / "packed", trust_remote_code=True)
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(theirs(mx.array(IDS))), expected, **close)


def test_they_are_told(tmp_path):
    path, _ = ternary(tmp_path)
    said = typed("weights_io.inspect", "--model", path).stdout
    assert "the weights are ternary (three values in each group of 64): convert --to mlx -q --ternary" in said
    ran = typed("weights_io.convert", "--model", path, "--to", "mlx", "-q", "--save-path", tmp_path / "other")
    assert "the weights are ternary: with --ternary they are packed in 2 bits without an error" in ran.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-q", "--ternary"], "--ternary is for matrices with three values in each group, and"),
        (["--ternary"], "--ternary is only used with --quantize; leave it out or add --quantize"),
        (["-q", "--ternary", "--q-bits", "4"], "--q-bits is chosen by --ternary; leave one of the two out"),
        (["-q", "--ternary", "--q-group-size", "64"], "--q-group-size is chosen by --ternary"),
    ],
)
def test_what_cannot_be(reference, tmp_path, options, said):
    model = reference("dense_eps")
    ran = typed("weights_io.convert", "--model", model, "--to", "mlx", "--save-path", tmp_path / "out", *options)
    assert ran.returncode == 2 and said in ran.stderr and not (tmp_path / "out").exists()
    assert "ternary" not in typed("weights_io.inspect", "--model", model).stdout
