"""A checkpoint with NaN or infinite numbers is refused by name when it is loaded, whatever the format."""

import shutil
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from weights_io.casting import CACHED, largest_magnitude
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, write_file

NAME = "model.layers.1.mlp.up_proj.weight"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(params=["jax", "mlx"])
def load(request):
    if request.param == "mlx":
        pytest.importorskip("mlx.core")
        from minicpm_mlx import load
    else:
        pytest.importorskip("jax")
        from minicpm_jax import load
    return load


def spoiled(folder: Path, to: Path, number: float, dtype=np.float32, name=NAME) -> Path:
    """A copy of a model folder with one number of one tensor changed, all in ``dtype``."""
    tensors = {}
    for key, tensor in open_checkpoint(folder).tensors.items():
        array = tensor.read().astype(dtype)
        if key == name:
            array.reshape(-1)[array.size // 2] = number
        tensors[key] = Computed(array.shape, np.dtype(dtype), lambda array=array: array)
    to.mkdir()
    shutil.copyfile(folder / "config.json", to / "config.json")
    write_file(to / "model.safetensors", tensors)
    return to


def refused(load, path: Path, message: str, dtype: str | None = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(path, dtype)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused_by_name(load, reference, tmp_path, number, dtype):
    folder = spoiled(reference("dense_2b"), tmp_path / "model", number, dtype)
    refused(load, folder, f"{NAME} in .*model.safetensors holds NaN or infinite numbers")


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"],
)
def test_in_any_tensor(load, reference, tmp_path, name):
    refused(load, spoiled(reference("dense_untied"), tmp_path / "model", np.nan, name=name), f"{name} in .* holds NaN")


def test_in_a_torch_file(load, reference, tmp_path):
    """Written anew with its checksums: those of the archive would tell of a number that was only written over."""
    folder = shutil.copytree(reference("bin"), tmp_path / "model", copy_function=shutil.copyfile)
    tensor = open_checkpoint(folder).tensors[NAME]
    raw = bytearray(tensor.source.read_bytes())
    raw[tensor.offset : tensor.offset + tensor.dtype.itemsize] = np.array(np.nan, tensor.dtype).tobytes()
    with zipfile.ZipFile(tensor.source) as archive:
        entries = {}
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", raw, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            entries[entry.filename] = bytes(raw[start : start + entry.file_size])
    with zipfile.ZipFile(tensor.source, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(load, folder, f"{NAME} in .*pytorch_model.bin holds NaN")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
def test_a_scale_of_a_quantised_block(load, reference, tmp_path):
    path = Path(shutil.copyfile(reference("gguf/model-q4_0.gguf"), tmp_path / "model.gguf"))
    tensor = open_checkpoint(path).tensors[NAME]
    assert tensor.kind == "Q4_0"
    with open(path, "r+b") as file:
        file.seek(tensor.whole.packed.offset)
        file.write(np.float16(np.nan).tobytes())
    refused(load, path, f"{NAME} in .*model.gguf holds NaN")


def test_too_large_for_the_dtype(load, reference, tmp_path):
    folder = spoiled(reference("dense_2b"), tmp_path / "model", -65520.0)
    refused(load, folder, f"{NAME} in .* holds 6.552e\\+04, which is too large for float16; choose", "float16")
    load(folder, "bfloat16")
    spoiled(reference("dense_2b"), tmp_path / "largest", 65519.0)  # rounds to float16's largest, 65504
    load(tmp_path / "largest", "float16")


@pytest.mark.parametrize("dtype", FLOATS)
def test_largest_magnitude(dtype):
    rng = np.random.default_rng(0)
    for shape in [(), (0,), (1,), (7, 5), (3, CACHED)]:
        values = rng.normal(size=shape).astype(dtype)
        expected = np.abs(values.astype(np.float64)).max(initial=0)
        assert float(largest_magnitude(values)) == expected
        assert largest_magnitude(values).dtype == dtype
    for place in (0, CACHED - 1, CACHED, 3 * CACHED - 1):
        for number in (np.nan, -np.nan, np.inf, -np.inf):
            values[...] = 1
            values.reshape(-1)[place] = number
            assert not np.isfinite(largest_magnitude(values))
    values[...] = -np.finfo(np.float16).smallest_subnormal
    assert np.isfinite(largest_magnitude(values))
