"""The kernel for attention over a cache: its numbers (interpreted), its bytes, and the programs for a TPU it is in."""

import dataclasses
import functools
import re

import numpy as np
import pytest
from test_kv_cache import PROMPT, WIDE

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, SingleDeviceSharding  # noqa: E402

from minicpm_data.generation import Sampling  # noqa: E402
from minicpm_jax import attention, load  # noqa: E402
from minicpm_jax.attention import Cache, attend, attend_cache  # noqa: E402
from minicpm_jax.chips import Topology  # noqa: E402
from minicpm_jax.decoding import State, decode, prefill  # noqa: E402
from minicpm_jax.kernels.cache_attention import Tiling, bytes_read, cache_attention, cost  # noqa: E402
from minicpm_jax.model import abstract  # noqa: E402
from minicpm_jax.sampling import Knobs  # noqa: E402
from minicpm_jax.sharding import automatic  # noqa: E402

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

HEADS = {"2b": (36, 36), "1b": (24, 8)}  # query and key/value heads, of 64
LAYERS, LAYER = 3, 1


def filled(first, heads, kv_heads, head_dim, width, slots, dtype="float32", bits=None):
    """Queries, and a cache with something in every slot, written as the model writes."""
    config = dataclasses.replace(
        WIDE, num_hidden_layers=LAYERS, num_key_value_heads=kv_heads, num_attention_heads=heads, head_dim=head_dim
    )
    rng = np.random.default_rng(0)
    cache = Cache.empty(config, len(first), slots, dtype, bits)
    everywhere = jnp.broadcast_to(jnp.arange(slots), (len(first), slots))
    for layer in range(LAYERS):
        k, v = (jnp.asarray(rng.normal(size=(len(first), slots, kv_heads, head_dim)), dtype) for _ in range(2))
        cache = cache.written(layer, k, v, everywhere)
    return jnp.asarray(2 * rng.normal(size=(len(first), width, heads, head_dim)), dtype), cache


