"""The interface between this package and the commands shared by both backends."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from minicpm_data.generation.api import Backend, Generator, Warming
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.speculation import Speculation
from weights_io.progress import waiting

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.generation.prompt_cache import CachedPrompt, PromptCache
    from minicpm_data.training.options import FinetuneOptions, PretrainOptions
    from minicpm_mlx.generation.engine import Engine
    from minicpm_mlx.model import Model
    from minicpm_mlx.training.pretraining import Pretrainer
    from minicpm_mlx.training.trainer import Trainer
    from weights_io.checkpoint import Checkpoint


def trainer(model: "Model", options: "FinetuneOptions", source: "Checkpoint") -> "Trainer":
    """The trainer of fine-tuning."""
    from minicpm_mlx.training.trainer import Trainer  # late import: --help stays fast

    return Trainer(model, options, source)


def pretrainer(options: "PretrainOptions", bos_token_id: int) -> "Pretrainer":
    """The trainer of pretraining."""
    from minicpm_mlx.training.pretraining import Pretrainer

    return Pretrainer(options, bos_token_id)


class Decoding:
    """How this package generates; each part is imported on its first use."""

    def check(self, model: "Model", request: GenerationRequest) -> None:
        from minicpm_mlx.generation.decoding import check

        check(model, request)

    def stream_tokens(self, model: "Model", request: GenerationRequest) -> "Iterator[np.ndarray]":
        from minicpm_mlx.generation.decoding import stream_tokens

        return stream_tokens(model, request)

    def stream_speculated(
        self, model: "Model", request: GenerationRequest, speculation: "Speculation[Model]"
    ) -> Iterator[tuple[int, bool]]:
        from minicpm_mlx.generation.speculation import stream_speculated

        return stream_speculated(model, request, speculation)

    def cached_prompt(self, model: "Model", request: GenerationRequest) -> "CachedPrompt":
        from minicpm_mlx.generation.decoding import cached_prompt

        return cached_prompt(model, request)

    def warming(self, model: "Model") -> "Warming[Model]":
        return Warming()

    def engine(
        self,
        model: "Model",
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
        speculation: "Speculation[Model] | None" = None,
        prompt_cache: "PromptCache | None" = None,
    ) -> "Engine":
        from minicpm_mlx.generation.engine import Engine

        return Engine(model, slots, context, cache_options, cache_tokens, speculation, prompt_cache)


def backend() -> "Backend[Model]":
    """The backend for the command lines."""
    with waiting("starting MLX"):
        from minicpm_mlx import device
        from minicpm_mlx.generation.sparsity import activation_sparsity
        from minicpm_mlx.loading import load

    return Backend(load, generator, device, device.for_decoding, activation_sparsity)


generator: "Generator[Model]" = Generator(Decoding())
