"""Check a conversion of a model that sees, stage by stage: from images to pixels, patches, tokens and logits.

The reference is a ``.npz`` file of arrays named CASE.STAGE (N counts the overviews and slices of a case, B the blocks
of the tower, L the decoder's layers, R the batch rows; H, W pixels, T tokens, D hidden of the decoder, V vocabulary):

    imageI [H, W, 3] the images, pixelN [3, H, W] of each part; with sliceN they are compared with our own
    patch_embedN, vit_posN, vit_blockB_N, vitN: in the tower, from pixelN
    ln_kvN, resampler_kposN, resampler_attnN, resamplerN [S, D]: in the resampler
    input_ids [B, T], image_boundR [n, 2] the tokens of row R that are an image's; inputs_embeds [B, T, D],
    hiddenL [B, T, D], logits [B, T, V] or logits_tail, the last rows; greedy_ids [B, N], the tokens that follow

A case whose name ends in _quirk shows a fault of the original, and is skipped.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.vision.config import VisionConfig

QUIRK = "_quirk"
LEVELS = 2  # of 255: what Pillow below 13 may round otherwise than the references, which were made with 13
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class VisionBackend:
    """The functions that a backend supplies. Arrays are numpy arrays, and results are float32."""

    stages: Callable[[Any, np.ndarray], dict[str, np.ndarray]]
    """model, pixels [1, 3, H, W] -> the stages of tower and resampler by name, without their number"""
    seen: Callable[[Any, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    """model, ids [B, T] (image tokens: the vocabulary's size), features [B, T, D] -> inputs_embeds, hiddenL, logits"""


@dataclass(frozen=True)
class Compared:
    """Two arrays of a case. ``allowed``: the largest difference, where it is no rounding of sums."""

    case: str
    ours: np.ndarray
    expected: np.ndarray
    allowed: float | None = None


@dataclass(frozen=True)
class Following:
    """The tokens of a reference [B, N], and the logits [B, N, V] from which we would choose them."""

    case: str
    tokens: np.ndarray
    logits: np.ndarray


def has_images(arrays: Arrays) -> bool:
    """Whether a reference is of a model that sees."""
    return any(re.fullmatch(r"[^.]+\.(pixel\d+|input_ids)", key) for key in arrays)


def compared(arrays: Arrays, config: ModelConfig, backend: VisionBackend, model: Any) -> Iterator[Compared | Following]:
    """Yields what is to be compared. Raises `InputError` where an array of the reference does not fit the model."""
    if config.vision is None:
        raise InputError("the reference is of a model that sees, and the model does not; take its own reference.")
    for case in dict.fromkeys(key.partition(".")[0] for key in arrays):
        own = {key.partition(".")[2]: array for key, array in arrays.items() if key.partition(".")[0] == case}
        if case.endswith(QUIRK):
            continue
        yield from _pixels(case, own, config.vision)
        tokens = []
        for number in range(_count(own, "pixel")):
            stages = backend.stages(model, own[f"pixel{number}"][None].astype(np.float32))
            tokens.append(stages["resampler"])
            for name, ours in stages.items():
                if (expected := own.get(f"{name}{number}")) is not None:
                    yield Compared(f"{case}.{name}{number}", ours, _fitting(case, name, expected, ours.shape))
        if "input_ids" in own:
            yield from _decoded(case, own, config, backend, model, tokens)


def _pixels(case: str, own: Arrays, vision: VisionConfig) -> Iterator[Compared]:
    """Our pixels of the images."""
    import PIL
    from PIL import Image

    from minicpm_data.images.processing import process

    if case.endswith("slice_mode_off") or "image0" not in own or "pixel0" not in own:
        return
    images = [process(Image.fromarray(own[f"image{i}"]), vision) for i in range(_count(own, "image"))]
    ours = [image.pixels(part) for image in images for part in range(len(image.parts))]
    exact = int(PIL.__version__.partition(".")[0]) >= 13
    step = LEVELS * 1.01 / 255 / min(vision.mean_std[1])
    for number, pixels in enumerate(ours):
        expected = _fitting(case, "pixel", own.get(f"pixel{number}", np.zeros(0)), pixels.shape)
        yield Compared(f"{case}.pixel{number}", pixels, expected, 1e-6 if exact else step)


def _decoded(
    case: str, own: Arrays, config: ModelConfig, backend: VisionBackend, model: Any, tokens: list[np.ndarray]
) -> Iterator[Compared | Following]:
    """The decoder's stages, with the image tokens of our own tower."""
    ids = own["input_ids"].astype(np.int32)
    if ids.ndim != 2 or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(f"{case}.input_ids are no ids [batch, tokens] of this model; take its own reference.")
    following = own.get("greedy_ids")
    whole = ids if following is None else np.concatenate([ids, following[:, :-1].astype(np.int32)], axis=1)
    features = np.zeros((*whole.shape, config.hidden_size), np.float32)
    waiting = iter(tokens)
    for row in range(len(ids)):
        for begin, end in own.get(f"image_bound{row}", np.zeros((0, 2), int)):
            image = next(waiting, np.zeros((0, 0)))
            if len(image) != end - begin:
                raise InputError(f"{case}.image_bound{row} does not fit the images; take the model's own reference.")
            features[row, begin:end], whole[row, begin:end] = image, config.vocab_size
    found = backend.seen(model, whole, features)
    length = ids.shape[1]
    for name, ours in found.items():
        if (expected := own.get(name)) is not None:
            yield Compared(f"{case}.{name}", ours[:, :length], _fitting(case, name, expected, ours[:, :length].shape))
    if (tail := own.get("logits_tail")) is not None:
        rows = tail.shape[-2]
        yield Compared(f"{case}.logits_tail", found["logits"][:, length - rows : length], tail)
    if following is not None:
        yield Following(f"{case}.greedy_ids", following.astype(np.int64), found["logits"][:, length - 1 :])


def _count(own: Arrays, name: str) -> int:
    """How many numbered arrays of this name there are."""
    number = 0
    while f"{name}{number}" in own:
        number += 1
    return number


def _fitting(case: str, name: str, expected: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reference's array in our shape."""
    if expected.size != np.prod(shape):
        raise InputError(
            f"{case}.{name} has the shape {list(expected.shape)}, and the model gives {list(shape)}; take its own "
            "reference."
        )
    return expected.reshape(shape)
