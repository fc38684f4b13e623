"""The vision config: the numbers of MiniCPM-V 1.0's, MiniCPM-V 2.0's and OmniLMM-12B's tower, resampler and slices.

MiniCPM-V 1.0 and 2.0 have the same tensors, ``model_type`` and ``architectures``. A config without ``slice_mode``,
``max_slice_nums`` and ``scale_resolution`` is 1.0's: its images are squashed to one square, and its resampler
interpolates a table of positions.
Source: configuration_minicpm.py and modeling_minicpmv.py of openbmb/MiniCPM-V and MiniCPM-V-2, omnilmm/ of
OpenBMB/MiniCPM-V, and the towers' definitions in timm 0.9.10.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weights_io.errors import InputError, listed, short, shown

Refuse = Callable[[str], InputError]  # makes the error of a sentence
VARIANTS = ("minicpm-v-1", "minicpm-v-2", "omnilmm")
SLICED = ("slice_mode", "max_slice_nums", "scale_resolution")  # keys of MiniCPM-V 2.0 alone
# Per model_type: the key of the tower's name in timm, that name, and the key of the number of queries.
NAMES = {
    "minicpmv": ("vision_encoder", "vit_so400m_patch14_siglip_384", "query_num"),
    "omnilmm": ("mm_vision_tower", "eva02_enormous_patch14_clip_224", "num_query"),
}
# Arguments of timm's models. ``depth`` counts the last block, which is dropped.
SIGLIP = {"img_size": 384, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}
EVA = {"img_size": 224, "embed_dim": 1792, "depth": 64, "num_heads": 16, "mlp_ratio": 15360 / 1792}
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PATCH_SIZE = 14  # pixels
RESAMPLER_HEAD_DIM = 128
LAYER_NORM_EPS = 1e-6  # of the towers and of the resampler
WINDOW = 4096  # tokens of Mistral's sliding window
MOST_BLOCKS = 1000
MOST = 2**31 - 1
# Keys that change no number here: how the original was trained, and where it puts its tokens.
NOTES: dict[str, dict[str, tuple[bool | None, ...]]] = {
    "minicpmv": {"mm_use_im_start_end": (True, None)},
    "omnilmm": {
        "mm_use_im_start_end": (True, None),
        "use_mm_proj": (True, None),
        "tune_clip": (True, False, None),
        "tune_mm_mlp_adapter": (True, False, None),
        "freeze_mm_mlp_adapter": (True, False, None),
    },
}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a tower and a resampler, and how an image becomes pixels."""

    variant: str  # of `VARIANTS`
    hidden_size: int  # width of the tower
    intermediate_size: int
    num_hidden_layers: int  # blocks that are stored and run: one less than timm's depth
    num_attention_heads: int
    patch_size: int  # pixels
    image_size: int  # pixels of the square that images are squashed to where they are not sliced
    position_grid: int  # rows and columns of the stored table of positions
    num_queries: int  # tokens of one image or slice
    text_hidden_size: int  # width of the decoder
    slice_mode: bool = False  # whether large images are cut into slices (MiniCPM-V 2.0)
    max_slices: int = 9
    scale_resolution: int = 448  # pixels: a slice has about the area of this square

    @property
    def tower(self) -> str:
        """siglip: pre-norm, no class token. eva: post-norm, with a class token, no bias of the keys."""
        return "eva" if self.variant == "omnilmm" else "siglip"

    @property
    def class_tokens(self) -> int:
        """Class tokens before the patches: one in EVA."""
        return int(self.tower == "eva")

    @property
    def adaptive(self) -> bool:
        """Whether the resampler's key positions are those of the image's own grid (MiniCPM-V 2.0)."""
        return self.variant == "minicpm-v-2"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue, as parts of 255."""
        return OPENAI_CLIP if self.variant == "omnilmm" else INCEPTION

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def positions(self) -> int:
        """Rows of the stored table of positions, the class token's included."""
        return self.position_grid**2 + self.class_tokens

    @property
    def resampler_heads(self) -> int:
        return self.text_hidden_size // RESAMPLER_HEAD_DIM

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``config.json`` that `read_vision` reads back as this config."""
        model_type = "omnilmm" if self.variant == "omnilmm" else "minicpmv"
        encoder, name, queries = NAMES[model_type]
        ratio = (self.intermediate_size + 0.5) / self.hidden_size  # timm cuts the product to a whole number
        raw: dict[str, Any] = {
            encoder: name,
            queries: self.num_queries,
            "image_size": self.image_size,
            "timm_overrides": {
                "img_size": self.position_grid * self.patch_size,
                "embed_dim": self.hidden_size,
                "depth": self.num_hidden_layers + 1,
                "num_heads": self.num_attention_heads,
                "mlp_ratio": ratio,
            },
        }
        if self.adaptive:
            raw |= {"patch_size": self.patch_size, "slice_mode": self.slice_mode, "max_slice_nums": self.max_slices}
            raw |= {"scale_resolution": self.scale_resolution}
        return raw | ({"drop_vision_last_layer": True} if model_type == "minicpmv" else {})


def vision_keys(model_type: str) -> frozenset[str]:
    """The keys of ``config.json`` that `read_vision` understands; none for a model of text."""
    if model_type not in NAMES:
        return frozenset()
    encoder, _, queries = NAMES[model_type]
    own = ("drop_vision_last_layer", "patch_size", *SLICED) if model_type == "minicpmv" else ("sliding_window",)
    return frozenset({encoder, queries, "image_size", "timm_overrides", *own, *NOTES[model_type]})


def read_vision(raw: Mapping[str, Any], model_type: str, text_hidden_size: int, refuse: Refuse) -> VisionConfig | None:
    """The vision config of a parsed ``config.json``; None for a model of text.

    Arguments:
        raw: the contents.
        model_type: of the model.
        text_hidden_size: width of its decoder.
        refuse: makes the error of a sentence.

    Raises:
        InputError: a value is wrong or not supported.
    """
    if model_type not in NAMES:
        return None
    for key, allowed in NOTES[model_type].items():
        if raw.get(key) not in allowed:
            raise refuse(f"{key} is {shown(raw[key])}, which no released model has; it must be {shown(allowed[0])}.")
    encoder, tower, queries = NAMES[model_type]
    found = raw.get(encoder, tower)
    if not isinstance(found, str) or found.partition(".")[0] != tower:
        raise refuse(f"{encoder} is {shown(found)}; the only supported tower is {tower}.")
    depth_kept = raw.get("drop_vision_last_layer", True) if model_type == "minicpmv" else True
    if depth_kept is not True and depth_kept is not False:
        raise refuse(f"drop_vision_last_layer is {shown(depth_kept)}; it must be true or false.")
    timm = _timm(raw, dict(SIGLIP if model_type == "minicpmv" else EVA), refuse)
    sliced = any(raw.get(key) is not None for key in SLICED)
    variant = "omnilmm" if model_type == "omnilmm" else "minicpm-v-2" if sliced else "minicpm-v-1"
    slice_mode = raw.get("slice_mode", sliced)
    if not isinstance(slice_mode, bool):
        raise refuse(f"slice_mode is {shown(slice_mode)}; it must be true or false.")
    config = VisionConfig(
        variant=variant,
        hidden_size=timm["embed_dim"],
        intermediate_size=int(timm["embed_dim"] * timm["mlp_ratio"]),
        num_hidden_layers=timm["depth"] - depth_kept,
        num_attention_heads=timm["num_heads"],
        patch_size=_count(raw, "patch_size", PATCH_SIZE, refuse),
        image_size=_count(raw, "image_size", 448, refuse),
        position_grid=timm["img_size"] // PATCH_SIZE,
        num_queries=_count(raw, queries, 64, refuse),
        text_hidden_size=text_hidden_size,
        slice_mode=slice_mode,
        max_slices=_count(raw, "max_slice_nums", 9, refuse),
        scale_resolution=_count(raw, "scale_resolution", 448, refuse),
    )
    _check(config, queries, refuse)
    return config


def within_window(raw: Mapping[str, Any], model_type: str, positions: int, refuse: Refuse) -> int:
    """The positions of OmniLMM's Mistral that its sliding window covers, in which attention is full; of any other model
    all ``positions``."""
    if model_type != "omnilmm" or raw.get("sliding_window", WINDOW) is None:
        return positions
    return min(positions, _count(raw, "sliding_window", WINDOW, refuse))


def _check(config: VisionConfig, queries: str, refuse: Refuse) -> None:
    if config.text_hidden_size % RESAMPLER_HEAD_DIM:
        raise refuse(
            f"hidden_size is {config.text_hidden_size}, and the resampler's heads have {RESAMPLER_HEAD_DIM} numbers; "
            "it must be a multiple of that."
        )
    if config.hidden_size % config.num_attention_heads:
        raise refuse("timm_overrides has an embed_dim that is not a multiple of num_heads; correct one of the two.")
    if math.isqrt(config.num_queries) ** 2 != config.num_queries:
        raise refuse(f"{queries} is {config.num_queries}; the queries are a square, such as 64.")
    if config.patch_size != PATCH_SIZE:
        raise refuse(f"patch_size is {config.patch_size}; the tower's patches have {PATCH_SIZE} pixels.")
    for key, size in (("image_size", config.image_size), ("scale_resolution", config.scale_resolution)):
        if size < PATCH_SIZE:
            raise refuse(f"{key} is {size}; it must be at least a patch of {PATCH_SIZE} pixels.")
    if not config.adaptive and config.image_size % PATCH_SIZE:
        raise refuse(f"image_size is {config.image_size}; it must be a multiple of the patch of {PATCH_SIZE} pixels.")
    if config.num_hidden_layers < 1:
        raise refuse("timm_overrides has a depth of 1, and the last block is dropped; give more blocks.")


def _timm(raw: Mapping[str, Any], defaults: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    """The arguments of the tower: timm's own, and those that ``timm_overrides`` states (small models for tests)."""
    given = raw.get("timm_overrides")
    if given is None:
        return defaults
    if not isinstance(given, dict):
        raise refuse(f"timm_overrides is {shown(given)}; it must be an object.")
    if unknown := sorted(given.keys() - defaults.keys()):
        raise refuse(f"timm_overrides has {listed(unknown)}, not understood; it may have {', '.join(defaults)}.")
    for key, value in given.items():
        whole = key != "mlp_ratio"
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not 0 < value <= (MOST_BLOCKS if key == "depth" else MOST):
            raise refuse(f"timm_overrides {short(key)} is {shown(value)}; it must be a positive number.")
    if given.get("img_size", PATCH_SIZE) % PATCH_SIZE:
        raise refuse(f"timm_overrides img_size is {given['img_size']}; it must be a multiple of {PATCH_SIZE}.")
    return defaults | given


def _count(raw: Mapping[str, Any], key: str, default: int, refuse: Refuse) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise refuse(f"{key} is {shown(value)}; it must be a positive whole number.")
    return value
