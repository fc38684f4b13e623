"""What the formats share: the tensors that a packed matrix is made of, checked against its shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from weights_io.errors import InputError, listed, short
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import Scheme

FLOATS = ("float32", "float16", "bfloat16")  # of scales


def groups_in(name: str, inputs: int, scheme: Scheme) -> tuple[int, int]:
    """Inputs of a group, and how many groups a row has. Raises `InputError` where they do not fill it."""
    group = inputs if scheme.group_size == -1 else scheme.group_size
    if inputs % group:
        raise InputError(
            f"rows of {inputs} in {short(name)} have no groups of {group}, as {scheme.source} has it; correct its "
            "group_size."
        )
    return group, inputs // group


def check_parts(
    name: str,
    parts: Mapping[str, LazyTensor],
    expected: Mapping[str, tuple[np.dtype | None, tuple[int, ...]]],
    scheme: Scheme,
    shape: tuple[int, ...],
) -> None:
    """`InputError` where a part has another dtype (None: one of `FLOATS`) or shape than ``expected``."""
    for part, (dtype, size) in expected.items():
        tensor: Any = parts.get(part)
        if tensor is None:
            continue
        fits = tensor.dtype.name in FLOATS if dtype is None else tensor.dtype == dtype
        if not fits or tuple(tensor.shape) != size:
            raise InputError(
                f"{short(name)}.{part} in {tensor.source} is {tensor.dtype.name} {short(list(tensor.shape))}, and "
                f"{scheme.source} makes it {dtype or 'float'} {list(size)} for a matrix of {list(shape)}; take config "
                "and weights, whole, from one checkpoint."
            )


def check_complete(
    name: str, parts: Mapping[str, LazyTensor], required: tuple[str, ...], optional: tuple[str, ...], label: str
) -> None:
    """`InputError` where parts are missing, or are those of another format."""
    source = next(iter(parts.values())).source
    if more := sorted(parts.keys() - {*required, *optional}):
        raise InputError(
            f"{short(name)} in {source} has {listed(more)} beside what {label} packs a matrix in; take config and "
            "weights, whole, from one checkpoint."
        )
    if missing := [part for part in required if part not in parts]:
        raise InputError(
            f"{short(name)} in {source} lacks {listed(missing)}, which {label} packs it in; download the weights "
            "again, whole."
        )
