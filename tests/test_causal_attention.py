"""The kernel for attention of whole rows: numbers and gradients (interpreted), and the program for a TPU it is in."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, SingleDeviceSharding  # noqa: E402

from minicpm_jax.layers import attention  # noqa: E402
from minicpm_jax.layers.attention import chunked_attention, self_attention  # noqa: E402
from minicpm_jax.layers.kernels.causal_attention import causal_attention  # noqa: E402
from minicpm_jax.parallel.chips import Topology  # noqa: E402
from minicpm_jax.parallel.mesh import automatic  # noqa: E402

pytestmark = pytest.mark.slow


def example(batch=2, width=200, heads=4, kv_heads=2, head_dim=16, dtype="float32", value_dim=None):
    """q, k, v, what the result is multiplied with, and two documents with padding behind them in each row."""
    keys, value_dim = jax.random.split(jax.random.key(0), 4), value_dim or head_dim
    shapes = [(batch, width, *last) for last in ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))]
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    above = jax.random.normal(keys[3], (batch, width, heads * value_dim), dtype)
    ends = jnp.array([[70, 180], [90, 200]])[:batch, :, None]
    segments = (jnp.sum(jnp.arange(width) >= ends, axis=1) + 1) % 3
    return q, k, v, above, segments


def gradients(attend):
    def total(q, k, v, above, segments):
        mixed = attend(q, k, v, segments)
        return jnp.sum((mixed * above).astype(jnp.float32)), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


# MiniCPM3's keys of 96 and values of 64, a head of its own for each query head.
LATENT = {"heads": 2, "kv_heads": 2, "head_dim": 96, "value_dim": 64}


@pytest.mark.parametrize(("packed", "shape"), [(True, {}), (False, {}), (True, LATENT)])
def test_numbers_and_gradients_are_those_of_attention(packed, shape):
    """Rows of no whole registers, two heads for each key/value head. Measured: within 1e-6 of the largest."""
    q, k, v, above, segments = example(**shape)
    given = q, k, v, above, segments if packed else None
    found = gradients(functools.partial(causal_attention, interpret=True))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradients(chunked_attention)(*given)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"data": 4}])
def test_over_a_mesh_each_device_runs_the_kernel_on_its_part(monkeypatch, axes):
    """(Four devices do not divide two rows: each runs both.)"""
    monkeypatch.setattr(attention, "causal_attention", functools.partial(causal_attention, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    count = int(np.prod(list(axes.values())))
    mesh = automatic(Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), [*axes]))
    given = example(width=100, dtype="bfloat16")
    with jax.set_mesh(mesh):
        assert "shard_map[" in str(jax.make_jaxpr(gradients(self_attention))(*given))
        found = gradients(self_attention)(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradients(chunked_attention)(*given)), strict=True):
        one, other = (x.astype(jnp.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_platform_and_the_dtype_choose(dtype):
    lowered = jax.jit(self_attention).trace(*example(dtype=dtype)[:3]).lower(lowering_platforms=("tpu",))
    assert ("tpu_custom_call" in lowered.as_text()) == (dtype == "bfloat16")


@pytest.mark.tpu
def test_a_program_for_a_tpu_takes_a_tenth_of_the_memory():
    """4,096 tokens with 8 heads of 64 on a v5e, with gradients, against scores of all of them at once."""
    place = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    shape = jax.eval_shape(functools.partial(example, 1, 4096, 8, 8, 64, "bfloat16"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shape)

    def whole(q, k, v, segments):
        mask = jnp.tril(segments[:, :, None] == segments[:, None, :])
        return attention.attend(q, k, v, mask)

    kernel, scores = (
        gradients(attend).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for attend in (self_attention, whole)
    )
    print(f"temporaries: {kernel / 1e6:.1f} MB, with all scores {scores / 1e6:.1f} MB")
    assert kernel < 0.1 * scores
