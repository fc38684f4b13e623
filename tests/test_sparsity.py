"""Which share of the neurons ReLU and FATReLU leave at 0."""

import importlib
import re
import shutil

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError

TOKENS = 40


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


def in_numpy(folder, ids):
    """[L] for a model whose attention adds nothing."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    weights = {name: tensor.read().astype(np.float64) for name, tensor in checkpoint.tensors.items()}
    x, shares = weights["model.embed_tokens.weight"][ids] * config.embedding_scale, []
    for i in range(config.num_hidden_layers):
        gate, up, down = (weights[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps)
        active = np.where((g := normed @ gate.T) >= config.activation_threshold, g, 0)
        shares.append(np.mean(active == 0))
        x = x + config.residual_scale * (active * (normed @ up.T)) @ down.T
    return np.array(shares)


def without_attention(folder):
    import safetensors.numpy

    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({n: t * 0 if "o_proj" in n else t for n, t in tensors.items()}, path)
    return folder


@pytest.mark.parametrize(("activation", "threshold"), [("relu", None), ("fatrelu", 0.1), ("fatrelu", 0.4)])
@pytest.mark.parametrize("piece", [32, 512])
def test_as_computed_by_numpy(backend, tmp_path, activation, threshold, piece, monkeypatch):
    monkeypatch.setattr(
        f"{backend.__name__}.generation.sparsity.PIECE", piece
    )  # the text is one piece, or a piece and a rest
    folder = without_attention(tiny_model.write(tmp_path, hidden_act=activation, hidden_act_param=threshold))
    model, _ = backend.load(folder, "float32")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, TOKENS).tolist()
    expected = in_numpy(folder, ids)
    found = backend.activation_sparsity(model, ids)
    assert found.shape == (2,) and 0.3 < expected.min() < expected.max() < 1
    np.testing.assert_allclose(found, expected, atol=1.5 / (TOKENS * 48))  # a gate at the threshold may be rounded


def test_both_backends_count_the_same_and_leave_the_model_as_it_was(reference):
    jax, mlx = (importlib.import_module(f"minicpm_{name}") for name in ("jax", "mlx"))
    models = [package.load(reference("s_1b"), "float32")[0] for package in (jax, mlx)]
    data = np.load(reference("s_1b") / "reference.npz")
    ids = data["input_ids"][:1]
    before = [np.asarray(model(ids)) for model in models]
    shares = [package.activation_sparsity(model, ids[0]) for package, model in zip((jax, mlx), models, strict=True)]
    np.testing.assert_allclose(shares[0], shares[1], atol=2 / (ids.size * 160))
    for model, logits in zip(models, before, strict=True):
        np.testing.assert_array_equal(np.asarray(model(ids)), logits)


def test_attention_is_not_left_out(backend, reference, monkeypatch):
    """In pieces as in one."""
    model, _ = backend.load(reference("s_1b"), "float32")
    ids = np.random.default_rng(2).integers(3, 300, 80)
    whole = backend.activation_sparsity(model, ids)
    monkeypatch.setattr(f"{backend.__name__}.generation.sparsity.PIECE", 32)
    np.testing.assert_allclose(backend.activation_sparsity(model, ids), whole, atol=2 / (80 * 160))


@pytest.mark.parametrize(("name", "said"), [("dense_2b", "silu is never exactly 0"), ("moe_8x2b", "silu is never")])
def test_models_without_zeros_are_refused(backend, reference, name, said):
    model, _ = backend.load(reference(name), "float32")
    with pytest.raises(InputError, match=said):
        backend.activation_sparsity(model, [1, 2])


def test_ids_of_another_vocabulary_are_refused(backend, reference):
    model, _ = backend.load(reference("s_1b"), "float32")
    with pytest.raises(InputError, match="token id 368 of the prompt is outside"):
        backend.activation_sparsity(model, [1, 368])
    with pytest.raises(InputError, match="at least one token"):
        backend.activation_sparsity(model, [])


def test_as_a_flag(backend, tmp_path):
    command = (f"{backend.__name__}.generate", "--report-sparsity", "--max-tokens", 5)
    folder = tiny_model.write(tmp_path, hidden_act="fatrelu", hidden_act_param=0.2)
    ran = typed(*command, "--model", folder)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^Activation sparsity: [\d.]+% of .* 0; lowest in layer [01] \(.*%\), highest", ran.stderr, re.M)
    shutil.rmtree(tmp_path)
    ran = typed(*command)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("error: silu is never exactly 0")
