"""Runs of fine-tuning that are not to be gone on with, and seeds that are none."""

import shutil

import pytest
import tiny_model
import tiny_training as tiny
from tiny_training import BACKENDS

from weights_io.errors import InputError

pytest.importorskip("jax")
pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("first", BACKENDS)
def test_a_run_of_the_other_backend_is_left_as_it_is(world, tmp_path, first):
    (second,) = {*BACKENDS} - {first}
    options = tiny.lora(world, tmp_path / "out", iters=1)
    tiny.finetune(first, options)
    before = {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a run with another backend; choose another folder, or delete"):
        tiny.finetune(second, tiny.lora(world, options.out, iters=2, resume=True))
    assert {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_does_not_go_on_with_other_weights_under_the_same_name(world, tmp_path, backend):
    """The model's folder was written anew since; other valid examples are noted alone."""
    root = tmp_path / "root"
    shutil.copytree(world, root)
    options = tiny.lora(root, tmp_path / "out", iters=1)
    tiny.finetune(backend, options)
    shutil.rmtree(root / "model")
    tiny_model.write(root, **tiny.DENSE, seed=5)
    with pytest.raises(InputError, match="holds a run with another model; choose another folder"):
        tiny.finetune(backend, tiny.lora(root, tmp_path / "out", iters=2, resume=True))
    shutil.copytree(world, root, dirs_exist_ok=True)
    tiny.write_data(root / "data", tiny.chats(24), valid=tiny.chats(5, seed=3))
    tiny.finetune(backend, tiny.lora(root, tmp_path / "out", iters=2, resume=True))
    assert [record["step"] for record in tiny.records(tmp_path / "out")] == [1, 2]


def test_a_seed_has_32_bits(world, tmp_path):
    tiny.trainer("minicpm_mlx", tiny.lora(world, tmp_path, seed=2**32 - 1)).step([_batch()], 1e-3, 10**6)
    with pytest.raises(InputError, match="seed is 4294967296; it must be below"):
        tiny.finetune("minicpm_mlx", tiny.lora(world, tmp_path / "out", seed=2**32))


def _batch():
    return dict.fromkeys(("ids", "labels", "segments"), tiny.IDS)
