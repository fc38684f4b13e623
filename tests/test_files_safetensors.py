"""Safetensors files: read as the safetensors package reads them, and refused in one sentence when damaged."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from weights_io.errors import InputError
from weights_io.files import safetensors
from weights_io.files.safetensors import Computed

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [24, 24]},
}


def store(path: Path, header: object, data: bytes = bytes(32)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def with_a(**changes) -> dict:
    return GOOD | {"a": GOOD["a"] | changes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_reads_what_the_package_wrote(path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    dtypes = [d for name, d in safetensors.DTYPES.items() if not name.startswith("F8")]
    arrays = {d.name: rng.integers(0, 2, (5, 7)).astype(d) for d in dtypes} | {"scalar": np.array(2.5, np.float32)}
    save_file(arrays, path)
    tensors = safetensors.open_file(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name].read(), array)
    np.testing.assert_array_equal(tensors["bfloat16"].read((slice(1, 4), slice(2, None))), arrays["bfloat16"][1:4, 2:])


def test_the_package_reads_what_is_written(path):
    from safetensors import safe_open

    arrays = {
        "byte": np.arange(3, dtype=np.uint8),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3).T,  # not contiguous
        "wide": np.arange(4, dtype=np.float64),
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "eight": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(2.5, np.float32),
    }
    made = []

    def maker(name: str):
        def make() -> np.ndarray:
            made.append(name)
            return arrays[name]

        return make

    declared = {name: Computed(a.shape, a.dtype, maker(name)) for name, a in arrays.items()}
    safetensors.write_file(path, declared)
    assert sorted(made) == sorted(arrays)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name in set(arrays) - {"eight"}:  # that dtype is not numpy's
            np.testing.assert_array_equal(file.get_tensor(name), arrays[name])
    tensors = safetensors.open_file(path)
    np.testing.assert_array_equal(tensors["eight"].read(), arrays["eight"])
    assert all(t.offset % t.dtype.itemsize == 0 for t in tensors.values())
    safetensors.write_file(path.with_name("copy"), tensors)  # what is read can be written
    assert safetensors.open_file(path.with_name("copy"))["half"].read().tolist() == arrays["half"].tolist()


@pytest.mark.parametrize("array", [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float16), np.zeros((2, 3), ">f4")])
def test_an_array_other_than_declared_is_not_written(path, array):
    with pytest.raises(ValueError, match="was declared float32"):
        safetensors.write_file(path, {"x": Computed((2, 3), np.dtype(np.float32), lambda: array)})


@pytest.mark.parametrize("name, dtype", [("x", np.complex128), ("__metadata__", np.float32)])
def test_what_the_format_has_not_is_not_written(path, name, dtype):
    with pytest.raises(ValueError, match="cannot hold"):
        safetensors.write_file(path, {name: Computed((1,), np.dtype(dtype), lambda: np.zeros(1, dtype))})


def test_the_good_header_is_good(path):
    assert safetensors.open_file(store(path, GOOD)).keys() == GOOD.keys()


def test_metadata_may_be_null(path):
    """As MLX writes it."""
    assert safetensors.open_file(store(path, GOOD | {"__metadata__": None})).keys() == GOOD.keys()


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "'a' twice"),
        ({"a": 1}, "not described"),
        (with_a(extra=1), "not described"),
        (with_a(dtype=None), "not described"),
        (with_a(dtype="F33"), "has the dtype F33, which is none"),
        (with_a(shape=[-2, -3]), "shape"),
        (with_a(shape=[2.0, 3]), "shape"),
        (with_a(shape=[True, 6]), "shape"),
        (with_a(shape=6), "shape"),
        (with_a(shape=[6] + [1] * 64), "shape"),
        (with_a(shape=[10**400]), "shape"),
        (with_a(shape=[2, 4]), "another number of bytes"),
        (with_a(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "another number of bytes"),
        (with_a(data_offsets=[0]), "not two whole numbers"),
        (with_a(data_offsets=[-24, 0]), "not two whole numbers"),
        (with_a(data_offsets=[24, 0]), "another number of bytes"),
        (with_a(data_offsets=[8, 32]), "leaves unused bytes"),
        (GOOD | {"b": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "overlaps"),
        (with_a(data_offsets=[100, 124]), r"truncated: its header describes \d+ bytes and it has \d+"),
        ({"a": GOOD["a"]}, "too long"),
        (GOOD | {"__metadata__": []}, "__metadata__"),
        (GOOD | {"__metadata__": {"a": 1}}, "__metadata__"),
    ],
)
def test_a_wrong_header_is_refused(path, header, message):
    with pytest.raises(InputError, match=message):
        safetensors.open_file(store(path, header))


def test_every_truncation_and_wrong_digit_is_refused(path):
    whole = store(path, {name: GOOD[name] for name in "ab"}).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            safetensors.open_file(path)
    for match in re.finditer(rb"\d", whole):
        for digit in b"0123456789":
            if digit != whole[match.start()]:
                path.write_bytes(whole[: match.start()] + bytes([digit]) + whole[match.end() :])
                with pytest.raises(InputError):
                    safetensors.open_file(path)
    for size in (2**63, 100_000_001):
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])
        with pytest.raises(InputError, match="promises a header"):
            safetensors.open_file(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            safetensors.open_file(path)
