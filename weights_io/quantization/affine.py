"""A quantized matrix in the affine form that MLX multiplies: w = code * scale + bias, in groups of 32, 64 or 128.

GPTQ, AWQ and bitsandbytes' int8 have this form, with bias = -zero * scale. Larger groups become several with the same
scale. The values of bitsandbytes' 4-bit codes are in a table, so they have no such form; nor have groups that are not
a multiple of 32. Those take the form of `lookup`.
"""

import dataclasses
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from weights_io.casting import numpy_dtype
from weights_io.checkpoint import Checkpoint
from weights_io.files.tensor import LazyTensor
from weights_io.memory import ITEM
from weights_io.parameters import parameters
from weights_io.quantization.entries import GROUPS
from weights_io.quantization.lookup import stored_bits
from weights_io.quantization.mlx_affine import AffineTensor
from weights_io.quantization.packed import Packed, PackedTensor, pack


@dataclass(frozen=True)
class Layout:
    """Bits per code, inputs per group, and how the inputs are ordered."""

    bits: int
    group_size: int
    reordered: bool  # act-order: the layer reorders its input by `Packed.order`
    table: tuple[float, ...] | None = None  # the value of each code in the form of `lookup`; None: the affine form
    zeros: bool = False  # in the form of `lookup`: groups have zero points


def layout_of(tensor: LazyTensor) -> Layout | None:
    """The layout of a tensor; None where it is not quantized, or has groups of different sizes. Raises as
    `PackedTensor.packed`."""
    if not isinstance(tensor, PackedTensor) or (reordered := tensor.reordered()) is None:
        return None
    if isinstance(tensor, AffineTensor):
        return Layout(tensor.bits, tensor.group_size, False)
    fitting = [group for group in sorted(GROUPS["mlx"]) if tensor.group_size % group == 0]
    table = tensor.table()
    if table is None and fitting:
        return Layout(tensor.bits, fitting[-1], reordered)
    if table is None:
        codes = np.arange(1 << tensor.bits, dtype=np.uint8)
        table = codes if "zeros" in tensor.parts else codes.view(np.int8)  # bitsandbytes' int8 is signed
    bits = stored_bits(tensor.bits, tensor.shape[1])
    return Layout(bits, tensor.group_size, reordered, tuple(table.tolist()), "zeros" in tensor.parts)


def layout_of_all(tensors: Iterable[LazyTensor]) -> Layout | None:
    """The one layout of tensors that a model stacks; None where they have several, or one has none.

    Where only some have act-order, all are reordered. Raises as `layout_of`.
    """
    found = [layout_of(tensor) for tensor in tensors]
    layouts = [layout for layout in found if layout is not None]
    reordered = any(layout.reordered for layout in layouts)
    merged = {dataclasses.replace(layout, reordered=reordered) for layout in layouts}
    return merged.pop() if len(merged) == 1 and len(layouts) == len(found) else None


def affine(packed: Packed, group: int, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of MLX's affine form.

    In float32 the values are those of the file. In another dtype the scales and biases are rounded to it, which is
    exact for float16 scales with the zero point 8 (symmetric 4-bit GPTQ) in float16.

    Arguments:
        packed: a quantized matrix, whose inputs are sorted by `Packed.order`.
        group: inputs per group of the result; it divides the matrix's own group size.
        dtype: of scales and biases.

    Returns:
        ``weight`` uint32 [out, in * bits / 32], ``scales`` and ``biases`` [out, in / group].
    """
    codes, scales = packed.codes, packed.scales.astype(np.float32) * np.float32(packed.factor)
    zeros = packed.zeros
    if codes.dtype == np.int8:  # signed codes, of bitsandbytes and GGUF
        middle = 1 << (packed.bits - 1)
        codes, zeros = codes.view(np.uint8) + np.uint8(middle), np.full(scales.shape, middle)  # modulo 256
    if packed.biases is not None:
        biases = packed.biases.astype(np.float32)
    else:
        assert zeros is not None
        biases = -zeros.astype(np.float32) * scales
    if packed.order is not None:
        codes = codes[:, packed.order]
    words = pack(codes, packed.bits).view("<u4").astype(np.uint32, copy=False)
    repeat = packed.group_size // group
    with np.errstate(over="ignore"):  # the caller checks the result
        rounded = [np.repeat(x, repeat, axis=1).astype(numpy_dtype(dtype)) for x in (scales, biases)]
    return {"weight": words, "scales": rounded[0], "biases": rounded[1]}


def kept_bytes(checkpoint: Checkpoint, layouts: Mapping[str, Layout], dtype: str) -> int:
    """Bytes of the weights of a quantized checkpoint in MLX, of which some stay quantized.

    Arguments:
        checkpoint: an open checkpoint.
        layouts: MLX tensor name -> layout, for the matrices that stay quantized.
        dtype: dtype of the other weights, and of the scales and biases.
    """
    total = 0.0
    for parameter in parameters(checkpoint.config):
        for name, tensors in parameter.mlx_names(checkpoint.config).items():
            layout, size = layouts.get(name), float(ITEM[dtype])
            if layout is not None:
                of_group = 2 * size if layout.table is None else size + layout.zeros
                size = layout.bits / 8 + of_group / layout.group_size
            total += len(tensors) * math.prod(parameter.tensor_shape(checkpoint.config)) * size
    return int(total)


def note_dequantized(checkpoint: Checkpoint, kept: Collection[str]) -> None:
    """Print a note if a loaded model holds quantized matrices of its checkpoint dequantized.

    Arguments:
        checkpoint: an open checkpoint.
        kept: Hugging Face names of the matrices that stay quantized.
    """
    others = [tensor for name, tensor in checkpoint.tensors.items() if name not in kept]
    kinds = [tensor.kind for tensor in others if isinstance(tensor, PackedTensor)]
    if kinds:
        count = "1 matrix is" if len(kinds) == 1 else f"{len(kinds)} matrices are"
        print(f"note: {count} dequantized in memory ({kinds[0]})", file=sys.stderr)
