"""The images of a training batch: tower and resampler run inside the loss, so that they are trained too.

Dims: B rows, T tokens, P parts of one size, S tokens of a part, D hidden.
"""

import mlx.core as mx

from minicpm_data.datasets.images import sizes_of
from minicpm_data.images.conversation import IMAGE
from minicpm_data.training.objectives import Batch
from minicpm_mlx.layers.vision.tower import grid_of
from minicpm_mlx.model import Model


def with_images(model: Model, batch: Batch) -> tuple[mx.array, mx.array | None]:
    """The ids [B, T] and the image tokens [B, T, D] of a batch (`minicpm_data.datasets.images.image_arrays`), as
    `Decoder.embed` takes them; None for a batch of text."""
    ids, sizes = batch["ids"], sizes_of(batch)
    if not sizes:
        return ids, None
    assert model.vpm is not None and model.resampler is not None
    width, dtype = model.config.hidden_size, model.model.norm.weight.dtype
    flat = mx.zeros((ids.size + 1, width), dtype)  # the last row takes the parts that only fill up
    for size in sizes:
        pixels, places = batch[f"pixels_{size}"].astype(dtype), batch[f"places_{size}"]
        tokens = model.resampler(model.vpm(pixels), grid_of(pixels.shape, model.vpm.config.patch_size))
        flat[places.reshape(-1)] = tokens.reshape(-1, width).astype(dtype)
    return mx.where(ids == IMAGE, model.config.vocab_size, ids), flat[:-1].reshape(*ids.shape, width)
