"""MiniCPM3's latent attention beyond the reference folders: its two forms, its cache, adapters, meshes, engines."""

import importlib

import numpy as np
import pytest
import tiny_adapter
import tiny_model
import tiny_training
from reference_run import Reference
from test_engine import REQUESTS, add, make, run

from minicpm_data.diagnostics import kv_error
from minicpm_data.generation.options import CacheOptions
from weights_io import memory
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import default_targets, target_parameters

# Rows of 32, which have groups to be quantized in, and values of 8.
SHAPE = {
    "architectures": ["MiniCPM3ForCausalLM"],
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "intermediate_size": 64,
    "eos_token_id": 57,
}
IDS = np.random.default_rng(0).integers(60, 300, 90).tolist()  # more than both backends run in the absorbed form


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("latent"), **SHAPE)


@pytest.fixture(scope="module")
def model(backend, folder):
    return backend.load(folder, "float32")[0]


def in_pieces(backend, model, width, ids=IDS, **options):
    """[T, V] logits through a cache, ``width`` tokens at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_error, "PIECE", width)
        logits = importlib.import_module(f"{backend.__name__}.kv_error").logits
        return np.concatenate(list(logits(model, ids, CacheOptions(**options))))


def whole(model, ids=IDS):
    return np.asarray(model([ids]))[0]


def test_the_absorbed_form_equals_the_expanded_one(backend, model):
    """A prompt at once through a cache is expanded, pieces of 7 are absorbed; rows of a batch need no cache."""
    expected = whole(model)
    for width in (7, len(IDS)):
        np.testing.assert_allclose(in_pieces(backend, model, width), expected, rtol=0, atol=1e-5)


def test_the_cache_holds_latents_and_rotary_keys_alone(backend, model):
    numbers = SHAPE["kv_lora_rank"] + SHAPE["qk_rope_head_dim"]
    assert memory.cache_bytes(model.config, 100, "float32") == 2 * 100 * numbers * 4
    decoding = importlib.import_module(f"{backend.__name__}.generation.decoding")
    if backend.__name__ == "minicpm_mlx":
        cache = decoding.make_cache(model, [0], CacheOptions())
        model([IDS], cache=cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)  # mlx_lm's grow by 256 tokens
        assert held == memory.cache_bytes(model.config, 256, "float32")
        return
    import jax

    for bits, token in ((None, numbers * 4), (8, numbers + 2 * 4)):  # int8: with two scales
        cache, _ = decoding.empty(model, 3, 64, bits)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) - cache.lengths.nbytes
        estimate = memory.cache_bytes(model.config, 3 * 64, "int8" if bits else "float32")
        assert held == estimate == 2 * 3 * 64 * token


def test_an_int8_cache_hardly_moves_the_logits(backend, model):
    group = 32 if backend.__name__ == "minicpm_mlx" else None
    found = kv_error.compare([whole(model)], [in_pieces(backend, model, 45, kv_bits=8, kv_group_size=group)])
    assert 0 < found.rms < 0.02 * found.deviation and found.largest < 0.15 * found.deviation


@pytest.mark.parametrize("bits", [None, 8])
def test_what_jax_writes_at_any_slot_is_read_again(bits):
    """Rows of different lengths, in the midst of entries of four tokens, and beyond the end."""
    jnp = pytest.importorskip("jax.numpy")
    from minicpm_jax.layers.kv_cache import Cache

    config = ModelConfig.from_dict({**SHAPE, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3})
    cache, random = Cache.empty(config, 3, 16, jnp.float32, bits), np.random.default_rng(0)
    expected = np.zeros((3, 16, 96), np.float32)
    for width, starts in ((5, (0, 3, 13)), (1, (5, 8, 16))):
        new = random.normal(size=(3, width, 96)).astype(np.float32)
        slots = np.array(starts)[:, None] + np.arange(width)
        cache = cache.update(1, new[..., :64], new[..., 64:], jnp.asarray(slots))
        for row, token in np.ndindex(3, width):
            if slots[row, token] < 16:
                expected[row, slots[row, token]] = new[row, token]
    for layer in range(3):
        for row in range(3):
            found = np.concatenate(cache.read(layer, row, 0, 16, jnp.float32), axis=-1)
            error = 0 if bits is None else 0.02
            np.testing.assert_allclose(found, expected[row] * (layer == 1), rtol=0, atol=error)


@pytest.mark.parametrize("kind", ["dora", "int4"])
def test_adapters_and_quantized_weights_act_in_both_halves(backend, folder, tmp_path, kind):
    """Of kv_b_proj, as if its output was computed."""
    given: dict = {"quantize": 4}
    if kind == "dora":
        given = {"adapter": tmp_path / "adapter"}
        checkpoint = open_checkpoint(folder)
        save_adapter(tmp_path / "adapter", tiny_adapter.make(checkpoint, dora=True), checkpoint.config)
    model, _ = backend.load(folder, "float32", **given)
    expected = whole(model, IDS[:20])
    assert np.abs(expected - whole(backend.load(folder, "float32")[0], IDS[:20])).max() > 0.01
    np.testing.assert_allclose(in_pieces(backend, model, 5, IDS[:20]), expected, rtol=0, atol=2e-5)
    if (
        backend.__name__ == "minicpm_jax" and kind == "dora"
    ):  # four heads over eight devices, which all have the latents
        from minicpm_jax.parallel.mesh import make_mesh

        sharded, _ = backend.load(folder, "float32", mesh=make_mesh("fsdp=2,tensor=4"), **given)
        np.testing.assert_allclose(in_pieces(backend, sharded, 20, IDS[:20]), expected, rtol=0, atol=2e-5)


def test_rows_of_the_cache_over_tensor(folder):
    """Four rows over four devices: each holds one row, and gets its queries of all heads. Absorbed and expanded."""
    jax = pytest.importorskip("jax")
    import minicpm_jax
    from minicpm_jax.generation import decoding, teacher_forcing
    from minicpm_jax.parallel.mesh import make_mesh

    prompts, tokens = [np.array(IDS[i : i + 70 - i]) for i in range(4)], np.array(IDS[:12]).reshape(4, 3)
    one, _ = minicpm_jax.load(folder, "float32")
    model, _ = minicpm_jax.load(folder, "float32", mesh=make_mesh("tensor=4", jax.devices()[:4]))
    expected, found = (teacher_forcing.continued(each, prompts, tokens) for each in (one, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    cache = decoding.empty(model, 4, 32, None)[0]
    assert cache.k.sharding.shard_shape(cache.k.shape)[1] == 1
    assert 4 * decoding.cache_bytes(model, 4, 32, CacheOptions()) < 1.01 * decoding.cache_bytes(
        one, 4, 32, CacheOptions()
    )


def test_heads_that_a_mesh_does_not_divide(reference):
    """Six heads over four devices give the original's tokens."""
    jax = pytest.importorskip("jax")
    import minicpm_jax
    from minicpm_jax.parallel.mesh import make_mesh

    case = Reference(reference("minicpm3"), minicpm_jax.loading.load_weights)
    prompt, expected = case["prompt_ids_P20"][0].tolist(), case["greedy_ids_P20"].tolist()
    model, _ = minicpm_jax.load(case.folder, "float32", mesh=make_mesh("tensor=4", jax.devices()[:4]))
    run = minicpm_jax.stream_generate(model, None, prompt, max_tokens=len(expected) - 20)
    assert [r.token for r in run] == expected[20:]
    assert minicpm_jax.generation.decoding.empty(model, 1, 32, None)[0].k.sharding.is_fully_replicated


