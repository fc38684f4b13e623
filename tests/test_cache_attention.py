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

from minicpm_data.generation.options import Sampling  # noqa: E402
from minicpm_jax import load  # noqa: E402
from minicpm_jax.generation.decoding import State, decode, prefill  # noqa: E402
from minicpm_jax.generation.sampling import SamplingParams  # noqa: E402
from minicpm_jax.layers import attention  # noqa: E402
from minicpm_jax.layers.attention import attend, attend_cache, cached_attention  # noqa: E402
from minicpm_jax.layers.blockwise import blockwise_attention, blockwise_attention_in_turn  # noqa: E402
from minicpm_jax.layers.kernels.cache_attention import cache_attention, cost, scale_bytes  # noqa: E402
from minicpm_jax.layers.kernels.tiling import Tiling  # noqa: E402
from minicpm_jax.layers.kv_cache import Cache  # noqa: E402
from minicpm_jax.model import abstract  # noqa: E402
from minicpm_jax.parallel.chips import Topology  # noqa: E402
from minicpm_jax.parallel.mesh import automatic  # noqa: E402

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
    everywhere = np.broadcast_to(np.arange(slots), (len(first), slots))
    for layer in range(LAYERS):
        k, v = (rng.normal(size=(len(first), slots, kv_heads, head_dim)).astype(dtype) for _ in range(2))
        cache = updated(cache, layer, k, v, everywhere)
    return jnp.asarray((2 * rng.normal(size=(len(first), width, heads, head_dim))).astype(dtype)), cache


updated = jax.jit(Cache.update)


