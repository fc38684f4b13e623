"""The JAX model against the original PyTorch code's numbers, and its shapes at full size."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from reference_run import Reference

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from minicpm_jax import device  # noqa: E402
from minicpm_jax.cpu import form  # noqa: E402
from minicpm_jax.cpu.form import (  # noqa: E402
    for_decoding,
    unstack_layers,
)
from minicpm_jax.cpu.products import bfloat16_parts  # noqa: E402
from minicpm_jax.generation.decoding import empty  # noqa: E402
from minicpm_jax.layers.attention import attend, self_attention  # noqa: E402
from minicpm_jax.layers.blockwise import BLOCK  # noqa: E402
from minicpm_jax.layers.kv_cache import Cache  # noqa: E402
from minicpm_jax.layers.linear import RMSNorm  # noqa: E402
from minicpm_jax.layers.rope import apply_rope, positions_of  # noqa: E402
from minicpm_jax.loading import load, load_weights  # noqa: E402
from minicpm_jax.model import Model, abstract, initialize, scale  # noqa: E402
from minicpm_jax.parallel.chips import CHIPS  # noqa: E402
from minicpm_jax.training.losses import mean_loss  # noqa: E402
from minicpm_jax.training.step import weights_of  # noqa: E402
from weights_io import catalog  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.config import ModelConfig  # noqa: E402
from weights_io.errors import InputError  # noqa: E402
from weights_io.parameters import parameters  # noqa: E402

FOLDERS = ["dense_1b", "dense_2b", "dense_bf16", "dense_eps", "dense_untied", "llama_format", "long_128k"]
FOLDERS += ["long_linear", "bin_sharded", "moe_8x2b", "s_1b"]
FOLDERS += ["minicpm3", "minicpm3_scaled", "minicpm3_untied"]
FOLDERS += ["minicpm4_05b", "minicpm4_8b", "minicpm4_scaled", "minicpm5"]  # sparse: config.json alone, as in MLX
# In tests/test_generate.py greedy ids are the reference's too: of one prompt, and of a batch.
GENERATING = ["dense_1b", "dense_2b", "dense_untied", "llama_format", "long_128k", "moe_8x2b", "s_1b"]
BATCHED = ["dense_1b", "moe_8x2b", "s_1b"]
TOLERANCE = 2e-5  # measured: at most 4.2e-6; of minicpm3_scaled `Reference.tolerance`
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


@functools.partial(jax.jit, static_argnums=4)
def decoded(model, ids, cache, new, head=True):
    x, cache = model.decode(ids, cache, new)
    return model.head(x) if head else x, cache


def empty_cache(model, batch, slots):
    return Cache.empty(model.config, batch, slots, jnp.float32)


def greedy(model, prompts, steps, width=None):
    """[B, steps] ids that the model continues with, through a cache. Prompts are padded on the right to ``width``."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = width or lengths.max()
    ids = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts])
    logits, cache = decoded(model, ids, empty_cache(model, len(ids), width + steps), lengths)
    tokens = [jnp.argmax(logits[jnp.arange(len(ids)), lengths - 1], axis=-1)]
    while len(tokens) < steps:
        logits, cache = decoded(model, tokens[-1][:, None], cache, 1)
        tokens.append(jnp.argmax(logits[:, 0], axis=-1))
    return np.stack(tokens, axis=1)


def test_logits(case):
    logits = case.model(case["input_ids"])
    assert logits.dtype == jnp.float32
    close(logits, case["logits"], case.tolerance)
    for length in case.lengths("input_ids_T"):
        close(case.model(case[f"input_ids_T{length}"]), case[f"logits_T{length}"], case.tolerance)


@pytest.mark.parametrize("name", ["bin", "sharded"])
def test_other_files_hold_the_same_model(dense, reference, name):
    """Whose reference is that of dense_2b, byte for byte; so is what follows from its weights."""
    other = Reference(reference(name), load_weights)
    assert (other.folder / "reference.npz").read_bytes() == (dense.folder / "reference.npz").read_bytes()
    mine, theirs = (jax.tree.leaves(case.model) for case in (dense, other))
    assert len(mine) == len(theirs) and all(map(jnp.array_equal, mine, theirs))
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
    ids = jnp.asarray(case["input_ids"][:1])
    positions = positions_of(case.model.config, ids.shape)

    @jax.jit
    def states_and_norms(model, layers):
        states = [model.model.embed(ids)]
        for layer in layers:
            states.append(layer(states[-1], positions)[0])
        return jnp.concatenate(states), model.model.norm(states[-1])[0], model.hidden_states(ids, positions)[0]

    states, *norms = states_and_norms(case.model, unstack_layers(case.model).model.layers)
    close(states, case["hidden_states"], 3e-4, 2e-6)  # numbers of up to 300
    for norm in norms:
        close(norm, case["final_norm"], 1e-4)


