"""Quantize matrices into the blocks of GGUF files, as llama.cpp does without an importance matrix.

``gguf.quants`` packs the simple kinds. It unpacks Q4_K and Q6_K and does not pack them: this module does, after
llama.cpp's ``ggml/src/ggml-quants.c`` (``quantize_row_q4_K_ref``, ``quantize_row_q6_K_ref``), all blocks at once.
"""

from typing import Any

import numpy as np

SUPER = 256  # weights of a super-block
PIECE = 1 << 22  # weights that are packed at a time; each takes about 100 bytes meanwhile
TINY = 1e-15  # ggml's GROUP_MAX_EPS


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """Quantize the rows of a matrix.

    Arguments:
        array: float32 of shape [rows, columns]; the columns are a multiple of the kind's block.
        kind: ggml's name of it: F32, F16, BF16, Q4_0, Q5_0, Q8_0, Q4_K, Q6_K ...

    Returns:
        The blocks, uint8 of shape [rows, bytes]; for F32 and F16 the numbers in that dtype.
    """
    from gguf import GGMLQuantizationType, quants

    if kind not in PACKERS:
        return quants.quantize(array, GGMLQuantizationType[kind])
    rows = max(1, PIECE // array.shape[-1])
    pieces = [array[start : start + rows] for start in range(0, len(array), rows)]
    packed = [PACKERS[kind](piece.reshape(-1, SUPER)).reshape(len(piece), -1) for piece in pieces]
    return np.concatenate(packed)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """[B, 256] -> [B, 144]: eight groups of 32, each with a scale and a minimum of 6 bits."""
    x = blocks.reshape(-1, 32)
    weights = np.sqrt(np.square(x).sum(1, dtype=np.float32, keepdims=True) / 32) + np.abs(x)
    scales, minima = (found.reshape(-1, 8) for found in _scale_and_minimum(x, weights))
    scale, codes_of_scale = _six_bits(scales)
    minimum, codes_of_minimum = _six_bits(minima)
    d = (scale.astype(np.float32)[:, None] * codes_of_scale).reshape(-1, 1)
    offset = (minimum.astype(np.float32)[:, None] * codes_of_minimum).reshape(-1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(_nearest((x + offset) / d), 0, 15)
    # Where the scale is 0 llama.cpp keeps the codes of the search; they have no effect.
    codes = np.where(d == 0, 0, codes).astype(np.uint8).reshape(-1, 4, 2, 32)
    low_s, low_m = codes_of_scale[:, :4], codes_of_minimum[:, :4]
    high_s, high_m = codes_of_scale[:, 4:], codes_of_minimum[:, 4:]
    packed = np.concatenate(
        [low_s | (high_s >> 4) << 6, low_m | (high_m >> 4) << 6, (high_s & 15) | (high_m & 15) << 4], axis=1
    )
    nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(len(blocks), -1)
    return np.concatenate([_bytes(scale), _bytes(minimum), packed, nibbles], axis=1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """[B, 256] -> [B, 210]: sixteen groups of 16, each with a signed scale of 8 bits."""
    x = blocks.reshape(-1, 16)
    scales = _signed_scale(x, 32).reshape(-1, 16)
    at = np.abs(scales).argmax(1)
    largest = np.take_along_axis(scales, at[:, None], 1)
    empty = np.abs(largest) < TINY
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(-128) / largest
        d = np.where(empty, 0, np.float32(1) / inverse).astype(np.float16)
        codes_of_scale = np.where(empty, 0, np.minimum(127, _nearest(inverse * scales))).astype(np.int8)
        step = (d.astype(np.float32) * codes_of_scale).reshape(-1, 1)
        codes = np.where(step == 0, 0, np.clip(_nearest(x / step), -32, 31) + 32)
    codes = np.where(np.repeat(empty, 16, 0), 0, np.where(step == 0, 32, codes)).astype(np.uint8)
    quarter = codes.reshape(-1, 2, 4, 32)  # of each half of a block
    low = np.concatenate([(quarter[:, :, i] & 15) | (quarter[:, :, i + 2] & 15) << 4 for i in (0, 1)], axis=-1)
    high = np.bitwise_or.reduce([(quarter[:, :, i] >> 4) << 2 * i for i in range(4)])
    parts = [
        low.reshape(len(blocks), -1),
        high.reshape(len(blocks), -1),
        codes_of_scale.view(np.uint8),
        _bytes(d[:, 0]),
    ]
    return np.concatenate(parts, axis=1)


PACKERS: dict[str, Any] = {"Q4_K": _q4_k, "Q6_K": _q6_k}


def _scale_and_minimum(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ggml's ``make_qkx2_quants`` for codes of 4 bits: the scale and the minimum, of 21 tries and the plain range, with
    the least weighted squared error. ``x``, ``weights``: [G, n]. Returns two arrays [G]; the minimum is negated."""
    most = np.float32(15)
    low, high = np.minimum(x.min(1), 0), x.max(1)
    flat = high == low
    total = weights.sum(1)
    total_x = (weights * x).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = (np.float32(1) / (most / (high - low))).astype(np.float32)
        minimum = low.copy()
        codes = np.clip(_nearest((most / (high - low))[:, None] * (x - low[:, None])), 0, 15)
        best = (weights * np.square(scale[:, None] * codes + minimum[:, None] - x)).sum(1)
        for step in range(21):
            inverse = (np.float32(-1) + np.float32(0.1) * np.float32(step) + most) / (high - low)
            codes = np.clip(_nearest(inverse[:, None] * (x - low[:, None])), 0, 15)
            sum_l, sum_l2 = (weights * codes).sum(1), (weights * codes * codes).sum(1)
            sum_xl = (weights * codes * x).sum(1)
            determinant = total * sum_l2 - sum_l * sum_l
            tried = (total * sum_xl - total_x * sum_l) / determinant
            tried_low = (sum_l2 * total_x - sum_l * sum_xl) / determinant
            positive = tried_low > 0
            tried, tried_low = np.where(positive, sum_xl / sum_l2, tried), np.where(positive, 0, tried_low)
            error = (weights * np.square(tried[:, None] * codes + tried_low[:, None] - x)).sum(1)
            better = (determinant > 0) & (error < best)
            best, scale = np.where(better, error, best), np.where(better, tried, scale)
            minimum = np.where(better, tried_low, minimum)
    return np.where(flat, 0, scale).astype(np.float32), -np.where(flat, low, minimum).astype(np.float32)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, 8] -> a float16 factor [B], and whole numbers of 6 bits [B, 8], whose products are near ``values``."""
    most = np.maximum(values.max(1), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(most > 0, np.float32(63) / most, 0).astype(np.float32)
    codes = np.clip(_nearest(inverse[:, None] * values), 0, 63).astype(np.uint8)
    return (most / np.float32(63)).astype(np.float16), codes


def _signed_scale(x: np.ndarray, most: int) -> np.ndarray:
    """ggml's ``make_qx_quants`` with weights x²: of 19 tries, the scale [G] with the least error of codes from -most to
    most - 1."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    empty = np.abs(extreme) < TINY
    weights = x * x
    scale = best = np.zeros(len(x), np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        for step in (0, *range(-9, 0), *range(1, 10)):
            inverse = -(np.float32(most) + np.float32(0.1) * np.float32(step)) / extreme
            codes = np.clip(_nearest(inverse[:, None] * x), -most, most - 1)
            sum_xl, sum_l2 = (weights * x * codes).sum(1), (weights * codes * codes).sum(1)
            better = (sum_l2 > 0) & ((sum_xl * sum_xl > best * sum_l2) | (step == 0))
            found = np.where(sum_l2 > 0, sum_xl / sum_l2, 0)
            scale = np.where(better, found, scale)
            best = np.where(better, found * sum_xl, best)
    return np.where(empty, 0, scale).astype(np.float32)


def _nearest(x: np.ndarray) -> np.ndarray:
    return np.rint(x).astype(np.float32)


def _bytes(halves: np.ndarray) -> np.ndarray:
    """float16 [B] -> uint8 [B, 2]."""
    return np.ascontiguousarray(halves.astype("<f2")).view(np.uint8).reshape(-1, 2)
