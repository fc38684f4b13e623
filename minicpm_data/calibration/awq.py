"""AWQ (arXiv 2306.00978): scale the inputs that matter up before rounding, and clip each group's range."""

from collections.abc import Mapping

import numpy as np

from minicpm_data.calibration.inputs import Group, InputStats
from weights_io.quantization.packed import Packed
from weights_io.quantization.zero_points import round_to_nearest

RATIOS = 20  # exponents tried, from 0 on
SHRINKS = tuple(1 - step / 20 for step in range(10))  # of a group's range
UNCLIPPED = ("q_proj", "k_proj")  # whose products are sensitive to outliers, as in AutoAWQ


def best_factor(matrices: Mapping[str, np.ndarray], inputs: InputStats, bits: int, group_size: int) -> np.ndarray:
    """The factor on each input [I] with which the rounded matrices change their outputs least.

    Arguments:
        matrices: module -> [O, I] float32, of a `Group`.
        inputs: of the group.
        bits, group_size: as in `round_to_nearest`; the codes have zero points.
    """
    mean = np.maximum(inputs.magnitude / max(1, inputs.tokens), 1e-8).astype(np.float32)
    found, least = np.ones_like(mean), np.inf
    for step in range(RATIOS):
        factor = np.maximum(mean ** (step / RATIOS), 1e-4)
        factor = (factor / np.sqrt(factor.max() * factor.min())).astype(np.float32)
        error = 0.0
        for matrix in matrices.values():
            rounded = round_to_nearest(matrix * factor, bits, group_size, symmetric=False).dequantize() / factor
            error += inputs.error(rounded - matrix)
        if error < least:
            found, least = factor, error
    return found


def scaled(inputs: InputStats, factor: np.ndarray) -> InputStats:
    """The sums over x / factor."""
    return InputStats(inputs.gram / np.outer(factor, factor), inputs.magnitude / factor, inputs.tokens)


def fold(weights: dict[str, np.ndarray], group: Group, factor: np.ndarray) -> None:
    """Multiply the columns of a group's matrices by ``factor``, and divide what is before it. Changes ``weights``."""
    assert group.before is not None
    for module in group.modules:
        weights[f"{module}.weight"] = weights[f"{module}.weight"] * factor
    before = weights[f"{group.before}.weight"]
    weights[f"{group.before}.weight"] = before / (factor if before.ndim == 1 else factor[:, None])


def quantize(module: str, matrix: np.ndarray, inputs: InputStats, bits: int, group_size: int) -> Packed:
    """Round a matrix [O, I] to the nearest codes, each group's range clipped where that changes its outputs less.

    Arguments:
        module: its name; queries and keys are not clipped.
        inputs: of the matrix.
        bits, group_size: as in `round_to_nearest`.
    """
    whole = round_to_nearest(matrix, bits, group_size, symmetric=False)
    if module.endswith(UNCLIPPED):
        return whole
    count = matrix.shape[1] // group_size
    grams = np.stack(
        [inputs.gram[i : i + group_size, i : i + group_size] for i in range(0, matrix.shape[1], group_size)]
    )
    grams = grams.astype(np.float32)
    groups = matrix.reshape(len(matrix), count, group_size)

    def errors(packed: Packed) -> np.ndarray:  # [O, G]
        change = packed.dequantize().reshape(groups.shape) - groups
        return np.einsum("ogi,gij,ogj->og", change, grams, change, optimize=True)

    codes, scales = whole.codes.reshape(groups.shape).copy(), whole.scales.copy()
    assert whole.zeros is not None
    zeros, best = whole.zeros.copy(), errors(whole)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    for shrink in SHRINKS[1:]:
        clipped = np.clip(groups, low * shrink, high * shrink).reshape(matrix.shape)
        tried = round_to_nearest(clipped, bits, group_size, symmetric=False)
        error = errors(tried)
        better = error < best
        best = np.where(better, error, best)
        codes[better] = tried.codes.reshape(groups.shape)[better]
        scales[better] = tried.scales[better]
        assert tried.zeros is not None
        zeros[better] = tried.zeros[better]
    return Packed(codes.reshape(matrix.shape), scales, bits, group_size, zeros=zeros)
