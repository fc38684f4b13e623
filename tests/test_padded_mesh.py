"""A model whose heads and words no axis of the mesh divides: filled up inside, and seen by nobody."""

import functools
import re

import numpy as np
import pytest
import tiny_model

from minicpm_jax.generation import teacher_forcing

jax = pytest.importorskip("jax")

from minicpm_data.cli.generate import run_generate  # noqa: E402
from minicpm_jax import activation_sparsity, load, stream_generate  # noqa: E402
from minicpm_jax.backend import backend  # noqa: E402
from minicpm_jax.generate import Options  # noqa: E402
from minicpm_jax.parallel.activations import splits_tokens  # noqa: E402
from minicpm_jax.parallel.mesh import make_mesh  # noqa: E402
from minicpm_jax.parallel.sharding import (  # noqa: E402
    fraction_per_device,
    pad_config,
    pad_config_over,
    pad_or_trim,
    warn_idle_mesh_axes,
)
from minicpm_jax.quantization.model import quantize_model  # noqa: E402
from minicpm_jax.training import adapters  # noqa: E402
from minicpm_jax.training.losses import packed_loss  # noqa: E402
from minicpm_jax.training.step import weights_of  # noqa: E402
from weights_io.adapters import AdapterConfig  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402
from weights_io.memory import weight_bytes  # noqa: E402

WORDS = 483
IDS = np.random.default_rng(0).integers(3, WORDS, (2, 9)).astype(np.int32)
SHAPE = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("odd"), vocab_size=WORDS, **SHAPE)


@pytest.fixture(scope="module")
def alone(folder):
    return load(folder, "float32")[0]


def generated(model, **options):
    return [response.token for response in stream_generate(model, None, IDS[0].tolist(), max_tokens=12, **options)]


def on(folder, text, devices=8):
    return load(folder, "float32", mesh=make_mesh(text, jax.devices()[:devices]))[0]


@pytest.mark.parametrize(
    ("text", "devices", "heads"),
    [("tensor=4", 4, 4), ("tensor=8", 8, 8), ("fsdp=2,tensor=4", 8, 4), ("data=2,tensor=4", 8, 4)],
)
def test_logits_tokens_and_weights_are_those_of_one_device(folder, alone, text, devices, heads):
    """Logits within 2e-6, as measured; each device has its own heads and words, with zeros behind the last."""
    model = on(folder, text, devices)
    k_proj, table = model.model.layers.self_attn.k_proj.weight[...], model.model.embed_tokens.weight[...]
    parts = heads if heads == 8 else 4
    assert k_proj.shape[1] == 16 * heads and k_proj.addressable_shards[0].data.shape[1] == 16 * heads // parts
    assert table.shape[0] == WORDS + 1 + 4 * (parts == 8) and not table[WORDS:].any() and not k_proj[:, 48:].any()
    logits = model(IDS)
    assert logits.shape == (2, 9, WORDS)
    np.testing.assert_allclose(logits, alone(IDS), rtol=0, atol=1e-5)
    assert generated(model) == generated(alone)
    for name, weight in weights_of(model).items():
        np.testing.assert_array_equal(weight, weights_of(alone)[name], err_msg=name)


@pytest.mark.parametrize(("width", "split"), [(8, True), (9, False)])
def test_gradients_are_those_of_one_device_and_zero_where_there_is_nothing(folder, alone, width, split):
    """So that nothing grows there, whoever takes a step; of tokens that tensor splits between the blocks, or cannot."""
    model, ids = on(folder, "fsdp=2,tensor=4"), IDS[:, :width]
    assert splits_tokens(ids, model.mesh) == split
    gradients_of = jax.jit(jax.grad(packed_loss), static_argnums=2)
    found, expected = gradients_of(model, ids, 1), weights_of(gradients_of(alone, ids, 1))
    for name, gradient in weights_of(found).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-4 * scale, err_msg=name)
        whole = np.asarray(functools.reduce(getattr, name.split("."), found)[...])
        np.testing.assert_array_equal(whole, pad_or_trim(np.asarray(gradient), whole.shape), err_msg=name)


def test_an_adapter_with_magnitudes_is_that_of_one_device(folder, alone):
    """Rows that are not there have a norm of zero, by which nothing is divided."""
    config = AdapterConfig(4, 8.0, targets=("o_proj", "k_proj"), dora=True)
    run = jax.jit(lambda model, weights: adapters.attach(model, weights, config.scale)(IDS))
    logits = []
    for model in (alone, on(folder, "tensor=4", 4)):
        weights = adapters.init_lora_params(model, config, range(2), jax.random.key(0))
        weights = jax.tree.map(lambda x: np.asarray(x) + 0.01, weights)
        assert {name: matrices["magnitude"].shape for name, matrices in weights.items()} == {
            "model.layers.self_attn.k_proj.weight": (2, 48),
            "model.layers.self_attn.o_proj.weight": (2, 96),
        }
        logits.append(run(model, weights))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5)


