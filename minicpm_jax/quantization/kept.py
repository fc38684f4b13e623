"""The matrices of a quantized checkpoint, kept quantized: from the codes of the files to the weights of a model.

An embedding is kept in MLX's and GGUF's formats, which alone quantize it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Array

from minicpm_jax.layers.ops import Weight
from minicpm_jax.parallel.sharding import pad_or_trim
from minicpm_jax.quantization.packed import GroupedEmbedding, QuantizedWeight, order_dtype
from minicpm_jax.quantization.table import TableWeight
from weights_io.casting import numpy_dtype
from weights_io.checkpoint import Checkpoint
from weights_io.files.tensor import LazyTensor
from weights_io.memory import ITEM
from weights_io.parameters import EMBEDDING, Parameter, head_parameter, parameters
from weights_io.quantization.packed import Packed, PackedTensor

Place = Callable[[str, np.ndarray], Array]  # attribute of the weight, its values -> the array on the device or mesh


@dataclass(frozen=True)
class Form:
    """The form of the tensors of one parameter. They are stacked, so they have the same."""

    bits: int  # of an integer: 4 or 8
    group: int  # inputs per group
    parts: frozenset[str]  # which of zeros, biases, order and table there are

    def bits_per_weight(self, dtype: str) -> float:
        """Bits of a weight, its share of scales, zeros and biases included. ``dtype``: of the scales."""
        item = 8 * ITEM[dtype]
        of_group = item + item * ("biases" in self.parts) + self.bits * ("zeros" in self.parts)
        return self.bits + of_group / self.group


def kept_forms(checkpoint: Checkpoint) -> dict[str, Form]:
    """Parameter name -> form, for the parameters whose tensors are all quantized, all with a table or none."""
    found = {}
    for parameter in parameters(checkpoint.config):
        each = [_form_of(checkpoint.tensors[name]) for name in parameter.hf_names(checkpoint.config)]
        forms = [form for form in each if form is not None]
        if len(forms) < len(each) or (parameter is EMBEDDING and not forms[0].parts <= {"biases"}):
            continue
        parts = frozenset[str]().union(*(form.parts for form in forms))
        if "table" in parts and not all("table" in form.parts for form in forms):
            continue
        bits, group = max(form.bits for form in forms), math.gcd(*(form.group for form in forms))
        if all(_symmetric(checkpoint.tensors[name]) for name in parameter.hf_names(checkpoint.config)):
            parts -= {"zeros"}
        found[parameter.name] = Form(bits, group, parts)
    return found


def _form_of(tensor: LazyTensor) -> Form | None:
    if not isinstance(tensor, PackedTensor) or (reordered := tensor.reordered()) is None:
        return None
    more = ("order",) if reordered else () if tensor.table() is None else ("table",)
    return Form(4 if tensor.bits <= 4 else 8, tensor.group_size, frozenset((*tensor.parts, *more)))


def _symmetric(tensor: LazyTensor) -> bool:
    return isinstance(tensor, PackedTensor) and tensor.symmetric()


def kept_bytes(checkpoint: Checkpoint, forms: dict[str, Form], dtype: str, head_bits: int | None = None) -> int:
    """Bytes of a model's weights: those in ``forms`` stay quantized, a head that is not has ``head_bits``, and the
    others are in ``dtype``."""
    head = head_parameter(checkpoint.config)
    total = 0.0
    for parameter in parameters(checkpoint.config):
        form = forms.get(parameter.name)
        whole = head_bits if head_bits is not None and parameter is head else 8 * ITEM[dtype]
        bits = whole if form is None else form.bits_per_weight(dtype)
        shape = parameter.shape(checkpoint.config)
        total += math.prod(shape) * bits / 8
        if form is not None and "order" in form.parts:
            total += order_dtype(shape[-1]).itemsize * math.prod(shape) / shape[-2]
        if form is not None and "table" in form.parts:
            total += 4 * 16 * math.prod(shape[:-2])
    return int(total)


def kept_rows(
    checkpoint: Checkpoint, parameter: Parameter, form: Form, shape: tuple[int, ...], dtype: str, place: Place
) -> Iterator[Weight]:
    """The quantized tensors of a parameter, each read and placed when it is requested.

    Arguments:
        shape: [O, I] to zero-pad each matrix to.
        dtype: of scales and biases.
        place: places an array.

    Raises:
        InputError: as `Checkpoint.packed`, or a scale is too large for ``dtype``.
    """
    for name in parameter.hf_names(checkpoint.config):
        packed = checkpoint.packed(name)
        assert packed is not None
        arrays = _arrays(packed, form, shape, dtype)
        for part in arrays.keys() & {"scales", "biases"}:
            checkpoint.check(name, dtype, arrays[part])
        if parameter is EMBEDDING:
            named = {"table": "qweight", "scale": "scales", "bias": "biases"}
            yield GroupedEmbedding(**{n: place(n, arrays[part]) for n, part in named.items() if part in arrays})
        elif "table" in form.parts:
            placed = {part: place(part, _transposed(array)) for part, array in arrays.items()}
            yield TableWeight(dtype=numpy_dtype(dtype), **placed)
        else:
            placed = {part: place(part, _transposed(array)) for part, array in arrays.items()}
            yield QuantizedWeight(dtype=numpy_dtype(dtype), **placed)


def _arrays(packed: Packed, form: Form, shape: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
    """The arrays of a `QuantizedWeight`, not transposed. Codes become signed integers around 0."""
    kind = np.dtype(ml_dtypes.int4) if form.bits == 4 else np.dtype(np.int8)
    middle = 0 if packed.codes.dtype == np.int8 else 1 << (packed.bits - 1)
    if packed.table is not None:
        middle = 0
    codes = (packed.codes.view(np.uint8) - np.uint8(middle)).view(np.int8)  # modulo 256
    group = math.gcd(form.group, shape[1])
    of_groups = shape[0], shape[1] // group
    scales = packed.scales.astype(np.float32) * np.float32(packed.factor)

    def each(values: np.ndarray, kind: np.dtype) -> np.ndarray:
        """The values of all groups of the form's size."""
        with np.errstate(over="ignore"):  # `kept_rows` checks them
            return pad_or_trim(np.repeat(values, packed.group_size // group, axis=1).astype(kind), of_groups)

    arrays = {"scales": each(scales, numpy_dtype(dtype))}
    if packed.table is not None:
        arrays["table"] = packed.table
        codes = (codes ^ 8) - 8  # int4 with the bits of the code
    if "zeros" in form.parts:
        assert packed.zeros is not None
        arrays["zeros"] = each(packed.zeros - middle, kind)
    if "biases" in form.parts:
        biases = 0 * scales if packed.biases is None else packed.biases.astype(np.float32)
        arrays["biases"] = each(biases + middle * scales, numpy_dtype(dtype))
    if "order" in form.parts:
        order = np.arange(shape[1], dtype=order_dtype(shape[1]))
        if packed.order is not None:
            order[: len(packed.order)], codes = packed.order, codes[:, packed.order]
        arrays["order"] = order
    return {"qweight": pad_or_trim(codes, shape).astype(kind), **arrays}


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
