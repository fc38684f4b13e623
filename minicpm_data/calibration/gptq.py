"""GPTQ (arXiv 2210.17323): quantize column by column, and let the later columns make up for each rounding."""

import numpy as np

from minicpm_data.calibration.inputs import InputStats
from weights_io.quantization.packed import Packed
from weights_io.quantization.zero_points import grid

BLOCK = 128  # columns after which the later blocks are corrected; a multiple of each group size
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it


def quantize(matrix: np.ndarray, inputs: InputStats, bits: int, group_size: int, symmetric: bool) -> Packed:
    """Quantize a matrix so that its outputs change little on the calibration inputs.

    Arguments:
        matrix: [O, I] float32.
        inputs: of the matrix.
        bits, group_size, symmetric: as in `weights_io.quantization.zero_points.round_to_nearest`. The scales of a group
            are those of its weights when its first column comes. The group size divides `BLOCK`.

    Returns:
        The codes, in the order of the inputs (no act-order).
    """
    weights = matrix.astype(np.float32).copy()
    outputs, width = weights.shape
    inverse = _inverse_factor(inputs.gram / max(1, inputs.tokens))
    weights[:, np.diagonal(inputs.gram) == 0] = 0  # an input that never occurs
    codes = np.empty((outputs, width), np.uint8)
    scales = np.empty((outputs, width // group_size), np.float16)
    zeros = np.empty((outputs, width // group_size), np.int32)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = np.zeros((outputs, stop - start), np.float32)
        for column in range(start, stop):
            group, begins = divmod(column, group_size)
            if begins == 0:
                scales[:, group], zeros[:, group] = grid(weights[:, column : column + group_size], bits, symmetric)
            scale, zero = scales[:, group].astype(np.float32), zeros[:, group]
            code = np.clip(np.rint(weights[:, column] / scale) + zero, 0, 2**bits - 1)
            codes[:, column] = code
            error = (weights[:, column] - scale * (code - zero)) / inverse[column, column]
            weights[:, column:stop] -= np.outer(error, inverse[column, column:stop])
            errors[:, column - start] = error
        weights[:, stop:] -= errors @ inverse[start:stop, stop:]
    return Packed(codes, scales, bits, group_size, zeros=zeros)


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor [I, I] float32 of the damped Hessian's inverse."""
    hessian = hessian.copy()
    diagonal = np.einsum("ii->i", hessian)
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
