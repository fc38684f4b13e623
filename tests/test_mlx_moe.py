"""The experts in MLX: which ones a token takes, that no other is read, other dtypes on a CPU, and `mlx_lm`."""

import dataclasses

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model, save_config, save_model  # noqa: E402

from minicpm_mlx import load, stream_generate  # noqa: E402
from minicpm_mlx.layers import moe  # noqa: E402
from minicpm_mlx.layers.rope import positions_of  # noqa: E402
from minicpm_mlx.loading import load_weights  # noqa: E402
from minicpm_mlx.model import Model, ModelArgs, initialize, scale  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402

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


@pytest.fixture(scope="module")
def model():
    return initialize(CONFIG, mx.random.key(0))


def routes(model, ids, caches=None):
    """For each layer the router's logits [B T, E], and the weights and experts [B T, C] that follow; ``caches``: the
    ids come after what they hold."""
    ids = mx.array(ids)
    caches = caches or [None] * len(model.layers)
    positions = positions_of(model.config, ids, cache=caches[0])
    x, found = model.model.embed(ids), []
    for layer, cache in zip(model.layers, caches, strict=True):
        added = layer.self_attn(layer.input_layernorm(x), positions, cache)
        y = x + scale(added, model.config.residual_scale)
        normed = layer.post_attention_layernorm(y)
        logits = layer.mlp.gate(normed.reshape(-1, y.shape[-1]))
        found.append((logits, *moe.route(logits, model.config.num_experts_per_tok)))
        x = y + scale(layer.mlp(normed)[0], model.config.residual_scale)
    return [[np.asarray(array.astype(mx.float32)) for array in layer] for layer in found]


def poisoned(model, chosen):
    """The model with NaN in all experts but those ``chosen`` in each layer."""
    copy = Model(model.config)
    copy.load_weights(tree_flatten(model.parameters()))
    for layer, experts in zip(copy.layers, chosen, strict=True):
        lost = mx.array([e not in experts for e in range(model.config.num_experts)])[:, None, None]
        for linear in (layer.mlp.experts.w1, layer.mlp.experts.w2, layer.mlp.experts.w3):
            linear.weight = mx.where(lost, float("nan"), linear.weight).astype(linear.weight.dtype)
    return copy


def prefilled(model, ids):
    cache = make_prompt_cache(model)
    model.decode(mx.array(ids), cache)
    return cache


def experts_of(config, seed=0):
    shapes = {"w1": (112, 48), "w2": (48, 112), "w3": (112, 48)}
    random, experts = np.random.default_rng(seed), moe.Experts(config)
    weights = {name: random.normal(0, 0.1, (config.num_experts, *shape)) for name, shape in shapes.items()}
    experts.load_weights([(f"{name}.weight", mx.array(w.astype(np.float32))) for name, w in weights.items()])
    return experts


def naive(experts, x, weights, chosen):
    """One row after the other, one expert after the other."""
    rows = []
    for r in range(len(x)):
        row = mx.zeros(x.shape[1:])
        for c in range(chosen.shape[1]):
            w1, w2, w3 = (linear.weight[chosen[r, c]] for linear in (experts.w1, experts.w2, experts.w3))
            row = row + weights[r, c] * (w2 @ (nn.silu(w1 @ x[r]) * (w3 @ x[r])))
        rows.append(row)
    return mx.stack(rows)


def choices(rows, config, seed, kind="random"):
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(config.num_experts)[: config.num_experts_per_tok] for _ in range(rows)])
    if kind == "all the same":
        chosen[:] = chosen[0]
    weights = random.uniform(0.1, 1, chosen.shape).astype(np.float32)
    x = random.normal(size=(rows, 48)).astype(np.float32)
    return mx.array(x), mx.array(weights), mx.array(chosen.astype(np.int32))


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
    logits = mx.array([[1.0, 3.0, -2.0, 2.5], [0.0, 0.0, 0.0, 0.0]], mx.float32)
    weights, experts = moe.route(logits, 2)
    np.testing.assert_allclose(np.asarray(weights[0]), np.exp([3.0, 2.5]) / np.exp([3.0, 2.5]).sum(), rtol=1e-6)
    assert experts.tolist() == [[1, 3], [0, 1]]  # the first ones where all are equal
    rounded, _ = moe.route(logits.astype(mx.bfloat16), 2)  # these logits are bfloat16 numbers
    assert rounded.dtype == mx.bfloat16
    assert mx.array_equal(rounded, weights.astype(mx.bfloat16))


