"""The stages of a model that sees, from pixels to logits, as `minicpm_data.diagnostics.vision_parity` compares them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_jax.generation.teacher_forcing import to_float32

if TYPE_CHECKING:
    from minicpm_jax.model import Model


def stages(model: "Model", pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The stages of tower and resampler, of pixels [1, 3, H, W]."""
    import jax

    return {name: to_float32(x) for name, x in jax.jit(_stages)(model, pixels).items()}


def seen(model: "Model", ids: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    """The stages of the decoder, of ids [B, T] and image tokens [B, T, D]."""
    import jax

    return {name: to_float32(x) for name, x in jax.jit(_seen)(model, ids, features).items()}


def _stages(model: Any, pixels: Any) -> dict[str, Any]:
    import jax

    from minicpm_jax.layers.vision.tower import grid_of

    tower, resampler = model.vpm, model.resampler
    grid, pixels = grid_of(pixels.shape, tower.config.patch_size), pixels.astype(model.model.norm.weight.dtype)
    found = {"patch_embed": tower.patch_embed(pixels), "vit_pos": tower.positions(grid)}
    x, after = jax.lax.scan(lambda x, block: (block(x),) * 2, tower.embed(pixels), tower.blocks)
    found |= {f"vit_block{i}_": each for i, each in enumerate(after)} | {"vit": tower.norm(x)}
    patches = found["vit"][:, tower.config.class_tokens :]
    kv = resampler.ln_kv(patches if resampler.kv_proj is None else resampler.kv_proj(patches))
    kpos = resampler.key_positions(grid).astype(x.dtype)
    attended = resampler.attend(kv, kpos)
    found |= {"ln_kv": kv, "resampler_kpos": kpos, "resampler_attn": attended}
    return {**found, "resampler": resampler(patches, grid)[0]}


def _seen(model: Any, ids: Any, features: Any) -> dict[str, Any]:
    import jax

    from minicpm_jax.layers.rope import positions_of

    positions = positions_of(model.config, ids.shape)
    x = model.model.embed(ids, features)
    last, after = jax.lax.scan(lambda x, layer: (layer(x, positions)[0],) * 2, x, model.model.layers)
    normed = model.model.norm(last)
    states = [x, *after[:-1], normed]
    return {"inputs_embeds": x, **{f"hidden{i}": each for i, each in enumerate(states)}, "logits": model.head(normed)}
