"""The vision config: the numbers of MiniCPM-V 1.0's, MiniCPM-V 2.0's and OmniLMM-12B's tower, resampler and slices.

MiniCPM-V 1.0 and 2.0 have the same tensors, ``model_type`` and ``architectures``. A config without ``slice_mode`` and
``max_slice_nums`` is 1.0's: its pictures are squashed to one square, and its resampler interpolates a table of positions.
"""

from dataclasses import dataclass

VARIANTS = ("minicpm-v-1", "minicpm-v-2", "omnilmm")
# Of timm: vit_so400m_patch14_siglip_384 and eva02_enormous_patch14_clip_224.
TOWERS = {
    "minicpm-v-1": "siglip",
    "minicpm-v-2": "siglip",
    "omnilmm": "eva",
}
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RESAMPLER_HEAD_DIM = 128
LAYER_NORM_EPS = 1e-6  # of the towers and of the resampler


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a tower and a resampler, and how a picture becomes pixels."""

    variant: str  # of `VARIANTS`
    hidden_size: int  # C: width of the tower
    intermediate_size: int  # M
    num_hidden_layers: int  # blocks that are stored and run: one less than timm's depth
    num_attention_heads: int
    patch_size: int  # pixels
    image_size: int  # pixels of the square that pictures are squashed to, and of the grid where they are not sliced
    position_grid: int  # rows and columns of the stored table of positions
    num_queries: int  # Q: tokens of one picture or slice
    text_hidden_size: int  # D: width of the decoder
    slice_mode: bool = False  # whether large pictures are cut into slices (MiniCPM-V 2.0)
    max_slices: int = 9
    scale_resolution: int = 448  # pixels: a slice has about the area of this square

    @property
    def tower(self) -> str:
        """siglip: pre-norm, no class token. eva: post-norm, with a class token, no bias of the keys."""
        return TOWERS[self.variant]

    @property
    def class_token(self) -> bool:
        return self.tower == "eva"

    @property
    def adaptive(self) -> bool:
        """Whether the resampler's key positions are those of the picture's own grid (MiniCPM-V 2.0)."""
        return self.variant == "minicpm-v-2"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue, as parts of 255."""
        return OPENAI_CLIP if self.variant == "omnilmm" else INCEPTION

    @property
    def resampler_heads(self) -> int:
        return self.text_hidden_size // RESAMPLER_HEAD_DIM
