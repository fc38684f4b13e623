"""The experts in JAX: which ones a token takes, that no other is read, their gradients, and a mesh of them."""

import dataclasses
import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from minicpm_jax.cpu.form import unstack_layers  # noqa: E402
from minicpm_jax.layers import moe  # noqa: E402
from minicpm_jax.layers.kv_cache import Cache  # noqa: E402
from minicpm_jax.layers.rope import positions_of  # noqa: E402
from minicpm_jax.loading import load_weights  # noqa: E402
from minicpm_jax.model import initialize, scale  # noqa: E402
from minicpm_jax.training.losses import packed_loss  # noqa: E402
from minicpm_jax.training.step import weights_of  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402

# Sizes that nothing else in a program has: its text tells what is as large as a layer's experts, [8, 112, 48].
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=24,
    initializer_range=0.2,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=16,
    num_experts=8,
    num_experts_per_tok=2,
)
LAYER = 3 * 8 * 112 * 48 * 4  # bytes of a layer's experts


@pytest.fixture(scope="module")
def model():
    return initialize(CONFIG, jax.random.key(0))


def routes(model, ids, cache=None):
    """For each layer the router's logits [B T, E], and the weights and experts [B T, C] that follow; ``cache``: the ids
    come after what it holds."""
    return routes_of_layers(model, unstack_layers(model).model.layers, ids, cache)


@jax.jit
def routes_of_layers(model, layers, ids, cache):
    positions = positions_of(model.config, ids.shape)
    if cache is not None:
        positions = positions_of(model.config, ids.shape, start=cache.lengths, length=cache.lengths + ids.shape[1])
    x, found = model.model.embed(ids), []
    for index, layer in enumerate(layers):
        added, _ = layer.self_attn(layer.input_layernorm(x), positions, cache, index)
        y = x + scale(added, model.config.residual_scale)
        logits = layer.mlp.gate(layer.post_attention_layernorm(y).reshape(-1, y.shape[-1]))
        found.append((logits, *moe.route(logits, model.config.num_experts_per_tok)))
        x, cache, _ = layer(x, positions, cache, index)
    return found


def poisoned(model, chosen):
    """The model with NaN in all experts but those ``chosen`` in each layer."""
    copy = jax.tree.map(lambda x: x, model)
    for linear in (
        copy.model.layers.mlp.experts.w1,
        copy.model.layers.mlp.experts.w2,
        copy.model.layers.mlp.experts.w3,
    ):
        kept = np.zeros((model.config.num_hidden_layers, model.config.num_experts, 1, 1), bool)
        for layer, experts in enumerate(chosen):
            kept[layer, np.unique(experts)] = True
        linear.weight[...] = jnp.where(kept, linear.weight[...], jnp.nan)
    return copy


def prefilled(model, ids):
    cache = Cache.empty(model.config, len(ids), 32, jnp.float32)
    return model.decode(jnp.asarray(ids), cache, ids.shape[1])[1]


@jax.jit
def next_logits(model, token, cache):
    return model.head(model.decode(token[:, None], cache, 1)[0])[:, 0]


def experts_of(config, seed=0):
    shapes = {"w1": (112, 48), "w2": (48, 112), "w3": (112, 48)}
    random = np.random.default_rng(seed)
    weights = {name: random.normal(0, 0.1, (config.num_experts, *shape)) for name, shape in shapes.items()}
    return moe.Experts({n: {"weight": jnp.asarray(w, jnp.float32)} for n, w in weights.items()}, config)


def naive(experts, x, weights, chosen):
    """One row after the other, one expert after the other, in float64."""
    w1, w2, w3 = (np.asarray(linear.weight[...], np.float64) for linear in (experts.w1, experts.w2, experts.w3))
    x, weights, chosen = np.asarray(x, np.float64), np.asarray(weights, np.float64), np.asarray(chosen)
    y = np.zeros(x.shape)
    for r, c in np.ndindex(*chosen.shape):
        e, row = chosen[r, c], x[r]
        gate = w1[e] @ row
        y[r] += weights[r, c] * (w2[e] @ (gate / (1 + np.exp(-gate)) * (w3[e] @ row)))
    return y


