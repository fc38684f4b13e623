"""All of a checkpoint in memory: every number where it belongs, in whatever pieces it was read."""

import numpy as np
import pytest

from weights_io.casting import numpy_dtype
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files import threaded_reader
from weights_io.files.tensor import FileTensor
from weights_io.parameters import parameters


@pytest.mark.parametrize("piece", [100, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense_bf16", "dense_1b", "moe_8x2b", "bin", "gguf/model-q4_0.gguf"])
def test_arrays_are_the_tensors_stacked(reference, monkeypatch, name, dtype, piece):
    monkeypatch.setattr(threaded_reader, "PIECE", piece)
    checkpoint, kind = open_checkpoint(reference(name)), numpy_dtype(dtype)
    arrays = threaded_reader.read_stacked(checkpoint, dtype)
    for parameter in parameters(checkpoint.config):
        array = arrays.pop(parameter.name)
        rows = [checkpoint.read(tensor, dtype).astype(kind) for tensor in parameter.hf_names(checkpoint.config)]
        np.testing.assert_array_equal(array, np.stack(rows).reshape(parameter.shape(checkpoint.config)))
        assert array.dtype == kind and array.ctypes.data % threaded_reader.ALIGNMENT == 0
    assert not arrays


def test_matrices_in_another_dtype(reference):
    checkpoint = open_checkpoint(reference("dense_bf16"))
    mixed = threaded_reader.read_stacked(checkpoint, "float32", matrices="bfloat16")
    for name, array in threaded_reader.read_stacked(checkpoint, "float32").items():
        assert mixed[name].dtype.name == ("float32" if name.endswith("norm.weight") else "bfloat16")
        np.testing.assert_array_equal(mixed[name], array.astype(mixed[name].dtype))


def test_rows_that_lie_otherwise_in_the_file_are_not_read_as_they_lie(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    numbers.tofile(tmp_path / "numbers")
    plain = FileTensor(tmp_path / "numbers", 0, numbers.dtype, (4, 3), (3, 1))
    turned = FileTensor(tmp_path / "numbers", 0, numbers.dtype, (3, 4), (1, 3))
    rows = np.empty((2, 3), np.float32)
    assert plain.read_rows(1, rows)
    np.testing.assert_array_equal(rows, numbers.reshape(4, 3)[1:3])
    assert not turned.read_rows(1, np.empty((2, 4), np.float32))
    assert not plain.read_rows(1, rows.astype(np.float16))
    with pytest.raises(InputError, match="numbers became shorter while it was read"):
        plain.read_rows(3, rows)