@jax.jit
def reference(q, cache, first):
    like = jax.ShapeDtypeStruct((cache.slots, cache.k.shape[3] // q.shape[3], q.shape[3]), q.dtype)
    k, v = jax.vmap(lambda row: cache.read_block(LAYER, row, 0, 0, like))(jnp.arange(len(q)))
    index = jnp.asarray(first)[:, None] + jnp.arange(q.shape[1])
    return attend(q, k, v, jnp.arange(cache.slots) <= index[:, :, None])


CASES = {  # first slot of each row's new tokens, heads, key/value heads, head dimension, new tokens, slots
    "decode, of unequal rows": ([3, 300, 1036, 0, 1023, 519], 6, 2, 16, 1, 1037),
    "decode, one head each": ([0, 17], 4, 4, 16, 1, 40),
    "decode, as wide as the 1b": ([511, 512], 24, 8, 64, 1, 1024),
    "few tokens": ([3, 17], 6, 2, 16, 5, 40),
    "first piece": ([0], 4, 4, 64, 512, 1024),
    "later piece": ([512], 4, 4, 64, 512, 1024),
    "pieces of a piece": ([0, 300], 12, 2, 64, 200, 1040),
    "heads that fill no lanes": ([5, 600], 6, 3, 32, 40, 640),
}


# Scales differ where blocks come in parts, in pieces, and where heads share lanes or fill none.
IN_INT8 = ("decode, of unequal rows", "later piece", "pieces of a piece", "heads that fill no lanes")


@pytest.mark.parametrize(("case", "bits"), [*((case, None) for case in CASES), *((case, 8) for case in IN_INT8)])
def test_the_kernel_is_attention(case, bits):
    """Measured: at most 4e-6 from `attend` over the (for int8: dequantised) cache."""
    first, *rest = CASES[case]
    q, cache = filled(first, *rest, bits=bits)
    out = cache_attention(q, cache, LAYER, np.asarray(first), interpret=True)
    assert (out.shape, out.dtype) == ((*q.shape[:2], q.shape[2] * q.shape[3]), q.dtype)
    np.testing.assert_allclose(out, reference(q, cache, np.asarray(first)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("case", ["decode, as wide as the 1b", "pieces of a piece"])
def test_the_kernel_in_bfloat16(case, bits):
    """As near to exact attention over the same cache as XLA's form is."""
    first, *rest = CASES[case]
    q, cache = filled(first, *rest, dtype="bfloat16", bits=bits)
    wide = cache if bits else dataclasses.replace(cache, k=cache.k.astype("float32"), v=cache.v.astype("float32"))
    exact = np.asarray(reference(q.astype("float32"), wide, np.asarray(first)))
    near, plain = (
        np.sqrt(np.mean((np.asarray(out, np.float32) - exact) ** 2))
        for out in (
            cache_attention(q, cache, LAYER, np.asarray(first), interpret=True),
            reference.__wrapped__(q, cache, first),  # op by op, as one program would round less often
        )
    )
    assert 0 < near < 1.1 * plain


@pytest.mark.parametrize("bits", [None, 8])
def test_every_fill_of_a_block(bits):
    """Each row needs other parts of the block than the row before it."""
    first = [int(i) for i in np.random.default_rng(0).permutation(256)[:64]]
    q, cache = filled(first, 4, 2, 16, 1, 256, bits=bits)
    tiling = Tiling.of(len(first), 1, 4, 16, 256, 2, cache.k.dtype.itemsize)
    assert [tiling.size(part) for part in tiling.parts] == [128, 64, 32, 16, 8, 8]
    out = cache_attention(q, cache, LAYER, np.asarray(first), interpret=True)
    np.testing.assert_allclose(out, reference(q, cache, np.asarray(first)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("decode, of unequal rows", None),
        ("decode, of unequal rows", 8),
        ("later piece", 8),
        ("heads that fill no lanes", None),
    ],
)
def test_blocks_one_by_one_and_at_once(case, bits):
    """XLA's forms: a CPU's, and any other device's."""
    first, *rest = CASES[case]
    q, cache = filled(first, *rest, bits=bits)
    index = jnp.asarray(first)[:, None] + jnp.arange(q.shape[1])
    for form in (blockwise_attention, blockwise_attention_in_turn):
        out = jax.jit(form)(q, cache, LAYER, index)
        np.testing.assert_allclose(out, reference(q, cache, np.asarray(first)), rtol=0, atol=1e-5)


def test_what_lies_behind_a_row_is_not_seen():
    first = jnp.array([3, 300, 0, 1023])
    q, cache = filled(first, 6, 2, 16, 1, 1040)
    behind = jnp.arange(1040)[None, :, None] > first[:, None, None]
    other = dataclasses.replace(cache, k=jnp.where(behind, 7e9, cache.k), v=jnp.where(behind, 7e9, cache.v))
    run = functools.partial(cache_attention, q, layer=LAYER, first=first, interpret=True)
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
    [({"data": 2, "tensor": 4}, None), ({"fsdp": 2, "tensor": 4}, 8), ({"tensor": 8}, None)],
)
def test_over_a_mesh_each_device_writes_and_reads_its_part(interpreted, axes, bits):
    mesh = automatic(Mesh(np.array(jax.devices()[: np.prod(list(axes.values()))]).reshape(*axes.values()), [*axes]))
    for first, width in ((jnp.array([3, 17]), 1), (jnp.array([17, 17]), 20)):
        q, cache = filled(first, 16, 8, 16, width, 40, bits=bits)
        k, v = (jnp.asarray(np.random.default_rng(1).normal(size=(2, width, 8, 16)), jnp.float32) for _ in range(2))
        index = first[:, None] + jnp.arange(width)
        args = q, k, v, cache, LAYER, index
        with jax.set_mesh(mesh):
            assert str(jax.make_jaxpr(cached_attention)(*args)).count("shard_map[") == 1
            mixed, found = jax.jit(cached_attention)(*args)
        expected = cache.update(LAYER, k, v, index)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        np.testing.assert_allclose(mixed, reference(q, expected, first), rtol=0, atol=1e-5)


held_of = jax.jit(Tiling.held, static_argnums=0)


def bytes_read(tiling, first, itemsize, scaled=False):
    """Bytes of cache that the kernel takes from HBM for rows whose first new tokens stand at ``first`` [B]: its grid is
    walked, and a part counts where its index is not that of the step before. ``scaled``: int8 with float32 scales."""
    start, layer, total = np.asarray(first), np.zeros(1, int), 0
    held = np.asarray(held_of(tiling, start))
    steps = np.indices(tiling.grid(start)).reshape(4, -1)
    maps = [
        (functools.partial(tiling.stored, part), tiling.size(part) * tiling.lanes * itemsize) for part in tiling.parts
    ]
    if scaled:
        maps.append((tiling.scale, scale_bytes(tiling)))
    for index_map, size in maps:
        index = np.stack(np.broadcast_arrays(*index_map(*steps, layer, start, held)))
        total += 2 * size * (1 + int(np.any(index[:, 1:] != index[:, :-1], axis=0).sum()))
    return total


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("name", HEADS)
def test_a_step_reads_what_is_filled(name, batch, bits):
    """Whole grains of keys and values, whole blocks of scales, counted from the grid; and the statement to XLA is that
    of a full cache."""
    heads, kv_heads = HEADS[name]
    size, scaled = (1, True) if bits else (2, False)
    tiling = Tiling.of(batch, 1, heads, 64, 4096, kv_heads, size)
    slot, scale = 2 * kv_heads * 64 * size, 2 * -(-kv_heads // 8) * 8 * 4 if scaled else 0

    def need(fills):
        return sum(
            -(-fill // tiling.grain) * tiling.grain * slot + -(-fill // tiling.block) * tiling.block * scale
            for fill in fills
        )

    unequal = [int(fill) for fill in np.linspace(1, 4096, batch)]
    for fills in (*([fill] * batch for fill in (1, 128, 512, 2048, 4096)), unequal):
        read = bytes_read(tiling, [fill - 1 for fill in fills], size, scaled)
        assert need(fills) <= read <= need(fills) + tiling.block * slot  # a block for the parts that are held by none
    assert tiling.grain <= 16
    queries = 2 * batch * heads * 64 * 2
    assert cost(tiling, size, 2, scaled).bytes_accessed == bytes_read(tiling, [4095] * batch, size, scaled) + queries


@pytest.mark.parametrize("batch", [1, 64])
def test_a_step_of_the_2b_reads_its_weights_and_what_is_filled(batch):
    """Within a fiftieth, of equal rows and of unequal ones, wherever they end."""
    weights, layers, slot = 5_449_761_792, 40, 2 * 2304 * 2
    tiling = Tiling.of(batch, 1, 36, 64, 4096, 36, 2)
    rng = np.random.default_rng(0)

    def ratio(fills):
        read = bytes_read(tiling, [fill - 1 for fill in fills], 2)
        return (weights + layers * read) / (weights + layers * slot * sum(fills))

    fills = 128, 512, 2048, 4096
    for each in (*((fill,) for fill in fills), fills):
        assert 1 <= ratio([each[row % len(each)] for row in range(batch)]) < 1.006
    for fill in fills:
        for _ in range(4):
            assert 1 < ratio(rng.integers(1, fill + 1, batch).tolist()) < 1.02


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


# Compiled for a TPU, which needs none: libtpu does it.


@functools.cache
def chip(kind):
    return Topology.parse(f"{kind}:1x1").devices()[0]


def compiled(job, slots, batch=1, bits=None, kind="v5e"):
    """The program of a 512-token piece or of decoding, of a model as wide as the 2B with four layers, in bfloat16."""
    sharding = SingleDeviceSharding(chip(kind))

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
    return decode.lower(
        model, state, array((), jnp.int32), placed(SamplingParams.of(Sampling(), WIDE.vocab_size))
    ).compile()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("job", "slots", "batch", "bits", "kind"),
    [
        ("prefill", 4096, 1, None, "v5e"),
        ("prefill", 32768, 1, None, "v5e"),
        ("prefill", 32768, 1, 8, "v5e"),
        ("decode", 4096, 1, None, "v5e"),
        ("decode", 4096, 16, None, "v5e"),
        ("decode", 4096, 16, None, "v6e"),
        ("decode", 4096, 1, 8, "v5e"),
        ("decode", 4096, 16, 8, "v5e"),
    ],
)
def test_programs_for_a_tpu_run_the_kernel_and_copy_no_cache(job, slots, batch, bits, kind):
    """Temporaries: measured 0.3 to 0.6 MB, with libtpu 0.0.48 up to 1.2. With XLA's form, which turns the cache and
    back, 76 MB for a piece of a prompt at 4,096 slots and 605 MB at 32,768; 152 MB and 1,359 MB for decoding."""
    program = compiled(job, slots, batch, bits, kind)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    memory = program.memory_analysis()
    print(
        f"temporaries of {job}, {kind}, {batch} x {slots} slots, bits {bits}: {memory.temp_size_in_bytes / 1e6:.2f} MB"
    )
    assert memory.temp_size_in_bytes < 2**21
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
