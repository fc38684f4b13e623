"""The images of a training batch: tower and resampler run inside the loss, so that they are trained too.

Dims: B rows, T tokens, P parts of one size, S tokens of a part, D hidden.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_data.datasets.images import sizes_of
from minicpm_data.images.conversation import IMAGE
from minicpm_data.training.objectives import Batch
from minicpm_jax.layers.vision.tower import grid_of
from minicpm_jax.model import Model


def with_images(model: Model, batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T D"] | None]:
    """The ids and the image tokens of a batch (`minicpm_data.datasets.images.image_arrays`), as `Decoder.embed` takes
    them; None for a batch of text."""
    ids, sizes = batch["ids"], sizes_of(batch)
    if not sizes:
        return ids, None
    width, dtype = model.config.hidden_size, model.model.norm.weight.dtype
    flat = jnp.zeros((ids.size, width), dtype)
    for size in sizes:
        pixels, places = batch[f"pixels_{size}"].astype(dtype), batch[f"places_{size}"]
        tokens = model.resampler(model.vpm(pixels), grid_of(pixels.shape, model.vpm.config.patch_size))
        flat = flat.at[places.reshape(-1)].set(tokens.reshape(-1, width).astype(dtype), mode="drop")  # less padding
    return jnp.where(ids == IMAGE, model.config.vocab_size, ids), flat.reshape(*ids.shape, width)