def test_bfloat16_is_as_near_as_the_original(reference):
    """On a CPU too, where gather_mm itself takes float32 alone."""
    folder = reference("moe_8x2b")
    data, model = np.load(folder / "reference.npz"), load_weights(open_checkpoint(folder), "bfloat16")
    logits = np.asarray(model(data["input_ids"]))
    exact, original = data["logits_bf16cast_f32"], data["logits_bf16cast_bf16"]
    assert np.abs(logits - exact).max() < 1.5 * np.abs(original - exact).max()
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.1 * np.sqrt(np.mean((original - exact) ** 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_generate(reference, dtype):
    folder = reference("moe_8x2b")
    data, (model, _) = np.load(folder / "reference.npz"), load(folder, dtype)
    prompt, expected = data["prompt_ids"][0].tolist(), data["greedy_ids"][8:].tolist()
    tokens = [r.token for r in stream_generate(model, None, prompt, max_tokens=24)]
    assert len(tokens) == 24
    assert tokens[:4] == expected[:4]  # further on, its margins are within what the dtype rounds


@pytest.mark.parametrize("rows", [1, 4, 5, 70])
@pytest.mark.parametrize("experts, chosen", [(8, 2), (5, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "all the same"])
def test_both_forms_give_the_same_sum(rows, experts, chosen, kind):
    config = dataclasses.replace(CONFIG, num_experts=experts, num_experts_per_tok=chosen)
    layer, arguments = experts_of(config), choices(rows, config, rows, kind)
    expected = np.asarray(naive(layer, *arguments))
    np.testing.assert_allclose(np.asarray(layer(*arguments)), expected, atol=2e-6)
    layer.set_dtype(mx.bfloat16)
    x, weights, indices = arguments
    rounded = layer(x.astype(mx.bfloat16), weights.astype(mx.bfloat16), indices)
    assert rounded.dtype == mx.bfloat16
    np.testing.assert_allclose(np.asarray(rounded.astype(mx.float32)), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [3, 70])
def test_gradients(rows):
    layer, (x, weights, chosen) = experts_of(CONFIG), choices(rows, CONFIG, 1)

    def gradients(function):
        def loss(parameters, x, weights):
            layer.update(parameters)
            return mx.sin(function(layer, x, weights, chosen)).sum()

        return [g for _, g in tree_flatten(mx.grad(loss, argnums=(0, 1, 2))(layer.parameters(), x, weights))]

    found, expected = gradients(moe.Experts.__call__), gradients(naive)
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        scale = mx.abs(b).max().item()
        assert scale > 0
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5 * scale)


def test_training_moves_every_parameter(model):
    ids = mx.random.randint(2, 64, (4, 40), key=mx.random.key(1))

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    for name, gradient in tree_flatten(nn.value_and_grad(model, loss)(model)[1]):
        assert mx.isfinite(gradient).all() and mx.abs(gradient).max() > 0, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_decode_touches_no_other_expert(rows, dtype):
    model = initialize(CONFIG, mx.random.key(0), dtype)
    ids = np.arange(rows * 9).reshape(rows, 9) * 7 % 64
    token = mx.arange(rows)[:, None] * 5 + 3
    taken = [np.unique(experts) for _, _, experts in routes(model, token, prefilled(model, ids))]
    assert all(2 <= len(experts) < 8 for experts in taken)

    def next_logits(reader):
        return np.asarray(reader.head(reader.decode(token, prefilled(model, ids))))

    expected = next_logits(model)
    np.testing.assert_array_equal(next_logits(poisoned(model, taken)), expected)
    for layer in range(3):  # each of them is needed
        fewer = [experts[layer == i :] for i, experts in enumerate(taken)]
        assert np.isnan(next_logits(poisoned(model, fewer))).any()


def test_decode_on_a_cpu_casts_the_chosen_experts_alone():
    """A bfloat16 step of one row: the most that is held beyond the weights is less than all experts in float32."""
    config = dataclasses.replace(CONFIG, num_experts=64)
    layer = moe.Experts(config)
    layer.set_dtype(mx.bfloat16)
    mx.eval(layer.parameters())
    x, weights, chosen = choices(1, config, 0)
    mx.eval(x := x.astype(mx.bfloat16), weights := weights.astype(mx.bfloat16), chosen)
    mx.clear_cache()  # a pooled buffer may be twice what is asked for
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x, weights, chosen))
    assert mx.get_peak_memory() - before < 64 * 112 * 48 * 4 / 4  # all experts of one matrix: the whole


def test_mlx_lm_loads_the_released_files_and_its_own(reference, tmp_path):
    folder = reference("moe_8x2b")
    data = np.load(folder / "reference.npz")
    model, raw = load_model(folder, get_model_classes=lambda config: (Model, ModelArgs))
    np.testing.assert_allclose(np.asarray(model(data["input_ids"])), data["logits"], rtol=0, atol=2e-5)
    save_model(tmp_path, model)
    save_config(raw, tmp_path / "config.json")
    again, _ = load_model(tmp_path, get_model_classes=lambda config: (Model, ModelArgs))
    assert mx.array_equal(again(data["input_ids"]), model(data["input_ids"]))


def test_lora_layers_of_mlx_lm():
    model = initialize(CONFIG, mx.random.key(0))
    ids = mx.array([[1, 2, 3, 4]])
    before = model(ids)
    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert "model.layers.0.mlp.experts.w1.lora_a" in trainable and all("lora" in name for name in trainable)
    np.testing.assert_allclose(np.asarray(model(ids)), np.asarray(before), rtol=0, atol=1e-5)
