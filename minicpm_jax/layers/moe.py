"""The MLP of MiniCPM-MoE: a router sends each token to C of E experts and sums their outputs with its weights.

Dims: R = B T rows (tokens), C experts chosen for each, M = R C, E experts, D hidden, F intermediate,
      N blocks of H rows.

The routing is known only on the device, so one program shape must serve every routing. There are three forms. A few
rows (a decode step) gather the chosen experts' weights and read no others. Many rows are sorted by expert and cut
into blocks of one expert each; `jax.lax.ragged_dot` would run every expert on every row and mask (8.0 times the
operations in its program for a TPU v5e, blocks have 1.5; a fifth of their speed on a CPU). If the experts are
sharded over devices, each device runs its own experts on all rows, so that no weights are communicated.

Source: modeling_minicpm.py of openbmb/MiniCPM-MoE-8x2B.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.lora import LoRALayer, MatMul
from minicpm_jax.layers.ops import Weight, expert_weight, gated_act, linear
from minicpm_jax.parallel.mesh import BATCH, ambient_mesh, batch_shards
from minicpm_jax.parallel.sharding import splits
from weights_io.config import ModelConfig

# Rows of a block: at least a TPU tile; at most where its arithmetic takes as long as reading the weights.
LOWEST, HIGHEST = 8, 256


class ExpertLinear(nnx.Module):
    """y = W_e x without bias: the stacked weights of all experts, each in the checkpoint's [out, in] order."""

    def __init__(self, weight: Float[Array, "E O I"]):
        self.weight: nnx.Param | Weight = nnx.Param(weight)
        self.adapter: LoRALayer | None = nnx.data(None)

    def of(self, expert: Int[Array, ""], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """All rows through one expert."""

        def of_one(weight: Any, x: Array) -> Array:
            return linear(expert_weight(weight, expert), x)

        return self._adapted(self.weight, x, of_one, lambda ratio: ratio[expert])

    def in_blocks(self, x: Float[Array, "N H I"], experts: Int[Array, "N"]) -> Float[Array, "N H O"]:
        """N blocks of H rows, each block through its own expert."""

        def in_blocks(weight: Array, x: Array) -> Array:
            return block_products(weight, x, experts)

        return self._adapted(self.weight[...], x, in_blocks, lambda ratio: ratio[experts][:, None])

    def all(self, x: Float[Array, "R I"] | Float[Array, "R E I"]) -> Float[Array, "R E O"]:
        """All experts on each row, which is shared by the experts ([R, I]) or one per expert ([R, E, I]). A shared
        row's gradient is summed over experts and outputs in one product; if the row were broadcast to the experts
        first, devices would communicate one gradient per expert."""

        def product(weight: Array, x: Array) -> Array:
            return jnp.einsum("ri,eoi->reo" if x.ndim == 2 else "rei,eoi->reo", x, weight, precision=precision(x))

        return self._adapted(self.weight[...], x, product, lambda ratio: ratio)

    def _adapted(self, weight: Any, x: Array, matmul: MatMul, ratio: Callable[[Array], Array]) -> Array:
        y = matmul(weight, x)
        return y if self.adapter is None else self.adapter(x, y, matmul, ratio)


class Experts(nnx.Module):
    """w2(act(w1 x) * w3 x) of each expert."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig):
        self.w1 = ExpertLinear(weights["w1"]["weight"])
        self.w2 = ExpertLinear(weights["w2"]["weight"])
        self.w3 = ExpertLinear(weights["w3"]["weight"])
        self.count, self.threshold = config.num_experts, config.activation_threshold

    def __call__(
        self, x: Float[Array, "R D"], weights: Float[Array, "R C"], expert_ids: Int[Array, "R C"]
    ) -> Float[Array, "R D"]:
        """Run each row through its experts, multiply by their ``weights`` in the model's dtype, and sum."""
        if expert_ids.size <= self.count:  # gathers at most as many weights as all experts have
            y = self.gather_experts(x, expert_ids)
        else:
            y = self.grouped(x, expert_ids)
        return jnp.sum(y * weights[..., None], axis=1)

    def gather_experts(self, x: Float[Array, "R D"], expert_ids: Int[Array, "R C"]) -> Float[Array, "R C D"]:
        """Gather the weights of one row and expert at a time."""
        y = [jnp.stack([self.of(e, row) for e in experts]) for row, experts in zip(x, expert_ids, strict=True)]
        return jnp.stack(y)

    def grouped(self, x: Float[Array, "R D"], expert_ids: Int[Array, "R C"]) -> Float[Array, "R C D"]:
        """Group the rows by expert, padded to whole blocks."""
        order, sizes = self.sort(expert_ids)
        height = min(max(order.size // (2 * self.count), LOWEST), HIGHEST)  # padding adds at most a half
        blocks = -(-sizes // height)  # of each expert
        ends = jnp.cumsum(blocks)
        experts = expert_ids.reshape(-1)[order]
        shift = (ends - blocks) * height - (jnp.cumsum(sizes) - sizes)  # index among the sorted rows -> slot
        slots = jnp.arange(order.size) + shift[experts]
        most = order.size // height + self.count  # enough blocks for any routing
        owners = jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), self.count - 1)
        rows = jnp.zeros((most * height, x.shape[1]), x.dtype).at[slots].set(x[order // expert_ids.shape[1]])
        rows = rows.reshape(most, height, -1)
        gate, up = self.w1.in_blocks(rows, owners), self.w3.in_blocks(rows, owners)
        y = self.w2.in_blocks(gated_act(gate, up, self.threshold), owners).reshape(most * height, -1)
        return y[slots[jnp.argsort(order)]].reshape(*expert_ids.shape, -1)

    def dense_experts(
        self, x: Float[Array, "R D"], weights: Float[Array, "R C"], expert_ids: Int[Array, "R C"]
    ) -> Float[Array, "R D"]:
        """Run every expert on every row; experts that are not chosen have weight 0."""
        y = self.w2.all(gated_act(self.w1.all(x), self.w3.all(x), self.threshold))
        shares = jnp.sum(jax.nn.one_hot(expert_ids, self.count, dtype=x.dtype) * weights[..., None], axis=1)  # [R, E]
        return jnp.sum(y * shares[..., None], axis=1)

    def of(self, expert: Int[Array, ""], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """All rows through one expert."""
        return self.w2.of(expert, gated_act(self.w1.of(expert, x), self.w3.of(expert, x), self.threshold))

    def sort(self, expert_ids: Int[Array, "R C"]) -> tuple[Int[Array, "M"], Int[Array, "E"]]:
        """The permutation [M] that sorts all choices by expert, and the number of choices [E] of each expert."""
        experts = expert_ids.reshape(-1)
        return jnp.argsort(experts), jnp.bincount(experts, length=self.count)


class MoE(nnx.Module):
    def __init__(self, gate: nnx.Module, weights: dict[str, Any], config: ModelConfig):
        self.gate = gate  # the router: D to E
        self.experts = Experts(weights, config)
        self.top_k = config.num_experts_per_tok

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Returns the output and the layer's `load_balancing_loss` over the tokens that are ``real`` (None: all),
        for training."""
        with jax.named_scope("moe"):
            rows = x.reshape(-1, x.shape[-1])
            logits = self.gate(rows)
            weights, expert_ids = route(logits, self.top_k)
            return self.form(x.shape)(rows, weights, expert_ids).reshape(x.shape), load_balancing_loss(
                logits, expert_ids, real
            )

    def form(self, shape: tuple[int, ...]) -> Callable[[Array, Array, Array], Array]:
        """Select how the experts run on rows [B, T]: all experts on their devices if the ambient mesh shards them,
        each device on its own rows if it shards these and there are many, otherwise in one place."""
        mesh = ambient_mesh()
        if mesh is not None and splits("expert", self.experts.count, mesh):
            return self.experts.dense_experts
        parts = batch_shards(mesh)
        return self.by_device if parts > 1 and shape[1] > 1 and shape[0] % parts == 0 else self.experts

    def by_device(
        self, x: Float[Array, "R D"], weights: Float[Array, "R C"], expert_ids: Int[Array, "R C"]
    ) -> Float[Array, "R D"]:
        """Each device sorts its own rows. If rows were sorted over all devices, XLA would all-reduce every block: 92
        GB in a LoRA step over 8 devices. Without the barrier it may gather an expert for every block: 272 GB in a
        prefill of 8 x 512 tokens over fsdp=8, for 28 GB of weights."""
        mesh = ambient_mesh()
        assert mesh is not None
        rows = P(tuple(name for name in BATCH if name in mesh.shape))
        return jax.shard_map(
            lambda experts, *inputs: jax.lax.optimization_barrier(experts)(*inputs),
            in_specs=(P(), rows, rows, rows),
            out_specs=rows,
            check_vma=False,
        )(self.experts, x, weights, expert_ids)


def route(logits: Float[Array, "R E"], top_k: int) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """Weights and ids of each row's experts: softmax over all experts in float32, the ``top_k`` largest, divided by
    their sum, rounded to the model's dtype."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    return (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(logits.dtype), experts


def load_balancing_loss(
    logits: Float[Array, "R E"], expert_ids: Int[Array, "R C"], real: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """E sum_e f_e P_e: the fraction f of all choices that went to an expert, times its mean probability P (arXiv
    2101.03961, equation 4). It is 1 if all experts are used equally; training adds a hundredth of it to the loss.
    Only ``real`` rows count: padding repeats one token and would bias the router."""
    count = logits.shape[-1]
    rows = jnp.ones(len(logits)) if real is None else real.reshape(-1).astype(jnp.float32)
    rows = rows / jnp.maximum(jnp.sum(rows), 1)
    shares = jnp.sum(jax.nn.softmax(logits.astype(jnp.float32), axis=-1) * rows[:, None], axis=0)
    taken = jnp.mean(jax.nn.one_hot(expert_ids, count), axis=1)  # [R, E]
    return count * jnp.sum(jnp.sum(taken * rows[:, None], axis=0) * shares)


@jax.custom_vjp
def block_products(
    weight: Float[Array, "E O I"], x: Float[Array, "N H I"], experts: Int[Array, "N"]
) -> Float[Array, "N H O"]:
    """W_e x of each block. It has a custom gradient: JAX's own would add an [E, O, I] array for each block."""

    def product(block):
        rows, expert = block
        return jnp.einsum("hi,oi->ho", rows, expert_weight(weight, expert), precision=precision(x))

    return jax.lax.map(product, (x, experts))


def _forward(weight, x, experts):
    return block_products(weight, x, experts), (weight, x, experts)


def _backward(saved, gradient):
    weight, x, experts = saved

    def step(total, block):
        rows, above, expert = block
        wide = {"precision": precision(x), "preferred_element_type": jnp.float32}
        sum_of_one = expert_weight(total, expert) + jnp.einsum("ho,hi->oi", above, rows, **wide)
        total = jax.lax.dynamic_update_index_in_dim(total, sum_of_one, expert, 0)
        return total, jnp.einsum("ho,oi->hi", above, expert_weight(weight, expert), precision=precision(x))

    total, below = jax.lax.scan(step, jnp.zeros(weight.shape, jnp.float32), (x, gradient, experts))
    return total.astype(weight.dtype), below, None


block_products.defvjp(_forward, _backward)