def reference(q, cache, first):
    like = jax.ShapeDtypeStruct((cache.slots, cache.k.shape[3] // q.shape[3], q.shape[3]), q.dtype)
    k, v = jax.vmap(lambda row: cache.read(LAYER, row, 0, 0, like))(jnp.arange(len(q)))
    index = np.asarray(first)[:, None] + np.arange(q.shape[1])
    return attend(q, k, v, jnp.arange(cache.slots) <= index[:, :, None])


CASES = {  # first slot of each row's new tokens, heads, key/value heads, head dimension, new tokens, slots
    "decode, of unequal rows": ([3, 300, 1039], 6, 2, 16, 1, 1040),
    "decode, one head each": ([0, 17], 4, 4, 16, 1, 40),
    "decode, as wide as the 1b": ([511, 512], 24, 8, 64, 1, 1024),
    "few tokens": ([3, 17], 6, 2, 16, 5, 40),
    "first piece": ([0], 4, 4, 64, 512, 1024),
    "later piece": ([512], 4, 4, 64, 512, 1024),
    "pieces of a piece": ([0, 300], 12, 2, 64, 200, 1040),
    "heads that fill no lanes": ([5, 600], 6, 3, 32, 40, 640),
}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_attention(case, bits):
    """Measured: at most 4e-6 from `attend` over the (for int8: dequantised) cache."""
    first, *rest = CASES[case]
    q, cache = filled(first, *rest, bits=bits)
    out = cache_attention(q, cache, LAYER, jnp.asarray(first), interpret=True)
    assert (out.shape, out.dtype) == ((*q.shape[:2], q.shape[2] * q.shape[3]), q.dtype)
    np.testing.assert_allclose(out, reference(q, cache, first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("case", ["decode, as wide as the 1b", "pieces of a piece"])
def test_the_kernel_in_bfloat16(case, bits):
    """As near to exact attention over the same cache as XLA's form is."""
    first, *rest = CASES[case]
    q, cache = filled(first, *rest, dtype="bfloat16", bits=bits)
    wide = cache if bits else dataclasses.replace(cache, k=cache.k.astype("float32"), v=cache.v.astype("float32"))
    exact = reference(q.astype("float32"), wide, first)
    near, plain = (
        float(jnp.sqrt(jnp.mean((out.astype("float32") - exact) ** 2)))
        for out in (
            cache_attention(q, cache, LAYER, jnp.asarray(first), interpret=True),
            reference(q, cache, first),
        )
    )
    assert 0 < near < 1.1 * plain


def test_what_lies_behind_a_row_is_not_seen():
    q, cache = filled([3, 300], 6, 2, 16, 1, 1040)
    behind = jnp.arange(1040)[None, :, None] > jnp.array([3, 300])[:, None, None]
    other = dataclasses.replace(cache, k=jnp.where(behind, 7e9, cache.k), v=jnp.where(behind, 7e9, cache.v))
    run = functools.partial(cache_attention, q, layer=LAYER, first=jnp.array([3, 300]), interpret=True)
    assert jnp.array_equal(run(cache), run(other))


@pytest.fixture
def interpreted(monkeypatch):
    """Programs as for a TPU, run on the CPU: the kernel's branch is taken, and interpreted."""
    monkeypatch.setattr(attention, "cache_attention", functools.partial(cache_attention, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args))


@pytest.mark.parametrize("bits", [None, 8])
def test_pico_through_the_kernel(bits, request):
    """A prompt in two pieces, unequal rows, and a step."""
    model, _ = load(dtype="float32")

    @jax.jit
    def logits(model):
        ids = jnp.asarray([PROMPT, PROMPT[::-1]])
        cache = Cache.empty(model.config, 2, 64, jnp.float32, bits)
        _, cache = model.decode(ids[:, :20], cache, 20)
        _, cache = model.decode(ids[:, 20:50], cache, jnp.array([30, 7]), start=jnp.array([20, 20]))
        return model.head(model.decode(ids[:, 50:51], cache, 1)[0])

    plain = logits(model)
    request.getfixturevalue("interpreted")
    jax.clear_caches()
    np.testing.assert_allclose(logits(model), plain, rtol=0, atol=2e-4)  # measured: 3e-5, of logits up to 20


@pytest.mark.parametrize(
    ("axes", "bits"),
    [
        ({"data": 2, "tensor": 4}, None),
        ({"data": 2, "fsdp": 4}, 8),
        ({"tensor": 8}, None),
        ({"tensor": 2}, 8),
    ],
)
def test_over_a_mesh_each_device_runs_the_kernel_on_its_part(interpreted, axes, bits):
    mesh = automatic(Mesh(np.array(jax.devices()[: np.prod(list(axes.values()))]).reshape(*axes.values()), [*axes]))
    first = jnp.array([3, 17])
    for width in (1, 20):
        q, cache = filled(first, 16, 8, 16, width, 40, bits=bits)
        run = jax.jit(functools.partial(attend_cache, mesh=mesh))
        args = q, cache, LAYER, first[:, None] + jnp.arange(width)
        assert str(jax.make_jaxpr(run)(*args)).count("shard_map[") == 1
        np.testing.assert_allclose(run(*args), reference(q, cache, first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("name", HEADS)
def test_a_step_reads_what_is_filled(name, batch, bits):
    """At most a block more for each row, counted from the grid; and the statement to XLA is that of a full cache."""
    heads, kv_heads = HEADS[name]
    size, scaled = (1, True) if bits else (2, False)
    tiling = Tiling.of(batch, 1, heads, 64, 4096, kv_heads, size)
    slot = 2 * kv_heads * (64 * size + (4 if scaled else 0))  # keys, values, scales
    for fill in (128, 512, 2048, 4096):
        read = bytes_read(tiling, [fill - 1] * batch, size, scaled)
        blocks = -(-fill // tiling.block)
        assert batch * fill * slot <= read <= 1.01 * batch * blocks * tiling.block * slot
    unequal = [int(first) for first in np.linspace(0, 4095, batch)]
    need = sum(slot * (first // tiling.block + 1) * tiling.block for first in unequal)
    assert need <= bytes_read(tiling, unequal, size, scaled) <= 1.01 * need
    assert tiling.block <= 256
    queries = 2 * batch * heads * 64 * 2
    assert cost(tiling, size, 2, scaled).bytes_accessed == bytes_read(tiling, [4095] * batch, size, scaled) + queries


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_a_step_of_the_2b_reads_its_weights_and_what_is_filled(batch):
    """Within a fiftieth, of equal rows and of unequal ones; where those end anywhere in a block, within a thirtieth."""
    weights, layers, slot = 5_449_761_792, 40, 2 * 2304 * 2
    tiling = Tiling.of(batch, 1, 36, 64, 4096, 36, 2)

    def ratio(fills):
        read = bytes_read(tiling, [fill - 1 for fill in fills], 2)
        return (weights + layers * read) / (weights + layers * slot * sum(fills))

    fills = 128, 512, 2048, 4096
    for each in (*((fill,) for fill in fills), fills):
        assert 1 <= ratio([each[row % len(each)] for row in range(batch)]) < 1.02
    assert 1 <= ratio([int(fill) for fill in np.linspace(1, 4096, batch)]) < 1.03


@pytest.mark.parametrize("name", HEADS)
def test_a_piece_of_a_prompt_reads_what_is_filled(name):
    heads, kv_heads = HEADS[name]
    tiling = Tiling.of(4, 512, heads, 64, 4096, kv_heads, 2)
    slot, queries = 2 * 2 * kv_heads * 64, 2 * 4 * 512 * heads * 64 * 2
    assert (tiling.piece, tiling.rows) == ((512, 1024) if name == "2b" else (128, 768))
    for start in (0, 512, 3584):
        times = tiling.pieces if start else 1  # the first block alone stays for the next piece
        assert bytes_read(tiling, [start] * 4, 2) == times * 4 * slot * (start + 512)
    assert cost(tiling, 2, 2).bytes_accessed == bytes_read(tiling, [3584] * 4, 2) + queries


# Compiled for a TPU v5e, which needs none: libtpu does it.


@functools.cache
def chip():
    return Topology.parse("v5e:1x1").devices()[0]


def compiled(job, slots, batch=1, bits=None):
    """The program of a 512-token piece or of decoding, of a model as wide as the 2B with four layers, in bfloat16."""
    sharding = SingleDeviceSharding(chip())

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    model = placed(abstract(WIDE))
    cache = placed(jax.eval_shape(lambda: Cache.empty(WIDE, batch, slots, jnp.bfloat16, bits)))
    rows = array((batch,), jnp.int32)
    if job == "prefill":
        last = array((batch, 1, WIDE.hidden_size), jnp.bfloat16)
        return prefill.lower(model, array((batch, 512), jnp.int32), cache, last, array((), jnp.int32), rows).compile()
    keys = placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)))
    state = State(cache, rows, None, keys, array((batch,), bool), array((1,), jnp.int32))
    return decode.lower(model, state, array((), jnp.int32), placed(Knobs.of(Sampling(), WIDE.vocab_size))).compile()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("job", "slots", "batch", "bits"),
    [
        ("prefill", 4096, 1, None),
        ("prefill", 32768, 1, None),
        ("prefill", 32768, 1, 8),
        ("decode", 4096, 1, None),
        ("decode", 4096, 16, None),
        ("decode", 4096, 1, 8),
        ("decode", 4096, 16, 8),
    ],
)
def test_programs_for_a_tpu_run_the_kernel_and_copy_no_cache(job, slots, batch, bits):
    """Temporaries of a v5e program: measured 0.3 to 0.4 MB. With XLA's form, which turns the cache and back, 76 MB for
    a piece of a prompt at 4,096 slots and 605 MB at 32,768; 152 MB and 1,359 MB for decoding."""
    program = compiled(job, slots, batch, bits)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    memory = program.memory_analysis()
    print(f"temporaries of {job}, {batch} x {slots} slots, bits {bits}: {memory.temp_size_in_bytes / 1e6:.2f} MB")
    assert memory.temp_size_in_bytes < 2e6
    cache = 2 * batch * WIDE.num_hidden_layers * slots * (2304 * (1 if bits else 2) + (160 if bits else 0))
    assert cache <= memory.alias_size_in_bytes < 1.01 * cache + 1e6  # it is written in place
    stacked = rf" = \(?(?:bf16|s8|f32)\[{WIDE.num_hidden_layers},{batch},(?:{slots},2304|40,{slots})\]"
    copies = [line for line in text.splitlines() if re.search(stacked + r"\S* (?:copy|copy-start|transpose)\(", line)]
    assert not copies


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_platform_chooses(platform):
    q, cache = filled([3], 6, 2, 16, 1, 40)
    lowered = jax.jit(attend_cache).trace(q, cache, LAYER, jnp.array([[3]])).lower(lowering_platforms=(platform,))
    assert ("tpu_custom_call" in lowered.as_text()) == (platform == "tpu")
