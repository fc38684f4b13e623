"""Our readers of torch and safetensors files against torch's own, on files that torch writes here."""

import json
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files import safetensors as our_safetensors
from weights_io.files import torch_pickle
from weights_io.files.folder import open_folder
from weights_io.files.safetensors import Computed

pytestmark = pytest.mark.interop

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def raw(value: torch.Tensor | np.ndarray) -> bytes:
    """The bits in row-major order, which compare NaN and -0.0 too, and what numpy has no dtype for."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    return value.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def same(tensor, expected: torch.Tensor) -> None:
    assert tensor.shape == tuple(expected.shape)
    assert tensor.dtype.name == str(expected.dtype).removeprefix("torch.")
    assert raw(tensor.read()) == raw(expected)


def slices(shape: tuple[int, ...], rng: random.Random) -> tuple[slice, ...]:
    """Of some leading axes; also empty ones, and ones with no beginning or end."""
    index = []
    for n in shape[: rng.randint(1, len(shape))]:
        start, stop = sorted((rng.randint(0, n), rng.randint(0, n)))
        index.append(slice(rng.choice((start, None)), rng.choice((stop, None))))
    return tuple(index)


def views() -> dict[str, torch.Tensor]:
    """Tensors that share storages, begin within them and run through them in every order."""
    found: dict[str, torch.Tensor] = {}
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        base = normal(6, 8, dtype=dtype)
        cube = normal(3, 4, 5, dtype=dtype, seed=1)
        found |= {
            f"{name}.base": base,
            f"{name}.twin": base,
            f"{name}.rows": base[2:5],
            f"{name}.columns": base[:, 3:],
            f"{name}.transposed": base.T,
            f"{name}.transposed_part": base.T[1:5, 2:],
            f"{name}.every_second": base[::2, 1::3],
            f"{name}.permuted": cube.permute(2, 0, 1),
            f"{name}.plane": cube[:, 2],
            f"{name}.expanded": base[0].expand(4, 8),
            f"{name}.one_column": base[:, 7:8],
            f"{name}.parameter": torch.nn.Parameter(base.T[2:]),
            f"{name}.frozen": torch.nn.Parameter(cube, requires_grad=False),
            f"{name}.scalar": base[1, 1],
            f"{name}.empty": torch.empty(0, 7, dtype=dtype),
            f"{name}.special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-7]).to(dtype),
        }
    found |= {f"other.{dtype}": normal(5, 3, dtype=dtype).T for dtype in OTHERS + EIGHTS}
    return found


def test_every_view_is_what_torch_loads(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(views(), path)
    expected = torch.load(path, weights_only=True)
    found = torch_pickle.open_file(path)
    assert list(found) == list(expected) == list(views())
    for name, tensor in expected.items():
        same(found[name], tensor)


def test_slices_are_torch_slices(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(views(), path)
    expected, found, rng = torch.load(path, weights_only=True), torch_pickle.open_file(path), random.Random(0)
    for name, tensor in expected.items():
        for _ in range(20 if tensor.dim() else 0):
            index = slices(tuple(tensor.shape), rng)
            part = found[name].read(index)
            assert part.shape == tuple(tensor[index].shape) and raw(part) == raw(tensor[index]), (name, index)


class Net(torch.nn.Module):
    """With a tied weight, a buffer, and the ``_metadata`` of a state_dict."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 11, bias=False, dtype=torch.bfloat16)
        self.tied = torch.nn.Linear(4, 11, bias=False)
        self.tied.weight = self.embed.weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": state, "epoch": 3, "lr": 1e-3, "note": "x", "seen": [1, 2], "last": None},
        lambda state: {"model": dict(state), "step": 7},
    ],
    ids=["plain", "state_dict", "state_dict and notes", "model"],
)
def test_state_dict_of_a_module(tmp_path, wrap):
    state = Net().state_dict()
    assert state._metadata
    torch.save(wrap(state), tmp_path / "model.bin")
    found = torch_pickle.open_file(tmp_path / "model.bin")
    assert list(found) == list(state)
    for name, tensor in state.items():
        same(found[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    state = {"a.weight": normal(3, 4), "b.weight": normal(2, 2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "model.bin", pickle_protocol=protocol)
    found = torch_pickle.open_file(tmp_path / "model.bin")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        same(found[name], tensor)


def test_storages_at_other_places_in_the_file(tmp_path):
    """torch can be asked to begin each storage at a page, for mapping it into memory."""
    config = torch.utils.serialization.config.save
    state, before = {"a": normal(3, 4), "b": normal(5)}, config.storage_alignment
    config.storage_alignment = 4096
    try:
        torch.save(state, tmp_path / "model.bin")
    finally:
        config.storage_alignment = before
    found = torch_pickle.open_file(tmp_path / "model.bin")
    assert all(tensor.offset % 4096 == 0 for tensor in found.values())
    for name, tensor in state.items():
        same(found[name], tensor)


def test_checksums_that_torch_was_told_not_to_compute(tmp_path):
    state, before = {"a": normal(3, 4)}, torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(tmp_path / "model.bin") as archive:
        assert archive.testzip() is not None  # a checksum that is wrong
    same(torch_pickle.open_file(tmp_path / "model.bin")["a"], state["a"])


def test_the_format_before_1_6_is_refused(tmp_path):
    torch.save(views(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="has the format of torch before 1.6, .* save it again") as caught:
        torch_pickle.open_file(tmp_path / "old.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Net(), "would run .*Net, .* save the plain state_dict"),
        (lambda: torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), "TorchScript"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "would run torch._utils._rebuild_sparse_tensor"),
        (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}, "would run torch.ComplexFloatStorage"),
        (lambda: torch.ones(2), "not a state_dict"),
        (lambda: {"optimizer": torch.optim.SGD(Net().parameters()).state_dict()}, "not a tensor"),
    ],
    ids=["module", "script", "sparse", "complex", "bare tensor", "optimizer"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_state_dict_is_refused(tmp_path, make, message):
    made = make()
    if isinstance(made, torch.jit.ScriptModule):
        made.save(str(tmp_path / "model.bin"))
    else:
        torch.save(made, tmp_path / "model.bin")
    with pytest.raises(InputError, match=message) as caught:
        torch_pickle.open_file(tmp_path / "model.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_folder_of_torch_files(tmp_path, reference, sharded):
    """dense_2b saved by torch in bfloat16, whole and in shards, its head stored as the embedding's storage again."""
    source = reference("dense_2b")
    state = safetensors.torch.load_file(source / "model.safetensors")
    state = {name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    if sharded:
        names = list(state)
        weight_map = {n: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, n in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({n: state[n] for n in names if weight_map[n] == file}, tmp_path / file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert open_folder(tmp_path).keys() == state.keys()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == state.keys() - {"lm_head.weight"}
    for name, tensor in checkpoint.tensors.items():
        same(tensor, state[name])


def test_safetensors_that_torch_writes(tmp_path):
    state = {name: tensor.detach().clone().contiguous() for name, tensor in views().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found, rng = our_safetensors.open_file(tmp_path / "model.safetensors"), random.Random(0)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        same(found[name], tensor)
        index = slices(tuple(tensor.shape), rng) if tensor.dim() else ()
        assert raw(found[name].read(index)) == raw(tensor[index])


def test_torch_reads_the_safetensors_that_we_write(tmp_path):
    kinds = [np.float32, np.float16, np.float64, np.int64, np.int8, np.bool_]
    kinds += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    rng = np.random.default_rng(0)
    arrays = {np.dtype(kind).name: (3 * rng.standard_normal((4, 5))).astype(kind) for kind in kinds}
    declared = {name: Computed(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    our_safetensors.write_file(tmp_path / "model.safetensors", declared)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert str(loaded[name].dtype) == f"torch.{name}" and tuple(loaded[name].shape) == array.shape
        assert raw(loaded[name]) == raw(array)