def test_loss(case):
    close(mean_loss(case.model, case["input_ids"], case["labels"]), case["loss"])
    if "left_loss_f32" in case.data or "loss_f32" not in case.data:
        for side in ("left", "right"):
            ids, labels, mask = (case[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask"))
            close(mean_loss(case.model, ids, labels, mask), case[f"{side}_loss"])


@pytest.mark.parametrize("case", sorted(set(FOLDERS) - set(GENERATING)), indirect=True)
def test_greedy_through_a_cache(case):
    """Of the other folders in tests/test_generate.py, through the public call."""
    check_greedy(case, padding=0)


@pytest.mark.parametrize("name", ["dense_1b", "long_128k", "moe_8x2b"])
def test_greedy_with_padding_behind_the_prompt(reference, name):
    """Its tokens neither are seen nor, under dynamic NTK, count."""
    check_greedy(Reference(reference(name), load_weights), padding=5)


def check_greedy(case, padding):
    for ending in ["", *(f"_P{length}" for length in case.lengths("prompt_ids_P"))]:
        prompt = case[f"prompt_ids{ending}"]
        expected = case[f"greedy_ids{ending}"][prompt.shape[1] :]
        tokens = greedy(case.model, prompt, len(expected), prompt.shape[1] + padding)
        assert tokens[0].tolist() == expected.tolist()


@pytest.mark.parametrize("case", sorted(set(FOLDERS) - set(BATCHED)), indirect=True)
def test_greedy_batch_of_unequal_prompts(case):
    mask, width = case["batch_attention_mask"], case["batch_prompt_ids"].shape[1]
    prompts = [row[real == 1] for row, real in zip(case["batch_prompt_ids"], mask, strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 2
    expected = case["batch_greedy_ids"][:, width:]
    assert greedy(case.model, prompts, expected.shape[1]).tolist() == expected.tolist()


def test_cached_keys_keep_their_rotation(long):
    """A prompt in two pieces is not one forward pass, in the original either."""
    ids, split = jnp.asarray(long["input_ids_T80"]), int(long["chunk_split"])
    first, cache = decoded(long.model, ids[:, :split], empty_cache(long.model, 1, 80), split)
    second, _ = decoded(long.model, ids[:, split:], cache, 80 - split)
    close(jnp.concatenate([first, second], axis=1), long["chunk_logits"])


def test_rope_is_scaled_by_the_row_in_a_batch(long):
    prompts = [long["prompt_ids_P20"][0], long["prompt_ids_P40"][0]]
    tokens = greedy(long.model, prompts, 24)
    assert tokens[0].tolist() == long["greedy_ids_P20"][20:].tolist()
    assert tokens[1].tolist() == long["greedy_ids_P40"][40:].tolist()


def test_decode_is_the_cached_call_before_the_head(dense):
    ids = jnp.asarray(dense["input_ids"])
    first, cache = decoded(dense.model, ids[:, :5], empty_cache(dense.model, 2, 12), 5, False)
    second, cache = decoded(dense.model, ids[:, 5:], cache, 7, False)
    close(dense.model.head(jnp.concatenate([first, second], axis=1)), dense["logits"])
    assert cache.lengths.tolist() == [12, 12]


def test_input_embeddings_are_not_scaled(dense):
    ids = jnp.asarray(dense["input_ids"])

    @functools.partial(jax.jit, static_argnums=1)
    def logits(model, scaled):
        x = model.model.embed(ids) if scaled else model.model.embed_tokens(ids)
        x, _, _ = model.model(x, positions_of(model.config, ids.shape))
        return model.head(model.model.norm(x))

    close(logits(dense.model, True), dense["logits"])
    assert np.abs(logits(dense.model, False) - dense["logits"]).max() > 1


@jax.jit
def packed_logits(model, ids, segments):
    return model.head(model.hidden_states(ids, positions_of(model.config, ids.shape, segments=segments)))


def test_documents_packed_in_a_row_do_not_see_each_other(dense):
    ids = jnp.asarray(dense["input_ids"][:1])
    segments = jnp.asarray([[0] * 5 + [1] * 7])
    logits = packed_logits(dense.model, ids, segments)
    close(logits[:, :5], dense.model(ids[:, :5]))
    close(logits[:, 5:], dense.model(ids[:, 5:]))


def test_a_packed_document_has_the_rope_of_its_own_length(long):
    """33 and 80 tokens, more than max_position_embeddings (32), in one row with 16."""
    ids = jnp.asarray(np.concatenate([long[f"input_ids_T{n}"] for n in (33, 80, 16)] + [np.zeros((1, 7), int)], axis=1))
    segments = jnp.asarray([[1] * 33 + [2] * 80 + [3] * 16 + [0] * 7])
    logits = packed_logits(long.model, ids, segments)
    for n, start in ((33, 0), (80, 33), (16, 113)):
        close(logits[:, start : start + n], long[f"logits_T{n}"])


def test_bfloat16_is_as_near_as_the_original(reference):
    folder = reference("dense_bf16")
    data, model = np.load(folder / "reference.npz"), load_weights(open_checkpoint(folder))
    assert {array.dtype for array in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    logits = np.asarray(model(data["input_ids"]))
    exact, original = data["logits_f32"], data["logits"]
    assert np.abs(logits - exact).max() < 1.5 * np.abs(original - exact).max()
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.1 * np.sqrt(np.mean((original - exact) ** 2))


@pytest.mark.parametrize("run", [lambda norm, x: norm(x), jax.jit(lambda norm, x: norm(x))])
def test_norm_rounds_before_the_weight(run):
    """Bit for bit in bfloat16, as the original; compiled too."""
    x = 3 * jax.random.normal(jax.random.key(0), (16, 96), jnp.bfloat16)
    weight = (1 + jax.random.normal(jax.random.key(1), (96,))).astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    result = run(RMSNorm(weight, 1e-5), x)
    assert jnp.array_equal(result, normed.astype(jnp.bfloat16) * weight)
    assert not jnp.array_equal(result, (normed * weight.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rotation_and_scales_round_once(dense):
    x = jax.random.normal(jax.random.key(0), (1, 300, 2, 16), jnp.bfloat16)
    positions = positions_of(dense.model.config, (1, 300))
    assert dense.model.config.head_dim == 16
    assert jnp.array_equal(apply_rope(x, positions), apply_rope(x.astype(jnp.float32), positions).astype(jnp.bfloat16))
    assert jnp.array_equal(scale(x, 0.221359), (x.astype(jnp.float32) * 0.221359).astype(jnp.bfloat16))
    assert not jnp.array_equal(scale(x, 0.221359), x * 0.221359)  # JAX rounds the factor first


def test_recomputed_layers_give_the_same_gradients(dense):
    ids = jnp.asarray(dense["input_ids"])

    def loss(model, remat):
        x, *_ = model.model(model.model.embed(ids), positions_of(model.config, ids.shape), remat=remat)
        logits = model.head(model.model.norm(x))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, recomputed = (jax.tree.leaves(gradient(dense.model, remat)) for remat in (False, True))
    assert len(plain) == 9 + 2  # layers are stacked; the head is the embedding
    for a, b in zip(plain, recomputed, strict=True):
        assert jnp.abs(a).max() > 0
        close(a, b, 1e-5 * float(jnp.abs(a).max()))  # measured: 1.1e-6, as XLA fuses the two programs otherwise
    programs = [str(jax.make_jaxpr(loss, static_argnums=1)(dense.model, remat)) for remat in (False, True)]
    assert ["remat" in program for program in programs] == [False, True]


def test_unstacked_layers_give_the_same_numbers(dense):
    listed = unstack_layers(dense.model)
    assert len(listed.model.layers) == 3
    close(listed(dense["input_ids"]), dense["logits"])
    assert greedy(listed, dense["prompt_ids"], 24)[0].tolist() == dense["greedy_ids"][8:].tolist()
    close(dense.model(dense["input_ids"]), dense["logits"])  # the model that was given is as it was
    given, _ = load(dense.folder, dtype="float32")
    ready = for_decoding(given)
    close(ready(dense["input_ids"]), dense["logits"])
    assert for_decoding(ready) is ready
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.model.layers))


def test_bfloat16_in_the_form_for_a_cpu(dense):
    """As near to the original's float32 as the stacked form, in whole rows, in pieces and token by token."""
    ids = np.asarray(dense["input_ids"])
    stacked, _ = load(dense.folder, dtype="bfloat16")

    def step_by_step(model, first):
        cache, _ = empty(model, len(ids), 64, None)
        found, cache = decoded(model, ids[:, :first], cache, first)
        each = [found]
        for at in range(first, ids.shape[1]):
            found, cache = decoded(model, ids[:, at : at + 1], cache, 1)
            each.append(found)
        return jnp.concatenate(each, axis=1)

    def far(logits):
        return float(np.sqrt(np.mean((np.asarray(logits) - dense["logits"]) ** 2)))

    given, listed = far(stacked(ids)), unstack_layers(stacked)
    assert 0 < far(listed(ids)) < 1.2 * given
    assert 0 < far(step_by_step(listed, 5)) < 1.2 * given
    one_row = decoded(listed, ids[:1, :1], empty(listed, 1, 64, None)[0], 1)[0]
    assert 0 < np.sqrt(np.mean((np.asarray(one_row)[0, 0] - dense["logits"][0, 0]) ** 2)) < 1.5 * given


@pytest.mark.parametrize("matrix_unit", [True, False])
def test_float32_of_a_bfloat16_file_on_a_cpu(reference, monkeypatch, matrix_unit):
    """The matrices stay as the file has them, as bits without a matrix unit; the numbers are those of float32."""
    monkeypatch.setattr(form, "has_matrix_unit", lambda: matrix_unit)
    known = Reference(reference("dense_bf16"), functools.partial(load_weights, decoding=True))
    model = unstack_layers(known.model)
    kept = ["bfloat16"] if matrix_unit else ["bfloat16", "uint16"]  # two views of one buffer
    assert {(leaf.ndim, leaf.dtype.name) for leaf in jax.tree.leaves(model)} == {
        (1, "float32"),
        *((2, name) for name in kept),
    }
    head = model.model.embed_tokens.weight
    addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(head)}
    assert len(addresses) == 1
    close(model(known["input_ids"]), known["logits"])
    assert empty(model, 1, 32, None)[0].k.dtype == jnp.float32
    assert greedy(model, known["prompt_ids"], 24)[0].tolist() == known["greedy_ids"][8:].tolist()


def test_a_float32_is_three_bfloat16():
    random = np.random.default_rng(0)
    exact = (random.standard_normal(10_000) * 10.0 ** random.integers(-20, 20, 10_000)).astype(np.float32)
    parts = jax.jit(bfloat16_parts)(exact)
    assert {part.dtype for part in parts} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), exact)


def test_decoding_in_bfloat16_on_a_cpu_copies_neither_words_nor_cache():
    """XLA would make the words float32 before the loop (2.6 MB), and write a cache in bfloat16 whole for each token."""
    config = dataclasses.replace(SMALL, vocab_size=10_000)
    model = unstack_layers(initialize(config, jax.random.key(0), "bfloat16"))

    @functools.partial(jax.jit, donate_argnums=1)
    def run(model, cache):
        def step(_, carry):
            ids, cache = carry
            hidden, cache = model.decode(ids, cache, 1)
            return jnp.argmax(model.head(hidden), axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 9, step, (jnp.zeros((1, 1), jnp.int32), cache))

    cache, _ = empty(model, 1, 8192, None)
    assert cache.k.nbytes > 1 << 20
    assert run.lower(model, cache).compile().memory_analysis().temp_size_in_bytes < 1 << 18


@pytest.mark.parametrize(
    ("own", "experts", "matrix_unit", "found"),
    [
        ("bfloat16", 0, True, "bfloat16"),
        ("bfloat16", 0, False, "float32"),
        ("bfloat16", 8, True, "float32"),
        ("float16", 0, True, "float32"),
        ("float32", 0, True, "float32"),
    ],
)
def test_what_a_cpu_computes_in(dense, monkeypatch, own, experts, matrix_unit, found):
    monkeypatch.setattr(form, "has_matrix_unit", lambda: matrix_unit)
    config = dataclasses.replace(SMALL, num_experts=experts)
    checkpoint = dataclasses.replace(open_checkpoint(dense.folder), dtype=own, config=config)
    assert checkpoint.target(functools.partial(device.preferred_dtype, decoding=True)) == found
    assert checkpoint.target(device.preferred_dtype) == "float32"  # in the form that is trained
    assert checkpoint.target("float16") == "float16"
    assert checkpoint.target(None) == own


def test_what_a_tpu_without_bfloat16_kernels_computes_in(dense, monkeypatch):
    monkeypatch.setattr(device, "_chip", lambda: CHIPS["v3"])
    monkeypatch.setattr(device, "platform", lambda: "tpu")
    checkpoint = dataclasses.replace(open_checkpoint(dense.folder), dtype="bfloat16")
    assert checkpoint.target(device.preferred_dtype) == "float32"
    with pytest.raises(InputError, match="do not compile for v3 in bfloat16; compute in float32"):
        load(dense.folder, dtype="bfloat16")
    monkeypatch.setattr(device, "_chip", lambda: CHIPS["v4"])
    assert checkpoint.target(device.preferred_dtype) == "bfloat16"
    device.check_dtype("bfloat16")


def test_load(dense):
    assert len(load(dense.folder, decoding=True)[0].model.layers) == 3  # one for each layer
    model, tokenizer = load(dense.folder, dtype="float16")
    assert tokenizer is None
    assert model.model.norm.weight.dtype == jnp.float16
    close(model(dense["input_ids"]), dense["logits"], 0.05)
    with pytest.raises(InputError, match="'int8' is not supported"):
        load(dense.folder, dtype="int8")


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_initialise_follows_the_parameter_table(tied, experts):
    chosen = {"num_experts": experts, "num_experts_per_tok": experts // 2}
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, **chosen)
    weights = weights_of(initialize(config, jax.random.key(0)))
    assert jnp.std(weights["model.embed_tokens.weight"]) == pytest.approx(0.2, rel=0.05)
    up = weights[f"model.layers.mlp.{'experts.w3' if experts else 'up_proj'}.weight"]
    assert jnp.std(up) == pytest.approx(0.2 / 2, rel=0.05)  # sqrt(64 / 16)
    assert not jnp.array_equal(up[0], up[1])
    assert not experts or not jnp.array_equal(up[0, 0], up[0, 1])
    assert jnp.array_equal(weights["model.norm.weight"], jnp.ones(64))
    shapes = {name: array.shape for name, array in weights.items()}
    assert shapes == {parameter.name: parameter.shape(config) for parameter in parameters(config)}
    assert shapes == {name: array.shape for name, array in jax.eval_shape(weights_of, abstract(config)).items()}
    leaves = jax.tree.leaves(initialize(config, jax.random.key(0)))
    assert len(leaves) == len(shapes)  # nothing beside the table


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("minicpm-2b", 2_724_880_896),
        ("minicpm-1b", 1_360_246_272),
        ("minicpm-moe-8x2b", 13_873_291_776),
        ("minicpm4-8b", 8_185_253_888),
        ("minicpm5-1b", 1_080_632_832),
    ],
)
def test_full_size_has_the_published_count_and_shapes(name, parameters):
    """As shapes: nothing is allocated."""
    config = ModelConfig.from_dict(dict(catalog.find(name).config))
    model = abstract(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model)) == parameters
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    logits = jax.eval_shape(Model.__call__, model, ids)
    assert (logits.shape, logits.dtype) == ((1, 128, config.vocab_size), jnp.float32)
    cache = jax.eval_shape(lambda: Cache.empty(config, 1, 256, jnp.bfloat16))
    x, after = jax.eval_shape(lambda m, i, c: m.decode(i, c, 128), model, ids, cache)
    assert (x.shape, x.dtype) == ((1, 128, config.hidden_size), jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)


def test_attention_of_many_tokens_is_made_in_blocks():
    """The same numbers and gradients, with a last block that is not full, in less memory than two arrays of scores."""
    width, heads = 2 * BLOCK + 100, 4
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, width, n, 8)) for key, n in zip(keys, (heads, 2, 2), strict=False))
    segments = jnp.arange(width)[None] // 700
    mask = jnp.tril(segments[:, :, None] == segments[:, None, :])
    above = jax.random.normal(keys[3], (1, width, heads * 8))

    def compiled(attend, seen):
        def total(q, k, v):
            mixed = attend(q, k, v, seen)
            return jnp.sum(mixed * above), mixed

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True)).lower(q, k, v).compile()

    programs = compiled(self_attention, segments), compiled(attend, mask)
    for found, expected in zip(*(jax.tree.leaves(program(q, k, v)) for program in programs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))
    blocks, whole = (program.memory_analysis().temp_size_in_bytes for program in programs)
    scores = heads * width * width * 4
    assert blocks < 2 * scores < whole
