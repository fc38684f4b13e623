"""The MLP of MiniCPM-MoE: a router sends each token to C of E experts and sums their outputs with its weights.

Dims: R = B T rows (tokens), C experts chosen for each, M = R C, E experts, D hidden, F intermediate.

The experts are switch layers of `mlx_lm`, whose `gather_mm` reads only the chosen experts' weights; its LoRA and
quantization support them. Attributes have the names of the tensors in Hugging Face files, without the expert's
number.

Source: modeling_minicpm.py of openbmb/MiniCPM-MoE-8x2B.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from minicpm_mlx.layers.ops import gated_act
from weights_io.config import ModelConfig

MANY = 64  # from this many choices on, sorting by expert pays (the threshold of `mlx_lm`)


class ExpertLinear(SwitchLinear):
    """y = W_e x without bias: the stacked weights [E, O, I] of all experts, each in the checkpoint's [out, in]
    order."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Rows [..., 1, I] to [..., 1, O], each through the expert given by ``indices`` [...]."""
        if x.dtype == mx.float32 or mx.default_device() != mx.cpu:
            return super().__call__(x, indices, sorted_indices)
        # On a CPU gather_mm supports only float32. A few rows cast only the weights of their experts.
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
        """Run each row of x [R, D] through its experts ``expert_ids`` [R, C], multiply by their ``weights`` [R, C]
        in the model's dtype, and sum to [R, D]."""
        y = self.grouped(x, expert_ids) if expert_ids.size >= MANY else self.gather_experts(x, expert_ids)
        return (y * weights[..., None]).sum(axis=1)

    def gather_experts(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """Rows [R, D] to [R, C, D], in the given order."""
        return self.of(x[:, None, None], expert_ids).squeeze(-2)

    def grouped(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """Group the rows by expert."""
        order = self.sort(expert_ids)
        y = self.of(x[order // expert_ids.shape[1]][:, None], expert_ids.flatten()[order], sorted_indices=True)
        return y.squeeze(-2)[mx.argsort(order)].reshape(*expert_ids.shape, -1)

    def of(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Rows [..., 1, D] to [..., 1, D], each through its one of ``experts`` [...]."""
        gate, up = self.w1(x, experts, sorted_indices), self.w3(x, experts, sorted_indices)
        return self.w2(gated_act(gate, up, self.threshold), experts, sorted_indices)

    def sort(self, expert_ids: mx.array) -> mx.array:
        """The permutation [M] that sorts all choices by expert."""
        return mx.argsort(expert_ids.flatten())


class MoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(config)
        self.top_k = config.num_experts_per_tok

    def __call__(self, x: mx.array, real: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Returns the output [B, T, D] and the layer's `load_balancing_loss` over the tokens that are ``real`` [B,
        T] (None: all), for training."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        weights, expert_ids = route(logits, self.top_k)
        return self.experts(rows, weights, expert_ids).reshape(x.shape), load_balancing_loss(logits, expert_ids, real)


def route(logits: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """Weights and ids [R, C] of each row's experts from logits [R, E]: softmax over all experts in float32, the
    ``top_k`` largest, divided by their sum, rounded to the model's dtype."""
    shares = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    experts = mx.stop_gradient(mx.argsort(-shares, axis=-1)[:, :top_k])
    weights = mx.take_along_axis(shares, experts, axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(logits.dtype), experts


def load_balancing_loss(logits: mx.array, expert_ids: mx.array, real: mx.array | None = None) -> mx.array:
    """E sum_e f_e P_e of logits [R, E] and choices [R, C]: the fraction f of all choices that went to an expert,
    times its mean probability P (arXiv 2101.03961, equation 4). It is 1 if all experts are used equally; training
    adds a hundredth of it to the loss. Only ``real`` rows [B, T] count: padding repeats one token and would bias the
    router."""
    count = logits.shape[-1]
    rows = mx.ones(len(logits)) if real is None else real.flatten().astype(mx.float32)
    rows = rows / mx.maximum(rows.sum(), 1)
    shares = (mx.softmax(logits.astype(mx.float32), axis=-1, precise=True) * rows[:, None]).sum(axis=0)
    taken = (expert_ids[..., None] == mx.arange(count)).mean(axis=1)  # [R, E]
    return count * ((taken * rows[:, None]).sum(axis=0) * shares).sum()
