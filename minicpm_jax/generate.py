"""Text from a prompt.

    python -m minicpm_jax.generate --model openbmb/MiniCPM-2B-sft-bf16 --prompt "What is the capital of China?"

``--model`` left out is the built-in model. The prompt is put into the checkpoint's chat template once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpm_data.commands import GenerateOptions
from minicpm_data.generation import Backend, Generator
from minicpm_jax.placement import Placement, Serving

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Options(Serving, Placement, GenerateOptions):
    pass


def _stream_tokens(*arguments: Any) -> "Iterator[np.ndarray]":
    from minicpm_jax.decoding import stream_tokens  # only now, so that --help answers at once

    return stream_tokens(*arguments)


def _stream_speculated(*arguments: Any) -> Iterator[tuple[int, bool]]:
    from minicpm_jax.speculation import stream_speculated

    return stream_speculated(*arguments)


def backend() -> Backend:
    """What the command lines ask of this package."""
    from minicpm_jax import device
    from minicpm_jax.loading import load
    from minicpm_jax.sparsity import activation_sparsity

    return Backend(load, generator, device, activation_sparsity)


generator = Generator(_stream_tokens, _stream_speculated)
stream_generate = generator.stream_generate
generate = generator.generate
batch_generate = generator.batch_generate

if __name__ == "__main__":
    from minicpm_data import commands

    commands.run_generate(backend, "python -m minicpm_jax.generate", Options)
