"""The variant that docs/architecture.md adds from outside the packages, in both backends."""

import json

import jax
import numpy as np
import pytest
import tiny_model
from documented_commands import blocks
from safetensors.numpy import load_file, save_file

import minicpm_jax.model
import minicpm_mlx.model
from minicpm_data.cli.inspect import inspect
from minicpm_jax.parallel.mesh import make_mesh
from minicpm_jax.training.step import weights_of
from weights_io import config, convert
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

GAINS = "model.layers.{}.mlp.gain.weight"
BACKENDS = [minicpm_jax, minicpm_mlx]


@pytest.fixture(scope="module")
def gained():
    """The block of the page, taken back afterwards."""
    (block,) = blocks("docs/architecture.md", "python")
    with pytest.MonkeyPatch.context() as patch:
        for registry in (config.FAMILIES, minicpm_jax.model.LAYERS, minicpm_mlx.model.LAYERS):
            patch.setitem(registry, "gained", None)
        exec(block, {"__name__": "outside"})
        yield


@pytest.fixture(scope="module")
def folder(gained, tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("gained"), model_type="gained", architectures=["GainedForCausalLM"])


def logits(backend, folder, **options):
    return np.array(backend.load(folder, dtype="float32", **options)[0]([[1, 5, 9, 20, 7]]))


def changed(folder, out, gain=1.0, down=1.0, **keys):
    """A copy whose gains and down projections are multiplied, and whose config has other keys."""
    out.mkdir()
    raw = json.loads((folder / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t * np.float32(gain if "gain" in n else down if "down" in n else 1) for n, t in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if "gain" not in n or raw["model_type"] == "gained"}
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_its_gain_counts_and_nothing_else_does(backend, folder, tmp_path):
    plain = changed(folder, tmp_path / "plain", down=3, model_type="minicpm", architectures=["MiniCPMForCausalLM"])
    gain = changed(folder, tmp_path / "gain", gain=3)
    np.testing.assert_allclose(logits(backend, gain), logits(backend, plain), atol=1e-5)
    assert np.abs(logits(backend, folder) - logits(backend, plain)).max() > 0.01


@pytest.mark.slow
def test_everything_that_reads_the_table_takes_it(folder, tmp_path):
    gain = changed(folder, tmp_path / "gain", gain=-2)
    expected = logits(minicpm_mlx, gain)
    np.testing.assert_allclose(logits(minicpm_jax, gain, mesh=make_mesh("fsdp=8")), expected, atol=1e-5)
    answers = [b.stream_generate(b.load(gain, dtype="float32")[0], None, [1, 5, 9], max_tokens=8) for b in BACKENDS]
    first, second = ([response.token for response in answer] for answer in answers)
    assert first == second
    convert.main(convert.Options(model=str(gain), to="hf", save_path=tmp_path / "out"))
    np.testing.assert_array_equal(logits(minicpm_mlx, tmp_path / "out"), expected)
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(gain).config
    assert inspect(gain).architecture.startswith("GainedForCausalLM")
    new = minicpm_jax.model.initialize(open_checkpoint(gain).config, jax.random.key(0))
    assert (weights_of(new)["model.layers.mlp.gain.weight"] == 1).all()


def test_what_it_has_not_is_refused_by_name(folder, tmp_path):
    with pytest.raises(InputError, match="a Llama does not have all parameters of GainedForCausalLM"):
        convert.main(convert.Options(model=str(folder), to="llama", save_path=tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[GAINS.format(1)]
    lacking = changed(folder, tmp_path / "lacking")
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gain\.weight"):
        minicpm_jax.load(lacking)
