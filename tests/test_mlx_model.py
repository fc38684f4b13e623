"""The MLX model against the original PyTorch code's numbers, and under what `mlx_lm` does with a model."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from reference_run import Reference

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import cache as caches  # noqa: E402
from mlx_lm.models.switch_layers import QuantizedSwitchLinear  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model, quantize_model, save_config, save_model  # noqa: E402

from minicpm_mlx.layers.rope import apply_rope, positions_of  # noqa: E402
from minicpm_mlx.loading import load, load_weights  # noqa: E402
from minicpm_mlx.model import Model, ModelArgs, abstract, gated_act, initialize, scale  # noqa: E402
from minicpm_mlx.training.losses import mean_loss  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402
from weights_io.errors import InputError  # noqa: E402
from weights_io.parameters import parameters  # noqa: E402

FOLDERS = ["dense_1b", "dense_2b", "dense_bf16", "dense_eps", "dense_untied", "llama_format", "long_128k"]
FOLDERS += ["long_linear", "bin_sharded", "moe_8x2b", "s_1b"]
FOLDERS += ["minicpm3", "minicpm3_scaled", "minicpm3_untied"]
FOLDERS += ["minicpm4_05b", "minicpm4_8b", "minicpm4_scaled", "minicpm4_sparse", "minicpm5"]
TOLERANCE = 2e-5  # measured: at most 4.2e-6; of minicpm3_scaled `Reference.tolerance`
# A head dimension of 32, the smallest that a quantised cache takes.
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    initializer_range=0.2,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=16,
)


@pytest.fixture(scope="module", params=FOLDERS)
def case(request):
    return Reference(request.getfixturevalue("reference")(request.param), load_weights)


@pytest.fixture(scope="module")
def dense(reference):
    return Reference(reference("dense_2b"), load_weights)


@pytest.fixture(scope="module", params=["long_128k", "minicpm4_8b"])
def long(reference, request):
    """Dynamic NTK and LongRoPE: beyond 32 tokens RoPE rotates otherwise."""
    return Reference(reference(request.param), load_weights)


def close(actual, expected, tolerance=TOLERANCE, relative=0):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=relative, atol=tolerance)


def greedy(model, prompt, steps, cache=None):
    """[B, steps] ids that the model continues with, through a cache."""
    cache = cache or caches.make_prompt_cache(model)
    ids, tokens = mx.array(prompt), []
    for _ in range(steps):
        ids = mx.argmax(model(ids, cache=cache)[:, -1:], axis=-1)
        tokens.append(ids)
    return np.asarray(mx.concatenate(tokens, axis=1))


def left_padded(rows):
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    return np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)]), padding


def test_logits(case):
    logits = case.model(case["input_ids"])
    assert logits.dtype == mx.float32
    close(logits, case["logits"], case.tolerance)
    for length in case.lengths("input_ids_T"):
        close(case.model(case[f"input_ids_T{length}"]), case[f"logits_T{length}"], case.tolerance)


@pytest.mark.parametrize("name", ["bin", "sharded"])
def test_other_files_hold_the_same_model(dense, reference, name):
    """Whose reference is that of dense_2b, byte for byte; so is what follows from its weights."""
    other = Reference(reference(name), load_weights)
    assert (other.folder / "reference.npz").read_bytes() == (dense.folder / "reference.npz").read_bytes()
    mine, theirs = ([array for _, array in tree_flatten(case.model.parameters())] for case in (dense, other))
    assert len(mine) == len(theirs) and all(map(mx.array_equal, mine, theirs))
    assert other.model.config == dense.model.config


def test_logits_of_a_quantised_gguf(reference):
    known = np.load(reference("gguf") / "reference.npz")
    model = load_weights(open_checkpoint(reference("gguf/model-q4_0.gguf")), "float32")
    close(model(known["input_ids"]), known["logits.q4_0"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(case, side):
    mask = case[f"{side}_attention_mask"]
    logits = np.asarray(case.model(case[f"{side}_input_ids"], mask))
    close(logits[mask == 1], case[f"{side}_logits"][mask == 1], case.tolerance)
    assert np.isfinite(logits).all()


def test_hidden_states(case):
    ids = mx.array(case["input_ids"][:1])
    positions = positions_of(case.model.config, ids)
    states = [case.model.model.embed(ids)]
    for layer in case.model.model.layers:
        states.append(layer(states[-1], positions)[0])
    close(mx.concatenate(states), case["hidden_states"], 3e-4, 2e-6)  # numbers of up to 300
    close(case.model.model.norm(states[-1])[0], case["final_norm"], 1e-4)
    close(case.model.hidden_states(ids, positions)[0], case["final_norm"], 1e-4)


def test_loss(case):
    close(mean_loss(case.model, case["input_ids"], case["labels"]), case["loss"])
    if "left_loss_f32" in case.data or "loss_f32" not in case.data:
        for side in ("left", "right"):
            ids, labels, mask = (case[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask"))
            close(mean_loss(case.model, ids, labels, mask), case[f"{side}_loss"])


def test_greedy_through_a_cache(case):
    for ending in ["", *(f"_P{length}" for length in case.lengths("prompt_ids_P"))]:
        prompt = case[f"prompt_ids{ending}"]
        expected = case[f"greedy_ids{ending}"][prompt.shape[1] :]
        assert greedy(case.model, prompt, len(expected))[0].tolist() == expected.tolist()


def test_greedy_batch_with_left_padding(case):
    padding = (case["batch_attention_mask"] == 0).sum(axis=1).tolist()
    prompt, expected = case["batch_prompt_ids"], case["batch_greedy_ids"][:, case["batch_prompt_ids"].shape[1] :]
    cache = [caches.BatchKVCache(padding) for _ in case.model.layers]
    assert greedy(case.model, prompt, expected.shape[1], cache).tolist() == expected.tolist()


def test_cached_keys_keep_their_rotation(long):
    """A prompt in two pieces is not one forward pass, in the original either."""
    ids, split = mx.array(long["input_ids_T80"]), int(long["chunk_split"])
    cache = caches.make_prompt_cache(long.model)
    logits = [long.model(ids[:, :split], cache=cache), long.model(ids[:, split:], cache=cache)]
    close(mx.concatenate(logits, axis=1), long["chunk_logits"])


def test_rope_is_scaled_by_the_row_in_a_batch(long):
    prompts = [long["prompt_ids_P20"][0], long["prompt_ids_P40"][0]]
    ids, padding = left_padded(prompts)
    tokens = greedy(long.model, ids, 24, [caches.BatchKVCache(padding) for _ in long.model.layers])
    assert tokens[0].tolist() == long["greedy_ids_P20"][20:].tolist()
    assert tokens[1].tolist() == long["greedy_ids_P40"][40:].tolist()


def test_decode_is_the_cached_call_before_the_head(dense):
    ids = mx.array(dense["input_ids"])
    cache = caches.make_prompt_cache(dense.model)
    x = mx.concatenate([dense.model.decode(ids[:, :5], cache), dense.model.decode(ids[:, 5:], cache)], axis=1)
    close(dense.model.head(x), dense["logits"])


def test_input_embeddings_are_not_scaled(dense):
    ids = mx.array(dense["input_ids"])
    close(dense.model(ids, input_embeddings=dense.model.model.embed(ids)), dense["logits"])
    plain = dense.model(ids, input_embeddings=dense.model.model.embed_tokens(ids))
    assert np.abs(np.asarray(plain) - dense["logits"]).max() > 1


def test_documents_packed_in_a_row_do_not_see_each_other(dense):
    ids = mx.array(dense["input_ids"][:1])
    segments = mx.array([[0] * 5 + [1] * 7])
    logits = dense.model.head(dense.model.hidden_states(ids, positions_of(dense.model.config, ids, segments=segments)))
    close(logits[:, :5], np.asarray(dense.model(ids[:, :5])))
    close(logits[:, 5:], np.asarray(dense.model(ids[:, 5:])))


def test_a_packed_document_has_the_rope_of_its_own_length(long):
    """33 and 80 tokens, more than max_position_embeddings (32), in one row with 16."""
    ids = mx.array(np.concatenate([long[f"input_ids_T{n}"] for n in (33, 80, 16)] + [np.zeros((1, 7), int)], axis=1))
    segments = mx.array([[1] * 33 + [2] * 80 + [3] * 16 + [0] * 7])
    positions = positions_of(long.model.config, ids, segments=segments)
    logits = long.model.head(long.model.hidden_states(ids, positions))
    for n, start in ((33, 0), (80, 33), (16, 113)):
        close(logits[:, start : start + n], long[f"logits_T{n}"])


def test_mlx_lm_generates(dense):
    tokens = [token for token, _ in generate_step(mx.array(dense["prompt_ids"][0]), dense.model, max_tokens=24)]
    assert tokens == dense["greedy_ids"][8:].tolist()


def test_rotating_cache_equals_the_plain_one_until_it_turns(dense):
    prompt = mx.array(dense["prompt_ids"][0])
    tokens = [token for token, _ in generate_step(prompt, dense.model, max_tokens=40, max_kv_size=16)]
    assert len(tokens) == 40
    assert tokens[:8] == dense["greedy_ids"][8:16].tolist()
    assert tokens[:24] != dense["greedy_ids"][8:].tolist()  # it forgets the first tokens


def test_prompt_cache_survives_its_file(dense, tmp_path):
    ids = mx.array(dense["input_ids"][:1])
    cache = caches.make_prompt_cache(dense.model)
    dense.model(ids[:, :9], cache=cache)
    caches.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    restored = caches.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    close(dense.model(ids[:, 9:], cache=restored), dense["logits"][:1, 9:])


def test_quantised_cache():
    model = initialize(SMALL, mx.random.key(0))
    ids = mx.random.randint(0, 64, (1, 20), key=mx.random.key(1))
    cache = [caches.QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
    logits = mx.concatenate(
        [model(ids[:, :9], cache=cache), model(ids[:, 9:10], cache=cache), model(ids[:, 10:], cache=cache)], axis=1
    )
    exact = model(ids)
    difference = mx.abs(logits - exact).max().item()
    assert 0 < difference < 0.05 * mx.std(exact).item()


def test_a_mask_and_a_cache_exclude_each_other(dense):
    with pytest.raises(InputError, match="BatchKVCache"):
        dense.model([[1, 2]], [[0, 1]], cache=caches.make_prompt_cache(dense.model))


def test_bfloat16_is_as_near_as_the_original(reference):
    folder = reference("dense_bf16")
    data, model = np.load(folder / "reference.npz"), load_weights(open_checkpoint(folder))
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}
    logits = np.asarray(model(data["input_ids"]))
    exact, original = data["logits_f32"], data["logits"]
    assert np.abs(logits - exact).max() < 1.5 * np.abs(original - exact).max()
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.1 * np.sqrt(np.mean((original - exact) ** 2))


def test_norm_rounds_before_the_weight():
    """Bit for bit in bfloat16, as the original."""
    x = mx.random.normal((16, 96), mx.bfloat16, scale=3, key=mx.random.key(0))
    weight = (1 + mx.random.normal((96,), key=mx.random.key(1))).astype(mx.bfloat16)
    norm = nn.RMSNorm(96, 1e-5)
    norm.weight = weight
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    assert mx.array_equal(norm(x), normed.astype(mx.bfloat16) * weight)
    assert not mx.array_equal(norm(x), (normed * weight.astype(mx.float32)).astype(mx.bfloat16))


def test_rotation_and_scales_round_once(dense):
    x = mx.random.normal((1, 2, 300, 16), mx.bfloat16, key=mx.random.key(0))
    config = dataclasses.replace(dense.model.config, head_dim=16)
    positions = positions_of(config, mx.zeros((1, 300)))
    assert mx.array_equal(apply_rope(x, positions), apply_rope(x.astype(mx.float32), positions).astype(mx.bfloat16))
    assert mx.array_equal(scale(x, 0.221359), (x.astype(mx.float32) * 0.221359).astype(mx.bfloat16))
    assert not mx.array_equal(scale(x, 0.221359), x * 0.221359)  # MLX rounds the factor first


@pytest.mark.parametrize("function", [scale, gated_act])
def test_compiled_elementwise_chains_give_the_same_bits(function):
    """On a GPU they run compiled."""
    x = mx.random.normal((3, 5), mx.bfloat16, key=mx.random.key(0))
    second = 0.221359 if function is scale else x + 1
    compiled = mx.compile(function, shapeless=True)
    for rows in (x, x[:2]):
        other = second if function is scale else second[: len(rows)]
        assert mx.array_equal(compiled(rows, other), function(rows, other))


def test_recomputed_layers_give_the_same_gradients(dense):
    ids = mx.array(dense["input_ids"])

    def loss(model, remat):
        x, *_ = model.model(model.model.embed(ids), positions_of(model.config, ids), remat=remat)
        logits = model.head(model.model.norm(x))
        return nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:]).mean()

    plain, recomputed = (tree_flatten(nn.value_and_grad(dense.model, loss)(dense.model, r)[1]) for r in (False, True))
    assert len(plain) == len(dense.model.layers) * 9 + 2  # the head is the embedding
    for (_, a), (_, b) in zip(plain, recomputed, strict=True):
        assert mx.array_equal(a, b) and mx.abs(a).max() > 0


@pytest.mark.parametrize("tied, experts", [(True, 0), (False, 0), (True, 4)])
def test_quantised_weights_pass_through_mlx_lm(tmp_path, tied, experts):
    chosen = {"num_experts": experts, "num_experts_per_tok": experts // 2}
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, **chosen)
    model = initialize(config, mx.random.key(0))
    ids = [[1, 2, 3, 4]]
    exact = model(ids)
    model, raw = quantize_model(model, config.to_dict(), group_size=32, bits=8)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert not experts or isinstance(model.layers[0].mlp.experts.w1, QuantizedSwitchLinear)
    save_model(tmp_path, model)
    save_config(raw, tmp_path / "config.json")
    again, _ = load_model(tmp_path, get_model_classes=lambda config: (Model, ModelArgs))
    assert mx.array_equal(again(ids), model(ids))
    assert 0 < mx.abs(again(ids) - exact).max().item() < 0.05 * mx.std(exact).item()


def test_lora_layers_of_mlx_lm(reference):
    case = Reference(reference("dense_2b"), load_weights)
    case.model.freeze()
    linear_to_lora_layers(case.model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    trainable = dict(tree_flatten(case.model.trainable_parameters()))
    assert len(trainable) == 2 * 7 * 2 and all("lora" in name for name in trainable)
    close(case.model(case["input_ids"]), case["logits"])


def test_mlx_lm_loads_the_released_files(dense, tmp_path):
    """Without model_type or rope_theta in config.json, and with what old files hold besides the parameters."""
    model, _ = load_model(dense.folder, get_model_classes=lambda config: (Model, ModelArgs))
    close(model(dense["input_ids"]), dense["logits"])
    weights = dict(tree_flatten(model.parameters()))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(4), "lm_head.weight": mx.zeros((2, 2))}
    assert model.sanitize(weights | old).keys() == weights.keys()
    untied = Model(dataclasses.replace(SMALL, tie_word_embeddings=False))
    assert untied.sanitize(old).keys() == {"lm_head.weight"}


def test_load(dense):
    model, tokenizer = load(dense.folder, dtype="float16")
    assert tokenizer is None
    assert model.model.norm.weight.dtype == mx.float16
    close(model(dense["input_ids"]), dense["logits"], 0.05)
    with pytest.raises(InputError, match="'int8' is not supported"):
        load(dense.folder, dtype="int8")


@pytest.mark.parametrize("experts", [0, 4])
def test_initialise_follows_the_parameter_table(experts):
    config = dataclasses.replace(SMALL, num_experts=experts, num_experts_per_tok=experts // 2)
    model = initialize(config, mx.random.key(0))
    assert mx.std(model.model.embed_tokens.weight).item() == pytest.approx(0.2, rel=0.05)
    ups = [layer.mlp.experts.w3.weight if experts else layer.mlp.up_proj.weight for layer in model.layers]
    assert mx.std(ups[0]).item() == pytest.approx(0.2 / 2, rel=0.05)  # sqrt(64 / 16)
    assert not mx.array_equal(ups[0], ups[1])
    assert not experts or not mx.array_equal(ups[0][0], ups[0][1])
    assert mx.array_equal(model.model.norm.weight, mx.ones(64))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert shapes == {name: p.layer_shape(config) for p in parameters(config) for name in p.mlx_names(config)}
    assert shapes == {name: array.shape for name, array in tree_flatten(abstract(config).parameters())}


def test_without_mlx_the_package_names_the_extra():
    script = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name: None if name == 'mlx.core' else find(name); import minicpm_mlx"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == "ImportError: minicpm_mlx needs MLX: pip install 'minicpm-jax-mlx[mlx]'."
