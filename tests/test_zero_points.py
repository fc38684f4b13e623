"""GPTQ and AWQ folders that are written here: packed as the tools do, and read back as the codes that were chosen."""

import numpy as np
import pytest
import tiny_model
from documented_commands import typed
from test_quantization import MODULE, opened, part

from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.quantization.packed import PackedTensor
from weights_io.quantization.zero_points import awq_parts, gptq_parts, round_to_nearest

GPTQ = (
    "int4",
    "int4_asym",
    "int4_desc_act",
    "int4_desc_act_asym",
    "int4_g32_asym",
    "int4_g32_asym_desc_act",
    "int4_gm1",
)
FOLDERS = [f"gptq_{name}" for name in GPTQ] + ["awq_int4", "awq_int4_g64_scaled"]


@pytest.mark.parametrize("name", FOLDERS)
def test_codes_are_packed_as_by_the_tool(name, reference):
    """auto_gptq 0.7.1 and autoawq 0.2.9 packed these matrices; their codes, packed here, are the same bytes."""
    folder = reference(f"quant/{name}")
    parts = (gptq_parts if name.startswith("gptq") else awq_parts)(opened(folder).packed())
    for stored, array in parts.items():
        np.testing.assert_array_equal(array, part(folder, stored), err_msg=f"{MODULE}.{stored}")


@pytest.mark.parametrize("to, bits", [("gptq", 4), ("gptq", 8), ("gptq", 3), ("gptq", 2), ("awq", 4)])
def test_a_folder_is_the_rounded_model(to, bits, tmp_path):
    folder = tiny_model.write(tmp_path, hidden_size=64, intermediate_size=96)
    flags = ("--to", to, "--q-bits", bits, "--q-group-size", 32, "--save-path", tmp_path / "out")
    ran = typed("weights_io.convert", "--model", folder, *flags)
    assert ran.returncode == 0, ran.stderr
    source, found = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    packed = [name for name, tensor in found.tensors.items() if isinstance(tensor, PackedTensor)]
    assert len(packed) == 7 * source.config.num_hidden_layers
    for name, tensor in source.tensors.items():
        expected = tensor.read().astype(np.float16).astype(np.float32)
        if name in packed:
            expected = round_to_nearest(expected, bits, 32, symmetric=to == "gptq").dequantize()
        np.testing.assert_array_equal(found.tensors[name].read().astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_weight_is_the_nearest_of_its_group(bits, symmetric):
    rows = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    rows[0] = 0
    rows[1] = np.abs(rows[1])  # zero point 0 is not written
    packed = round_to_nearest(rows, bits, 32, symmetric)
    assert packed.zeros.min() >= 1 and packed.codes.max() < 2**bits
    every = np.arange(2**bits)[:, None, None] - packed.zeros
    values = np.repeat(
        every * packed.scales.astype(np.float32), 32, axis=-1
    )  # all that a code can say, [code, out, in]
    best = np.abs(values - rows).min(0)
    np.testing.assert_allclose(np.abs(packed.dequantize() - rows), best, atol=1e-6)


def test_weights_beyond_float16_are_refused():
    with pytest.raises(InputError, match="too large"):
        round_to_nearest(np.full((1, 32), 1e9, np.float32), 4, 32, True)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--to", "awq", "--q-bits", 8), "--q-bits is 8; AWQ has 4"),
        (("--to", "gptq", "--q-bits", 5), "--q-bits is 5; GPTQ has 2, 3, 4, 8"),
        (("--to", "gptq"), "the group size 128 does not divide the 32 inputs of model.layers.0"),
        (("--to", "gptq", "--dequantize"), "do not go together"),
        (("--to", "awq", "--ternary"), "--ternary is only used with --quantize"),
    ],
)
def test_wrong_calls(flags, said, tmp_path):
    ran = typed("weights_io.convert", "--model", tiny_model.write(tmp_path), *flags, "--save-path", tmp_path / "out")
    assert (ran.returncode, said in ran.stderr, (tmp_path / "out").exists()) == (2, True, False), ran.stderr


def test_mlx_lm_opens_the_awq_folder(tmp_path):
    """An untied one; a tied model it fails to load, quantized or not."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    shape = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False, "rope_theta": 10000.0}
    folder = tiny_model.write(tmp_path, **shape)
    flags = ("--to", "awq", "--q-group-size", 32, "--save-path", tmp_path / "out")
    assert typed("weights_io.convert", "--model", folder, *flags).returncode == 0
    import minicpm_mlx

    ids = np.arange(3, 15)[None]
    ours = np.array(minicpm_mlx.load(tmp_path / "out", dtype="float32")[0](ids))
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    found = np.array(theirs(mx.array(ids)))
    assert np.abs(found - ours).max() < 3e-3 * np.abs(ours).max()  # its biases are rounded to float16