def choices(rows, config, seed, kind="random"):
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(config.num_experts)[: config.num_experts_per_tok] for _ in range(rows)])
    if kind == "all the same":
        chosen[:] = chosen[0]
    weights = random.uniform(0.1, 1, chosen.shape).astype(np.float32)
    x = random.normal(size=(rows, 48)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(weights), jnp.asarray(chosen, jnp.int32)


def test_routes_are_the_originals(reference):
    folder = reference("moe_8x2b")
    model, data = load_weights(open_checkpoint(folder)), np.load(folder / "reference.npz")
    found = routes(model, data["input_ids"][:1])
    assert len(found) == len(data["router_logits"]) == 3
    for layer, (logits, weights, experts) in enumerate(found):
        np.testing.assert_allclose(logits, data["router_logits"][layer], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(experts, data["router_indices"][layer])
        np.testing.assert_allclose(weights, data["router_weights"][layer], rtol=0, atol=1e-5)


def test_route():
    logits = jnp.array([[1.0, 3.0, -2.0, 2.5], [0.0, 0.0, 0.0, 0.0]], jnp.float32)
    weights, experts = moe.route(logits, 2)
    np.testing.assert_allclose(weights[0], np.exp([3.0, 2.5]) / np.exp([3.0, 2.5]).sum(), rtol=1e-6)
    assert experts.tolist() == [[1, 3], [0, 1]]  # the first ones where all are equal
    rounded, _ = moe.route(logits.astype(jnp.bfloat16), 2)  # these logits are bfloat16 numbers
    assert rounded.dtype == jnp.bfloat16
    assert jnp.array_equal(rounded, weights.astype(jnp.bfloat16))


def test_bfloat16_is_as_near_as_the_original(reference):
    folder = reference("moe_8x2b")
    data, model = np.load(folder / "reference.npz"), load_weights(open_checkpoint(folder), "bfloat16")
    logits = np.asarray(model(data["input_ids"]))
    exact, original = data["logits_bf16cast_f32"], data["logits_bf16cast_bf16"]
    assert np.abs(logits - exact).max() < 1.5 * np.abs(original - exact).max()
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.1 * np.sqrt(np.mean((original - exact) ** 2))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 70, 600])
@pytest.mark.parametrize("experts, chosen", [(8, 2), (5, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "all the same"])
def test_every_form_gives_the_same_sum(rows, experts, chosen, kind):
    config = dataclasses.replace(CONFIG, num_experts=experts, num_experts_per_tok=chosen)
    layer, arguments = experts_of(config), choices(rows, config, rows, kind)
    expected = naive(layer, *arguments)
    np.testing.assert_allclose(jax.jit(moe.Experts.__call__)(layer, *arguments), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(moe.Experts.dense_experts)(layer, *arguments), expected, atol=2e-6)


@pytest.mark.parametrize("rows", [3, 70, 300])
def test_gradients_are_those_of_all_experts_on_all_rows(rows):
    """Blocks have a gradient of their own; `dense_experts` is JAX's."""
    layer, (x, weights, chosen) = experts_of(CONFIG), choices(rows, CONFIG, 1)

    def gradients(form):
        def loss(layer, x, weights):
            return jnp.sum(jnp.sin(form(layer, x, weights, chosen)))

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(layer, x, weights))

    found, expected = gradients(moe.Experts.__call__), gradients(moe.Experts.dense_experts)
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        assert jnp.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * jnp.abs(b).max())


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """All blocks go to two experts; measured: 0.0016 from the exact ones, summed in bfloat16 0.0056."""
    layer, (x, weights, chosen) = experts_of(CONFIG), choices(8000, CONFIG, 1, "all the same")
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layer)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)

    def gradient(layer, dtype):
        def loss(layer):
            return jnp.sum(layer(x.astype(dtype), weights.astype(dtype), chosen).astype(jnp.float32))

        return np.asarray(jax.jit(jax.grad(loss))(layer).w2.weight[...], np.float32)

    exact, rounded = gradient(wide, jnp.float32), gradient(narrow, jnp.bfloat16)
    assert np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2)) < 0.003


@pytest.mark.parametrize("remat", [False, True])
def test_training_moves_every_parameter(model, remat):
    windows = jax.random.randint(jax.random.key(1), (4, 40), 2, 64).at[:, 0].set(1)
    loss, gradients = jax.jit(jax.value_and_grad(lambda m: packed_loss(m, windows, 1, remat)))(model)
    assert jnp.isfinite(loss)
    for name, gradient in weights_of(gradients).items():
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0, name


@pytest.mark.parametrize("rows", [1, 4])
def test_decode_touches_no_other_expert(model, rows):
    ids = np.arange(rows * 9).reshape(rows, 9) * 7 % 64
    token, cache = jnp.arange(rows) * 5 + 3, prefilled(model, ids)
    taken = [np.unique(experts) for _, _, experts in routes(model, token[:, None], cache)]
    assert all(2 <= len(experts) < 8 for experts in taken)
    expected = next_logits(model, token, cache)
    np.testing.assert_array_equal(next_logits(poisoned(model, taken), token, cache), expected)
    for layer in range(3):  # each of them is needed
        fewer = [experts[layer == i :] for i, experts in enumerate(taken)]
        assert np.isnan(next_logits(poisoned(model, fewer), token, cache)).any()


def as_large_as_all_experts(program):
    """Instructions whose result is all the experts of a layer (a matrix of each), inside of fusions too."""
    shape = r"\[(1,)?8,(112,48|48,112)\]"
    return re.findall(
        rf"^\s*(?:ROOT )?%\S+ = \w+{shape}\S* (?!parameter|get-tuple-element)\w.*$", program, re.MULTILINE
    )


@pytest.mark.parametrize("listed", [False, True])
def test_decode_reads_two_of_eight_experts(model, listed):
    """In the compiled program: no instruction makes, slices or copies all experts of a layer, and the temporaries have
    no room for them. A prompt of many tokens does."""
    if listed:
        model = unstack_layers(model)

    def compiled(width):
        cache = Cache.empty(CONFIG, 1, 32, jnp.float32)
        ids = jnp.zeros((1, width), jnp.int32)
        return jax.jit(lambda m, i, c: m.decode(i, c, width), donate_argnums=2).lower(model, ids, cache).compile()

    decode, prompt = compiled(1), compiled(24)
    assert as_large_as_all_experts(decode.as_text()) == []
    assert decode.memory_analysis().temp_size_in_bytes < LAYER / 2
    dots = [re.search(r" dot\(", line) for line in decode.as_text().splitlines()]
    assert any(dots)
    if not listed:
        assert as_large_as_all_experts(prompt.as_text())
    cost = {name: program.cost_analysis()["flops"] for name, program in (("decode", decode), ("prompt", prompt))}
    layers = 3 if listed else 1  # the body of a loop counts once
    dense = layers * 2 * 4 * 48 * 48  # the attention's projections
    assert cost["decode"] < layers * 2 * 2 * 3 * 112 * 48 + 2 * dense + 2e4 < layers * 2 * 8 * 3 * 112 * 48
