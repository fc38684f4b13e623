"""Measure the gain of a decode step that reads only the weights of active MLP neurons (MiniCPM-S-1B, one token).

    python -m benchmarks.sparse_down --backend jax
    python -m benchmarks.sparse_down --backend jax --whole-step

`down`: gate and up are dense. down is stored as [F, D], so that a neuron's row is contiguous. `up+down`: rows of up are
skipped too, because a neuron whose gate is 0 is 0 for any value of up. The predicted time is the dense time multiplied
by the fraction of the bytes that is read. Before timing, every result is compared with the dense result.
Dims: D hidden, F intermediate, A active neurons (the capacity), L layers with different weights (too large to cache).
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from benchmarks.timing import alternating
from weights_io import command_line
from weights_io.config import ModelConfig

# MiniCPM-S-1B with fewer layers. The vocabulary shrinks with them, so the head keeps its fraction of the model.
LAYERS, VOCABULARY = 52, 73440
SHAPE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "fatrelu",
    "scale_emb": 12.0,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "initializer_range": 0.1,
}
D, F = SHAPE["hidden_size"], SHAPE["intermediate_size"]
BLOCK = 64  # active neurons per iteration of the loop


@dataclass(frozen=True)
class Options:
    backend: Literal["jax", "mlx"] = "jax"
    """Backend to measure."""
    whole_step: bool = False
    """Also time attention and head, in a model of --layers layers whose cache holds only this token."""
    layers: int = 24
    """Number of MLPs, run one after the other. 24 of them take 1.7 GB."""
    rounds: int = 9
    """Timed runs. The median is reported."""
    sparsity: tuple[float, ...] = (0.5, 0.85, 0.9, 0.95)
    """Fractions of neurons that are 0."""


Variants = dict[str, Callable[[], np.ndarray]]


def main(options: Options) -> None:
    """Time an MLP of MiniCPM-S-1B for one token, with and without the rows of inactive neurons, per layer."""
    backend = {"jax": jax_variants, "mlx": mlx_variants}[options.backend]
    print("| sparsity | variant | bytes read | predicted ms | measured ms | gain | difference |")
    print("|---|---|---|---|---|---|---|")
    for sparsity in options.sparsity:
        config = config_of(sparsity, options.layers)
        capacity = -(-round(1.2 * (1 - sparsity) * F) // BLOCK) * BLOCK  # more than the active neurons of any layer
        variants = backend(config, min(capacity, F), options.whole_step)
        expected = variants["dense"]()
        differences = {name: np.abs(run() - expected).max() / expected.std() for name, run in variants.items()}
        most = 1e-4 if options.whole_step else 1e-5  # rounding errors of many layers add up
        for name, difference in differences.items():
            assert difference < most, f"{name} is {difference} from what the dense MLP gives"
        seconds = alternating(variants, options.rounds)
        whole = 4 * (3 * D * F + options.whole_step * (VOCABULARY * D // LAYERS + 2 * D * D + 2 * D * D // 3))
        for name, spent in seconds.items():
            skipped = 4 * D * F * sparsity * {"dense": 0, "down": 1, "up+down": 2}[name.split()[0]]
            predicted = seconds["dense"] * (1 - skipped / whole)
            print(
                f"| {sparsity:.0%} | {name} | {(whole - skipped) / 1e6:.1f} MB | {predicted * 1e3 / options.layers:.2f}"
                f" | {spent * 1e3 / options.layers:.2f} | {seconds['dense'] / spent:.2f} | {differences[name]:.0e} |",
                flush=True,
            )


def config_of(sparsity: float, layers: int) -> ModelConfig:
    """The config of a random model with this sparsity. Its gates are normally distributed, so the threshold is the
    matching quantile."""
    config = ModelConfig(num_hidden_layers=layers, vocab_size=VOCABULARY * layers // LAYERS, **SHAPE)
    deviation = config.initializer_range / math.sqrt(config.logit_divisor) * math.sqrt(D)
    return ModelConfig(
        **{**vars(config), "hidden_act_param": deviation * statistics.NormalDist().inv_cdf(sparsity) or 0.0}
    )


def jax_variants(config: ModelConfig, capacity: int, whole_step: bool) -> Variants:
    """`take`: gather A rows at once; `blocks`: loop over the blocks of active rows."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from minicpm_jax.cpu.form import unstack_layers
    from minicpm_jax.layers.kv_cache import Cache
    from minicpm_jax.layers.ops import gated_act
    from minicpm_jax.model import initialize

    threshold = config.activation_threshold

    def product(a, b, dims="i,oi->o"):
        return jnp.einsum(dims, a, b, precision=jax.lax.Precision.HIGHEST)

    def down_take(x, gate, up, rows):
        h = gated_act(product(x, gate), product(x, up), threshold)
        (index,) = jnp.nonzero(h, size=capacity, fill_value=F)
        return product(h.at[index].get(mode="fill", fill_value=0), rows[index], "f,fd->d")

    def both_take(x, gate, up, rows):
        g = gated_act(product(x, gate), jnp.float32(1), threshold)
        (index,) = jnp.nonzero(g, size=capacity, fill_value=F)
        h = g.at[index].get(mode="fill", fill_value=0) * product(x, up[index])
        return product(h, rows[index], "f,fd->d")

    def in_blocks(h, of_block):
        """The sum of ``of_block(indices, h)`` over the blocks of 64 active neurons."""
        (index,) = jnp.nonzero(h, size=F, fill_value=F)
        active = h.at[index].get(mode="fill", fill_value=0)

        def step(i, total):
            some = (jax.lax.dynamic_slice_in_dim(array, i * BLOCK, BLOCK) for array in (index, active))
            return total + of_block(*some)

        return jax.lax.fori_loop(0, (jnp.sum(h != 0) + BLOCK - 1) // BLOCK, step, jnp.zeros(D))

    def down_blocks(x, gate, up, rows):
        h = gated_act(product(x, gate), product(x, up), threshold)
        return in_blocks(h, lambda index, h: product(h, rows[index], "f,fd->d"))

    def both_blocks(x, gate, up, rows):
        g = gated_act(product(x, gate), jnp.float32(1), threshold)
        return in_blocks(g, lambda index, g: product(g * product(x, up[index]), rows[index], "f,fd->d"))

    class Sparse(nnx.Module):
        def __init__(self, mlp, function):
            self.gate, self.up = mlp.gate_proj.weight, mlp.up_proj.weight
            self.rows, self.function = nnx.Param(mlp.down_proj.weight[...].T.copy()), function

        def __call__(self, x):
            return self.function(x[0, 0], self.gate[...], self.up[...], self.rows[...])[None, None]

    model = unstack_layers(initialize(config, jax.random.key(0)))
    mlps = [layer.mlp for layer in model.model.layers]
    x = jax.random.normal(jax.random.key(1), (1, 1, D))
    x = x / jnp.sqrt(jnp.mean(x * x))

    @jax.jit
    def all_mlps(mlps, x):
        outputs = []
        for mlp in mlps:
            outputs.append(mlp(x))
            x = x + 1e-9 * outputs[-1]  # each MLP depends on the one before
        return jnp.concatenate(outputs)

    @jax.jit
    def decode(model):
        hidden, _ = model.decode(jnp.ones((1, 1), jnp.int32), Cache.empty(config, 1, 32, jnp.float32), 1)
        return model.head(hidden)

    def of(function):
        sparse = mlps if function is None else [Sparse(mlp, function) for mlp in mlps]
        if not whole_step:
            return lambda: np.asarray(all_mlps(sparse, x))
        changed = jax.tree.map(lambda leaf: leaf, model)
        for layer, mlp in zip(changed.model.layers, sparse, strict=True):
            layer.mlp = mlp
        return lambda: np.asarray(decode(changed))

    return {
        "dense": of(None),
        "down (take)": of(down_take),
        "down (blocks)": of(down_blocks),
        "up+down (take)": of(both_take),
        "up+down (blocks)": of(both_blocks),
    }


def mlx_variants(config: ModelConfig, capacity: int, whole_step: bool) -> Variants:
    """`top`: the A neurons with the largest gates, selected on the device; `host`: exactly the active neurons, selected
    by numpy, which makes every layer wait for the host."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from minicpm_mlx.layers.ops import gated_act
    from minicpm_mlx.model import initialize

    threshold = config.activation_threshold

    def top(g):
        return mx.argpartition(-g[0, 0], capacity)[:capacity] if capacity < F else mx.arange(F)

    def host(g):
        return mx.array(np.flatnonzero(np.asarray(g[0, 0]) >= threshold))

    def down(choose, gate, up, rows, x):
        g = x @ gate.T
        h, index = gated_act(g, x @ up.T, threshold), choose(g)
        return h[..., index] @ rows[index]

    def both(choose, gate, up, rows, x):
        g = x @ gate.T
        index = choose(g)
        return gated_act(g[..., index], x @ up[index].T, threshold) @ rows[index]

    model = initialize(config, mx.random.key(0))
    mlps = [layer.mlp for layer in model.layers]
    rows = [mx.contiguous(mlp.down_proj.weight.T) for mlp in mlps]
    x = mx.random.normal((1, 1, D), key=mx.random.key(1))
    x = x / mx.sqrt(mx.mean(x * x))
    mx.eval(model.parameters(), rows, x)

    def all_mlps(mlps, x):
        outputs = []
        for mlp in mlps:
            outputs.append(mlp(x))
            x = x + 1e-9 * outputs[-1]
        return mx.concatenate(outputs)

    def decode(mlps):
        for layer, mlp in zip(model.layers, mlps, strict=True):
            layer.mlp = mlp
        return model.head(model.decode(mx.array([[1]]), make_prompt_cache(model)))

    def of(function, choose=None):
        sparse: list[Any] = mlps
        if function is not None:
            weights = zip(mlps, rows, strict=True)
            sparse = [partial(function, choose, m.gate_proj.weight, m.up_proj.weight, r) for m, r in weights]
        return lambda: np.asarray(decode(sparse) if whole_step else all_mlps(sparse, x))

    return {
        "dense": of(None),
        "down (top)": of(down, top),
        "down (host)": of(down, host),
        "up+down (top)": of(both, top),
        "up+down (host)": of(both, host),
    }


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.sparse_down")
