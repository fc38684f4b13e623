"""Optimizers in both backends: which weights Muon orthogonalises, and on which weight decay goes. No model is run."""

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

from minicpm_data.training.options import is_decayed
from minicpm_jax.training import optimizers
from minicpm_mlx.training import optimizers as mlx_optimizers
from weights_io.config import FAMILIES, ModelConfig
from weights_io.parameters import parameters

L, OUT, IN = 2, 6, 4
CONFIG = ModelConfig(num_hidden_layers=L)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Stacked, as JAX has them."""
    generator = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (10, IN),
        "model.layers.self_attn.q_proj.weight": (L, OUT, IN),
        "model.layers.input_layernorm.weight": (L, IN),
    }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def layers_of(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under MLX's names, one for each layer."""
    found = {}
    for name, w in stacked.items():
        if ".layers." in name:
            found |= {name.replace("layers.", f"layers.{i}."): w[i] for i in range(L)}
        else:
            found[name] = w
    return found


def jax_step(weights: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    optimizer = optimizers.optimizer("muon", 0.0, 1e9, CONFIG)
    here = {name: jnp.asarray(w) for name, w in weights.items()}
    updates, _ = optimizer.update({name: jnp.asarray(g) for name, g in gradients.items()}, optimizer.init(here), here)
    return layers_of({name: np.asarray(update) for name, update in updates.items()})


def mlx_step(weights: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    optimizer = mlx_optimizers.OPTIMIZERS["muon"]()
    before = {name: mx.array(w) for name, w in layers_of(weights).items()}
    optimizer.init(before)
    optimizer.learning_rate = 1.0
    after = optimizer.apply_gradients({name: mx.array(g) for name, g in layers_of(gradients).items()}, before)
    return {name: np.array(after[name]) - np.array(before[name]) for name in before}


@pytest.mark.parametrize("step", [jax_step, mlx_step])
def test_muon_turns_matrices_of_the_layers_and_adam_the_rest(step, weights):
    gradients = {name: np.random.default_rng(1).normal(size=w.shape).astype(np.float32) for name, w in weights.items()}
    for name, update in step(weights, gradients).items():
        gradient = layers_of(gradients)[name]
        assert np.sum(update * gradient) < 0
        if name.endswith("q_proj.weight"):
            singular = np.linalg.svd(update, compute_uv=False) / np.sqrt(OUT / IN)
            # Five Newton-Schulz steps bring every singular value near 1 (0.7 to 1.2).
            assert singular.min() > 0.6 and singular.max() < 1.25, singular
        else:
            np.testing.assert_allclose(update, -np.sign(gradient), atol=1e-3)  # Adam's first step


def test_muon_decays_all_but_norms(weights):
    shares = {"optimiser": 0.1, "none": 0.0}
    decay = {name: optimizers.optimizer("muon", share, 1e9, CONFIG) for name, share in shares.items()}
    here = {name: jnp.asarray(w) for name, w in weights.items()}
    updates = {name: o.update(here, o.init(here), here)[0] for name, o in decay.items()}
    for name, w in here.items():
        share = 0.0 if "norm" in name else 0.1
        np.testing.assert_allclose(updates["optimiser"][name] - updates["none"][name], -share * w, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"tie_word_embeddings": False}, {"num_experts": 4, "num_experts_per_tok": 2}])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_weight_decay_goes_on_all_but_norms_and_magnitudes(model_type, kind):
    """Names of both backends, of every kind of model. Before the table was asked, a name with "norm" in it was
    spared."""
    config = ModelConfig(model_type=model_type, num_hidden_layers=L, **kind)
    names = {name for p in parameters(config) for name in (p.name, *p.mlx_names(config))}
    assert {name for name in names if is_decayed(name, config)} == {name for name in names if "norm" not in name}
    for layer in ("model.layers.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"):
        assert [is_decayed(f"{layer}.{part}", config) for part in ("a", "b", "magnitude")] == [True, True, False]
