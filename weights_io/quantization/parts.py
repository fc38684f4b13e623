"""The checks of all formats: the tensors of a packed matrix must fit the shape of the matrix."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from weights_io.errors import InputError, listed, short
from weights_io.files.tensor import LazyTensor
from weights_io.quantization.entries import Scheme

FLOATS = ("float32", "float16", "bfloat16")  # dtypes of scales


def groups_in(name: str, inputs: int, scheme: Scheme) -> tuple[int, int]:
    """The group size and the number of groups per row. Raises `InputError` where the size does not divide a row."""
    group = inputs if scheme.group_size == -1 else scheme.group_size
    if inputs % group:
        raise InputError(
            f"rows of {inputs} in {short(name)} are not divided by the group size {group} of {scheme.source}; correct "
            "its group_size."
        )
    return group, inputs // group


def check_parts(
    name: str,
    parts: Mapping[str, LazyTensor],
    expected: Mapping[str, tuple[np.dtype | None, tuple[int, ...]]],
    scheme: Scheme,
    shape: tuple[int, ...],
) -> None:
    """Raises `InputError` where a part differs from its expected dtype and shape. A dtype of None accepts `FLOATS`."""
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
    """Raises `InputError` where required parts are missing, or parts do not belong to the format ``label``."""
    source = next(iter(parts.values())).source
    if more := sorted(parts.keys() - {*required, *optional}):
        raise InputError(
            f"{short(name)} in {source} has {listed(more)}, which {label} does not use; take config and weights, "
            "whole, from one checkpoint."
        )
    if missing := [part for part in required if part not in parts]:
        raise InputError(
            f"{short(name)} in {source} lacks {listed(missing)}, which {label} requires; download the weights again, "
            "whole."
        )