def test_what_is_drawn_kept_in_8_bits_or_quantised_is_that_of_one_device(folder, alone):
    """Rows of 96 are quantised in groups of 32; filled up to 128 they would have groups of 64. Loaded in few bits each
    device has 64 of the neurons: 32 there are, and whole groups."""
    drawn = {"temperature": 1.0, "seed": 3, "kv_bits": 8}
    assert generated(on(folder, "tensor=8"), **drawn) == generated(alone, **drawn)
    mesh = make_mesh("tensor=4", jax.devices()[:4])
    one = quantize_model(load(folder, "float32")[0], 4, True)(IDS)
    packed = load(folder, "float32", quantize=4, mesh=mesh)[0]
    down = packed.model.layers.mlp.down_proj.weight
    assert [x[...].sharding.shard_shape(x.shape)[1] for x in (down.qweight, down.scales)] == [64, 2]
    for model in (packed, quantize_model(on(folder, "tensor=4", 4), 4, True)):
        np.testing.assert_allclose(model(IDS), one, rtol=0, atol=1e-5)


def test_what_follows_through_a_cache_and_neurons_at_zero_are_those_of_one_device(tmp_path):
    """90 neurons are 96 over eight devices, and of six more that are always 0 nobody hears."""
    folder = tiny_model.write(tmp_path, vocab_size=WORDS, **SHAPE | {"intermediate_size": 90}, hidden_act="relu")
    models = load(folder, "float32")[0], on(folder, "tensor=8")
    prompts, tokens = [IDS[0], IDS[1, :5]], IDS[:, :3]
    one, other = (teacher_forcing.continued(model, prompts, tokens) for model in models)
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
    one, other = (activation_sparsity(model, IDS[0].tolist()) for model in models)
    np.testing.assert_allclose(other, one, rtol=0, atol=1.5 / (9 * 90))


def test_each_device_has_what_is_said_before_anything_is_loaded(folder):
    """Of a model all parts are alike; of masters and moments, which nobody fills up, some are whole everywhere."""
    model = on(folder, "fsdp=2,tensor=4")
    mesh, config = model.mesh, model.config
    for tree, shape in ((model, pad_config(config, mesh)), (weights_of(model), config)):
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        assert round(weight_bytes(shape, "float32") * fraction_per_device(shape, mesh)) == held


def test_the_shapes_of_the_2b():
    """36 heads of 64 are 9 on each of four devices: four and a half registers, so 10. Over two nothing is filled up.
    Neurons of few bits fill registers, too."""
    heads = {"num_attention_heads": 36, "num_key_value_heads": 36, "head_dim": 64}
    config = ModelConfig(vocab_size=122753, intermediate_size=5760, **heads)
    shapes = {parts: pad_config_over(config, parts) for parts in (1, 2, 4, 8)}
    assert [shapes[parts].num_key_value_heads for parts in shapes] == [36, 36, 40, 48]
    assert [shapes[parts].vocab_size for parts in shapes] == [122753, 122754, 122756, 122760]
    assert pad_config_over(config, 4, lanes=1).num_key_value_heads == 36
    assert pad_config_over(config, 8).intermediate_size == 5760 and pad_config_over(config, 1, packed=True) == config
    neurons = [pad_config_over(config, parts, packed=True).intermediate_size // parts for parts in (2, 4, 8)]
    assert neurons == [2944, 1536, 768]


@pytest.mark.parametrize(
    ("text", "experts", "rows", "said"),
    [
        ("data=8", 0, 3, "3 rows together cannot be split over data=8, .* a multiple of 8 rows would be split\n"),
        ("data=8", 0, 1, "1 row cannot be split over data=8, .*\n"),
        ("data=2,fsdp=2,tensor=2", 0, 3, "3 rows together cannot be split over data=2, .* a multiple of 4 .*\n"),
        ("data=2,fsdp=2,tensor=2", 0, 6, ""),
        ("data=2,fsdp=2,tensor=2", 0, 4, ""),
        ("fsdp=8", 0, 1, ""),
        ("fsdp=8", 0, 3, ""),
        ("tensor=4,expert=2", 0, 1, "expert=2 splits none of this model's weights, .*\n"),
        ("tensor=4,expert=2", 8, 1, ""),
        ("data=1,tensor=8", 0, 3, ""),
    ],
)
def test_axes_without_a_use_are_named(text, experts, rows, said, capsys):
    warn_idle_mesh_axes(ModelConfig(num_experts=experts, num_experts_per_tok=experts // 4), make_mesh(text), rows)
    assert re.fullmatch(said and f"note: {said}", capsys.readouterr().err)


def test_more_devices_than_key_value_heads_are_named(capsys):
    warn_idle_mesh_axes(ModelConfig(num_key_value_heads=2), make_mesh("tensor=8"), 1)
    assert "tensor=8 splits 2 key/value heads, so 6 of 8 devices attend to padding" in capsys.readouterr().err
    warn_idle_mesh_axes(ModelConfig(num_key_value_heads=2), make_mesh("fsdp=4,tensor=2"), 1)
    assert not capsys.readouterr().err


def test_generating_says_which_axes_have_no_use(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prog", "--mesh", "data=8", "--max-tokens", "1", "--verbose", "False"])
    run_generate(backend, "prog", Options)
    assert "note: 1 row cannot be split over data=8, " in capsys.readouterr().err
