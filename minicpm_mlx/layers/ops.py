"""Elementwise pieces that every part of the model shares."""

import functools
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")


def compiled(function: Callable[..., T], shapeless: bool = False) -> Callable[..., T]:
    """The same with fewer Metal kernels: one for a chain of elementwise operations. On a CPU, MLX would start a C++
    compiler: left alone."""
    return mx.compile(function, shapeless=shapeless) if mx.default_device() == mx.gpu else function


fused = functools.partial(compiled, shapeless=True)


@fused
def gated_act(gate: mx.array, up: mx.array, threshold: float | None = None) -> mx.array:
    """silu(gate) * up; with a ``threshold`` FATReLU in place of SiLU: gate where gate >= threshold, else 0."""
    active = gate * mx.sigmoid(gate) if threshold is None else mx.where(gate >= threshold, gate, 0)
    return active * up


@fused
def scale(x: mx.array, factor: float) -> mx.array:
    """x * factor with the product in float32, rounded once to x's dtype, as PyTorch does."""
    return (x.astype(mx.float32) * factor).astype(x.dtype)


@fused
def divide(x: mx.array, divisor: float) -> mx.array:
    """x / divisor, rounded likewise."""
    return (x.astype(mx.float32) / divisor).astype(x.dtype)