def test_requests_share_an_engine(backend, model):
    """Rows of different lengths; the longer prompt runs in chunks."""
    runs = [list(backend.stream_generate(model, None, ids, most, **sampling)) for ids, most, sampling in REQUESTS[:2]]
    engine = make(backend, model, slots=2, cache_options=CacheOptions(prefill_step_size=32))
    numbers = [add(engine, i) for i in range(2)]
    found = run(engine)
    assert [found[number] for number in numbers] == [[r.token for r in each] for each in runs]


def test_guessed_tokens_are_those_of_plain_decoding(backend, model):
    plain = [r.token for r in backend.stream_generate(model, None, IDS[:20], max_tokens=30)]
    guessed = list(backend.stream_generate(model, None, IDS[:20], max_tokens=30, draft_model=model))
    assert [r.token for r in guessed] == plain and any(r.from_draft for r in guessed)


def test_gradients_are_those_of_the_twin(folder):
    """Of packed rows; and the matrices that OpenBMB's script adapts are among them."""
    ids = np.array(IDS[:48]).reshape(2, 24)
    segments = np.array([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    batch = {"ids": ids, "labels": ids, "segments": segments}
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    each = []
    for name in tiny_training.BACKENDS:
        pytest.importorskip(f"{name}.model")
        each.append(tiny_training.gradients(name, tiny_training.load(name, folder), batch)[1])
    tiny_training.same(each[0], each[1], 1e-4)
    config = open_checkpoint(folder).config
    adapted = {tensor for p in target_parameters(config, None) for tensor in p.hf_names(config)}
    assert len(adapted) == 2 * len(default_targets(config)) == 8
    assert all(np.abs(each[0][tensor]).max() > 0 for tensor in adapted)


def test_a_config_as_released_and_what_its_original_ignores():
    """Without model_type, tie_word_embeddings and rope_theta. Each head has its own key and value."""
    raw = {"architectures": ["MiniCPM3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
    config = ModelConfig.from_dict(raw)
    assert (config.q_lora_rank, config.kv_lora_rank, config.rope_dim, config.head_dim) == (768, 256, 32, 16)
    assert config.tie_word_embeddings and config.rope_theta == 10000.0
    ignored = {"num_key_value_heads": 2, "head_dim": 96, "v_head_dim": 64}
    assert ModelConfig.from_dict(raw | ignored) == config
    written = config.to_dict()
    assert ModelConfig.from_dict(written) == config and written["v_head_dim"] == 16
    assert "head_dim" not in written and written["num_key_value_heads"] == 4  # which other readers require


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be a positive"),
        ({"q_lora_rank": None}, "q_lora_rank is null; it must be a positive"),
        ({"qk_nope_head_dim": "16"}, "qk_nope_head_dim"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim 31 is odd"),
        ({"hidden_size": 33}, "hidden_size 33 is not num_attention_heads 4"),
        ({"attention_bias": True}, "attention_bias"),
        ({"architectures": ["MiniCPMForCausalLM"], "num_key_value_heads": 4}, "is unknown"),
    ],
)
def test_configs_that_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        ModelConfig.from_dict({"hidden_size": 32, "num_attention_heads": 4, **SHAPE, **changes})


def test_a_quantized_cache_needs_groups_that_divide_latents_and_rotary_keys(reference):
    """In MLX. JAX has one scale for each."""
    for name in tiny_training.BACKENDS:
        pytest.importorskip(f"{name}.model")
    import minicpm_jax
    import minicpm_mlx

    model, _ = minicpm_jax.load(reference("minicpm3"), "float32")
    with pytest.raises(InputError, match="kv_group_size is 16; .* one scale for each latent and each rotary key"):
        next(minicpm_jax.stream_generate(model, None, [1, 2], kv_bits=8, kv_group_size=16))

    model, _ = minicpm_mlx.load(reference("minicpm3"), "float32")
    with pytest.raises(InputError, match="does not divide the width of rotary keys and latents, 8"):
        next(minicpm_mlx.stream_generate(model, None, [1, 2], kv_bits=8))


def filled(starts, slots, width, heads, rank=128, rope_dim=32, bits=None):
    """Two parts of queries, and a latent cache with something in every slot of its second layer."""
    import jax.numpy as jnp

    from minicpm_jax.layers.kv_cache import Cache

    sizes = {"kv_lora_rank": rank, "qk_rope_head_dim": rope_dim, "num_hidden_layers": 2}
    config = ModelConfig.from_dict({**SHAPE, **sizes, "hidden_size": 8 * heads, "num_attention_heads": heads})
    random, batch = np.random.default_rng(0), len(starts)
    stored = random.normal(size=(batch, slots, rank + rope_dim)).astype(np.float32)
    everywhere = jnp.tile(jnp.arange(slots), (batch, 1))
    cache = Cache.empty(config, batch, slots, jnp.float32, bits)
    cache = cache.update(1, stored[..., :rank], stored[..., rank:], everywhere)
    q, rope = (random.normal(size=(batch, width, heads, size)).astype(np.float32) for size in (rank, rope_dim))
    return q, rope, cache, jnp.array(starts)[:, None] + jnp.arange(width)


@pytest.mark.parametrize(
    "starts, slots, width, heads, rank, rope_dim, bits",
    [
        ([0, 5, 63], 64, 1, 4, 128, 32, None),
        ([1, 1100, 2299], 2304, 4, 5, 128, 32, 8),  # three blocks, of which the last has parts
        ([0, 7, 30], 36, 3, 3, 20, 8, None),  # a part beyond the end
    ],
)
def test_the_decoding_kernel(starts, slots, width, heads, rank, rope_dim, bits):
    """Interpreted, against plain XLA."""
    jnp = pytest.importorskip("jax.numpy")
    from minicpm_jax.layers.blockwise import blockwise_attention
    from minicpm_jax.layers.kernels.latent_attention import latent_attention

    q, rope, cache, index = filled(starts, slots, width, heads, rank, rope_dim, bits)
    expected = blockwise_attention(jnp.concatenate([q, rope], axis=-1), cache, 1, index, scale=0.1)
    found = latent_attention(q, rope, cache, 1, index[:, 0], 0.1, interpret=True)
    np.testing.assert_allclose(found, expected.reshape(*q.shape[:3], -1)[..., :rank], rtol=0, atol=5e-6)


@pytest.mark.parametrize("starts, slots, width, bits", [([0, 30], 128, 70, None), ([100], 640, 530, 8)])
def test_the_kernel_of_prompts(starts, slots, width, bits):
    """Interpreted, against the absorbed form in plain XLA."""
    jnp = pytest.importorskip("jax.numpy")
    from minicpm_jax.layers.kernels.latent_prefill import latent_prefill
    from minicpm_jax.layers.latent_attention import Exchange, absorbed

    _, rope, cache, index = filled(starts, slots, width, 2, bits=bits)
    random = np.random.default_rng(1)
    nope = random.normal(size=(*rope.shape[:3], 64)).astype(np.float32)
    weight = (0.1 * random.normal(size=(2, 128, 128))).astype(np.float32)
    expected = absorbed(nope, rope, weight, cache, 1, index, Exchange())
    found = latent_prefill(nope, rope, weight, cache, jnp.int32(1), index[:, 0], interpret=True)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch, most", [(1, 1.002), (64, 1.02)])
def test_a_step_of_the_4b_reads_the_filled_latents_once(batch, most):
    """Counted from the grid: bytes of weights and of what the kernel fetches, over those of weights and latents."""
    pytest.importorskip("jax")
    from test_cache_attention import bytes_read

    from minicpm_jax.layers.kernels.latent_attention import tiling_of

    weights, layers = 2 * 4_073_875_968, 62
    for fill in (2048, 4096):
        tiling = tiling_of(batch, 1, 1024, 1152)
        read = bytes_read(tiling, [fill - 1] * batch, 2) / 2  # keys alone: they are the values
        held = fill * batch * 288 * 2
        assert 1 <= (weights + layers * read) / (weights + layers * held) < most
