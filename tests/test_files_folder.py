"""Which files of a folder hold the weights, and shards that are not what their index says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from weights_io.errors import InputError
from weights_io.files import safetensors
from weights_io.files.folder import open_folder
from weights_io.files.safetensors import Computed

SHARD = "model-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def store(path: Path, *names: str) -> None:
    array = np.arange(4, dtype=np.float32)
    safetensors.write_file(path, {name: Computed(array.shape, array.dtype, lambda: array) for name in names})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with the tensors a and b, and their index."""
    store(tmp_path / SHARD.format(1), "a")
    store(tmp_path / SHARD.format(2), "b")
    index(tmp_path, {"a": SHARD.format(1), "b": SHARD.format(2)})
    return tmp_path


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, dtype, count", [("bin", "float32", 30), ("bin_sharded", "bfloat16", 39)])
def test_torch_folders(reference, name, dtype, count):
    tensors = open_folder(reference(name))
    assert len(tensors) == count
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    assert all(np.isfinite(tensor.read().astype(np.float32)).all() for tensor in tensors.values())


def test_shards_are_read_as_the_package_reads_them(reference):
    from safetensors.numpy import load_file

    expected = {}
    for path in reference("sharded").glob("*.safetensors"):
        expected |= load_file(path)
    tensors = open_folder(reference("sharded"))
    assert tensors.keys() == expected.keys() and len({tensor.source for tensor in tensors.values()}) == 3
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_links_into_a_blob_store_are_followed(reference, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for k, path in enumerate(sorted(reference("bin_sharded").glob("pytorch_model*"))):
        shutil.copyfile(path, blobs / str(k))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(k))
    assert open_folder(snapshot).keys() == open_folder(reference("bin_sharded")).keys()


def test_the_order_of_preference(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_folder(folder).keys() == {"a", "b"}
    for k in (1, 2):
        (folder / SHARD.format(k)).unlink()
    store(folder / "model.safetensors", "c")
    assert open_folder(folder).keys() == {"c"}


@pytest.mark.parametrize("kept", [INDEX, SHARD.format(1)])
def test_one_file_beside_shards(folder, kept):
    """transformers would take the one file, whose shards may be those of a later model."""
    store(folder / "model.safetensors", "c")
    refused(folder, f"holds model.safetensors and the shards {SHARD.format(1)}, {SHARD.format(2)}, .* remove what")
    for path in list(folder.glob("model-*")) + [folder / INDEX]:
        if path.name != kept:
            path.unlink()
    if kept == INDEX:
        assert open_folder(folder).keys() == {"c"}
    else:
        refused(folder, f"holds model.safetensors and the shards {SHARD.format(1)}, ")


def test_one_file_and_its_own_index(tmp_path):
    """As mlx_lm writes every model."""
    store(tmp_path / "model.safetensors", "a")
    index(tmp_path, {"a": "model.safetensors"})
    assert open_folder(tmp_path).keys() == {"a"}


def test_shards_may_be_numbered_from_zero(tmp_path):
    """As MiniCPM5-1B's only file is."""
    store(tmp_path / "model-00000-of-00001.safetensors", "a")
    assert open_folder(tmp_path).keys() == {"a"}  # by its name there are no others
    index(tmp_path, {"a": "model-00000-of-00001.safetensors"})
    assert open_folder(tmp_path).keys() == {"a"}


def test_a_single_file_of_another_name(tmp_path):
    store(tmp_path / "adapter_model.safetensors", "lora")
    store(tmp_path / "adapters.safetensors", "lora")
    refused(tmp_path, "is not a model folder: it has none of model.safetensors")
    store(tmp_path / "weights.safetensors", "a")
    assert open_folder(tmp_path).keys() == {"a"}
    store(tmp_path / "more.safetensors", "b")
    refused(tmp_path, "has more.safetensors, weights.safetensors, but no model.safetensors.index.json")


def test_shards_without_an_index_are_refused(folder):
    (folder / INDEX).unlink()
    refused(folder, "but no model.safetensors.index.json")
    (folder / SHARD.format(2)).unlink()
    refused(folder, "but no model.safetensors.index.json")


def test_missing_shards_are_all_named(folder):
    index(folder, {"a": SHARD.format(1), "b": SHARD.format(3), "c": SHARD.format(4)})
    refused(folder, f"lacks {SHARD.format(3)}, {SHARD.format(4)}")
    index(folder, {str(k): f"model-{k}-of-9.safetensors" for k in range(9)})
    refused(folder, "lacks model-0-of-9.safetensors, .*, model-2-of-9.safetensors and 6 more, which")


def test_shard_and_index_must_agree(folder):
    index(folder, {"a": SHARD.format(1), "b": SHARD.format(2), "c": SHARD.format(2)})
    refused(folder, f"{SHARD.format(2)} lacks c")
    store(folder / SHARD.format(1), "a", "d")
    index(folder, {"a": SHARD.format(1), "b": SHARD.format(2)})
    assert open_folder(folder).keys() == {"a", "b", "d"}  # as in a single file, for the parameter table to judge


def test_a_tensor_in_two_shards(folder):
    store(folder / SHARD.format(1), "a", "b")
    found = open_folder(folder)
    assert list(found) == ["a", "b"] and found["b"].source.name == SHARD.format(2)
    other = np.arange(1, 5, dtype=np.float32)
    safetensors.write_file(folder / SHARD.format(2), {"b": Computed.of(other)})
    refused(folder, f"b is another one in .*{SHARD.format(1)} than in .*{SHARD.format(2)}; download both")
    safetensors.write_file(folder / SHARD.format(2), {"b": Computed.of(other[:3])})
    refused(folder, "b is another one")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", "passwd", "x.bin"],
)
def test_an_index_cannot_point_outside_its_folder(folder, shard):
    index(folder, {"a": SHARD.format(1), "b": shard})
    refused(folder, "not a .safetensors file beside it")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, f"{INDEX}.* (not JSON|JSON object|no weight_map)")


def test_a_file_name_too_long_for_the_system_is_missing(folder):
    index(folder, {"a": "x" * 1000 + ".safetensors"})
    refused(folder, "lacks xxx")


def test_shards_without_end_are_refused(folder):
    index(folder, {str(i): f"model-{i}.safetensors" for i in range(10_001)})
    refused(folder, "names 10001 files, more than any model has")


def test_a_git_lfs_pointer_is_called_by_its_name(folder):
    (folder / SHARD.format(1)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "Git LFS pointer.*git lfs pull")
