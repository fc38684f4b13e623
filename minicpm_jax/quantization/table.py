"""Quantized weights whose 4-bit codes have their values in a table: bitsandbytes' nf4 and fp4."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minicpm_jax.layers.ops import Weight, linear


class TableWeight(Weight):
    """A weight [.., O, I] as codes of 4 bits, with one scale per group of inputs; ``weight[...]`` dequantizes it.

        w = table[code] * scales

    It is computed in float32 and rounded once, as by the tool. It is stored transposed, as `packed.QuantizedWeight`.
    """

    def __init__(
        self,
        qweight: Int[Array, "... I O"],
        scales: Float[Array, "... G O"],
        table: Float[Array, "... 16"],
        dtype: Any,
    ):
        """``qweight``: int4, whose bits are the code. ``dtype``: of the dequantized weight."""
        self.qweight, self.scales, self.table = nnx.Param(qweight), nnx.Param(scales), nnx.Param(table)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, width, out = self.qweight.shape
        return *stack, out, width

    def __getitem__(self, index: Any) -> Array:
        return self._values()[index]

    def times(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        # The checkpoint dequantizes again in the backward pass: otherwise training would hold all layers dequantized.
        return jax.checkpoint(lambda weight, x: linear(weight._values(), x))(self, x)

    def expert_weight(self, expert: Int[Array, ""]) -> "TableWeight":
        qweight, scales, table = (
            jax.lax.dynamic_index_in_dim(part[...], expert, keepdims=False)
            for part in (self.qweight, self.scales, self.table)
        )
        return TableWeight(qweight, scales, table, self.dtype)

    def _values(self) -> Float[Array, "... O I"]:
        qweight, scales = self.qweight[...], self.scales[...]
        *stack, groups, out = scales.shape
        wide = lookup(qweight, self.table[...]).reshape(*stack, groups, -1, out)
        wide = wide * scales[..., None, :].astype(jnp.float32)
        return wide.astype(self.dtype).reshape(qweight.shape).swapaxes(-1, -2)


def lookup(codes: Int[Array, "... I O"], table: Float[Array, "... 16"]) -> Float[Array, "... I O"]:
    """The values of codes, of which the lowest four bits count. As selections, which XLA fuses with what follows; a
    gather would be a loop over all values on a TPU."""
    codes = codes.astype(jnp.int8)
    values = [table[..., code, None, None] for code in range(16)]
    for bit in range(4):
        odd = (codes >> bit) & 1 != 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
