"""The stages of a model that sees, from pixels to logits, as `minicpm_data.diagnostics.vision_parity` compares them."""

from typing import TYPE_CHECKING

import numpy as np

from minicpm_mlx.generation.teacher_forcing import to_float32

if TYPE_CHECKING:
    from minicpm_mlx.model import Model


def stages(model: "Model", pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The stages of tower and resampler, of pixels [1, 3, H, W]."""
    import mlx.core as mx

    from minicpm_mlx.layers.vision.tower import grid_of

    tower, resampler = model.vpm, model.resampler
    assert tower is not None and resampler is not None
    grid = grid_of(pixels.shape, tower.config.patch_size)
    x = mx.array(pixels).astype(model.model.norm.weight.dtype)
    found = {"patch_embed": tower.patch_embed(x), "vit_pos": tower.positions(grid)}
    x = tower.embed(x)
    for i, block in enumerate(tower.blocks):
        found[f"vit_block{i}_"] = x = block(x)
    found["vit"] = tower.norm(x)
    patches = found["vit"][:, tower.config.class_tokens :]
    kv = resampler.ln_kv(resampler.kv_proj(patches) if "kv_proj" in resampler else patches)
    kpos = resampler.key_positions(grid).astype(x.dtype)
    attended = resampler.attend(kv, kpos)
    found |= {"ln_kv": kv, "resampler_kpos": kpos, "resampler_attn": attended}
    return {name: to_float32(x) for name, x in {**found, "resampler": resampler(patches, grid)[0]}.items()}


def seen(model: "Model", ids: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    """The stages of the decoder, of ids [B, T] and image tokens [B, T, D]."""
    import mlx.core as mx

    from minicpm_mlx.layers.rope import positions_of

    given = mx.array(ids)
    positions = positions_of(model.config, given)
    states = [model.model.embed(given, mx.array(features))]
    for layer in model.layers:
        states.append(layer(states[-1], positions)[0])
    embeds, states[-1] = states[0], model.model.norm(states[-1])
    found = {"inputs_embeds": embeds, **{f"hidden{i}": x for i, x in enumerate(states)}}
    return {name: to_float32(x) for name, x in {**found, "logits": model.head(states[-1])}.items()}
