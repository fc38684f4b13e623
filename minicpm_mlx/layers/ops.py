"""Elementwise operations shared by all layers."""

import functools
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")


def compiled(function: Callable[..., T], shapeless: bool = False) -> Callable[..., T]:
    """The function compiled by `mx.compile`, which fuses chains of elementwise operations into one Metal kernel. On a
    CPU it is returned unchanged: there MLX would start a C++ compiler."""
    return mx.compile(function, shapeless=shapeless) if mx.default_device() == mx.gpu else function


fused = functools.partial(compiled, shapeless=True)


@fused
def gated_act(gate: mx.array, up: mx.array, threshold: float | None = None) -> mx.array:
    """SwiGLU: silu(gate) * up. With a ``threshold``, FATReLU replaces SiLU: gate if gate >= threshold, otherwise 0."""
    active = gate * mx.sigmoid(gate) if threshold is None else mx.where(gate >= threshold, gate, 0)
    return active * up


@fused
def scale(x: mx.array, factor: float) -> mx.array:
    """x * factor, computed in float32 and rounded once to x's dtype, as PyTorch does."""
    return (x.astype(mx.float32) * factor).astype(x.dtype)


@fused
def divide(x: mx.array, divisor: float) -> mx.array:
    """x / divisor, rounded like `scale`."""
    return (x.astype(mx.float32) / divisor).astype(x.dtype)
