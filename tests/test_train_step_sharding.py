"""A step of training a dense model is the same over every mesh: all weights, and adapters."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax.training import optimizers

jax = pytest.importorskip("jax")

from minicpm_jax.model import Model, initialize, nested  # noqa: E402
from minicpm_jax.parallel.mesh import batch_sharding, make_mesh  # noqa: E402
from minicpm_jax.parallel.sharding import pad_config, pad_or_trim_params, replicated, shardings  # noqa: E402
from minicpm_jax.training import adapters, step  # noqa: E402
from minicpm_jax.training.losses import Objective  # noqa: E402
from weights_io.adapters import AdapterConfig  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

ADAPTER = AdapterConfig(4, 8.0, targets=("all-linear",))
# Neither 2, 4 nor 8 divides the words, and neither 2 nor 4 the key/value heads, nor 4 the intermediate size.
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=90,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=16,
    initializer_range=0.1,
)

LATENT = dataclasses.replace(
    CONFIG,
    model_type="minicpm3",
    num_key_value_heads=6,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
)


def batch():
    """Rows of one and of two documents, one with padding."""
    ids = np.random.default_rng(0).integers(1, 97, (1, 8, 40)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[:, :3, 20:] = 2
    segments[:, 5, 30:] = 0
    return {"ids": ids, "labels": np.where(segments > 0, ids, -100), "segments": segments}


def loaded(weights, config, mesh):
    """As a model that is not trained is: filled up, and nothing of it turned for its gradient."""
    if mesh is not None:
        weights = pad_or_trim_params(weights, pad_config(config, mesh), mesh)
    return Model(nested(weights), config, mesh=mesh)


def stepped(text, kind, config=CONFIG):
    """Weights (or adapters), loss and gradient norm after a step of gradient descent. A second one is not compiled."""
    mesh, optimizer = make_mesh(text), optimizers.optimizer("sgd", 0.0, 1e9, config)
    weights = jax.tree.map(np.array, step.weights_of(initialize(config, jax.random.key(0))))
    weights = jax.device_put(weights, None if mesh is None else shardings(config, mesh))
    given = batch() if mesh is None else jax.device_put(batch(), batch_sharding(mesh, 8))
    base, trained = None, step.FullFinetune(config, "float32", mesh)
    if kind == "lora":
        base, trained = loaded(weights, config, mesh), step.LoraFinetune(2.0, 0.1)
        weights = adapters.init_lora_params(base, ADAPTER, range(2), jax.random.key(1))
        weights = jax.tree.map(lambda x: x + 0.01, weights)
        weights = weights if mesh is None else replicated(weights, mesh)
    fixed = {"trained": trained, "objective": Objective(remat=True), "optimizer": optimizer}
    before, compiled = step.init_train_state(weights, optimizer, mesh), step.train_step._cache_size()
    after, figures = step.train_step(before, base, given, np.float32(0.01), jax.random.key(0), **fixed)
    after = step.restore_sharding(after, before)
    weights = jax.tree.map(np.array, after[0])
    step.train_step(after, base, given, np.float32(0.01), jax.random.key(0), **fixed)
    assert step.train_step._cache_size() == compiled + 1
    return weights, float(figures["loss"]), float(figures["gradient_norm"])


@pytest.fixture(scope="module", params=["finetune", "lora"])
def on_one(request):
    return request.param, stepped(None, request.param)


@pytest.mark.parametrize("text", ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "fsdp=8", "tensor=8"])
def test_a_step_does_not_depend_on_the_mesh(text, on_one):
    """Measured: weights within 1.5e-8, loss within 1e-6."""
    kind, alone = on_one
    same(stepped(text, kind), alone)


def test_a_step_of_latent_attention_does_not_depend_on_the_mesh():
    """All weights, of six heads over four devices, which all have the latents."""
    same(stepped("fsdp=2,tensor=4", "finetune", LATENT), stepped(None, "finetune", LATENT))


def same(found, expected):
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)
