"""The MLP of MiniCPM-MoE: a router sends each token to C of E experts, whose outputs are added with its weights.

Dims: R = B T rows (tokens), C experts chosen for each, M = R C, E experts, D hidden, F intermediate.

The experts are the switch layers of `mlx_lm`, whose `gather_mm` reads the chosen experts' weights alone; its LoRA and
quantisation know them. Attributes are named as the tensors in Hugging Face files, less the expert's number.
Source of the semantics: modeling_minicpm.py of openbmb/MiniCPM-MoE-8x2B.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from minicpm_mlx.layers.ops import gated_act
from weights_io.config import ModelConfig

MANY = 64  # rows from which sorting them by expert pays, as `mlx_lm` has it


class ExpertLinear(SwitchLinear):
    """y = W_e x, without bias: the weights [E, O, I] of all experts, each in the [out, in] order of the checkpoint."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """[..., 1, O] of rows [..., 1, I], each with the expert of ``indices`` [...]."""
        if x.dtype == mx.float32 or mx.default_device() != mx.cpu:
            return super().__call__(x, indices, sorted_indices)
        # gather_mm on a CPU is for float32 alone. A few rows cast the weights of their experts only.
        weight = self.weight
        if indices.size <= self.num_experts:
            weight, indices = weight[indices.flatten()], mx.arange(indices.size).reshape(indices.shape)
        weight = weight.astype(mx.float32).swapaxes(-1, -2)
        return mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=indices).astype(x.dtype)


class Experts(nn.Module):
    """w2(act(w1 x) * w3 x) of each expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = ExpertLinear(config.hidden_size, config.intermediate_size, config.num_experts, bias=False)
        self.w2 = ExpertLinear(config.intermediate_size, config.hidden_size, config.num_experts, bias=False)
        self.w3 = ExpertLinear(config.hidden_size, config.intermediate_size, config.num_experts, bias=False)
        self.threshold = config.activation_threshold

    def __call__(self, x: mx.array, weights: mx.array, expert_ids: mx.array) -> mx.array:
        """[R, D] of x [R, D]: each row through its ``chosen`` experts [R, C], times their ``weights`` [R, C] in the
        model's dtype, then added up."""
        y = self.grouped(x, expert_ids) if expert_ids.size >= MANY else self.gather_experts(x, expert_ids)
        return (y * weights[..., None]).sum(axis=1)

    def gather_experts(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """[R, C, D] of rows [R, D] as they come."""
        return self.of(x[:, None, None], expert_ids).squeeze(-2)

    def grouped(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """All rows of an expert together."""
        order = self.sort(expert_ids)
        y = self.of(x[order // expert_ids.shape[1]][:, None], expert_ids.flatten()[order], sorted_indices=True)
        return y.squeeze(-2)[mx.argsort(order)].reshape(*expert_ids.shape, -1)

    def of(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """[..., 1, D] of rows [..., 1, D], each through its one of ``experts`` [...]."""
        gate, up = self.w1(x, experts, sorted_indices), self.w3(x, experts, sorted_indices)
        return self.w2(gated_act(gate, up, self.threshold), experts, sorted_indices)

    def sort(self, expert_ids: mx.array) -> mx.array:
        """The order [M] that sorts all choices by expert."""
        return mx.argsort(expert_ids.flatten())


class MoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(config)
        self.top_k = config.num_experts_per_tok

    def __call__(self, x: mx.array, real: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """[B, T, D] to [B, T, D], and the layer's `load_balancing_loss` over the tokens that are ``real`` [B, T] (None:
        all), for training."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        weights, expert_ids = route(logits, self.top_k)
        return self.experts(rows, weights, expert_ids).reshape(x.shape), load_balancing_loss(logits, expert_ids, real)


def route(logits: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """Weights and numbers [R, C] of the experts that each row of ``logits`` [R, E] takes: softmax over all experts in
    float32, the ``top_k`` largest, divided by their sum, rounded to the model's dtype."""
    shares = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    experts = mx.stop_gradient(mx.argsort(-shares, axis=-1)[:, :top_k])
    weights = mx.take_along_axis(shares, experts, axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(logits.dtype), experts


def load_balancing_loss(logits: mx.array, expert_ids: mx.array, real: mx.array | None = None) -> mx.array:
    """E sum_e f_e P_e of logits [R, E] and choices [R, C]: the share f of all choices that fell on an expert times its
    mean probability P (arXiv 2101.03961, equation 4). 1 where the experts are used alike; training adds a hundredth of
    it to the loss. Only the rows that are ``real`` [B, T] count: padding, all of one token, would pull the router away
    from its experts."""
    count = logits.shape[-1]
    rows = mx.ones(len(logits)) if real is None else real.flatten().astype(mx.float32)
    rows = rows / mx.maximum(rows.sum(), 1)
    shares = (mx.softmax(logits.astype(mx.float32), axis=-1, precise=True) * rows[:, None]).sum(axis=0)
    taken = (expert_ids[..., None] == mx.arange(count)).mean(axis=1)  # [R, E]
    return count * ((taken * rows[:, None]).sum(axis=0) * shares).sum()
