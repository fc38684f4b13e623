"""Text from a prompt.

    python -m minicpm_mlx.generate --model openbmb/MiniCPM-2B-sft-bf16 --prompt "What is the capital of China?"

``--model`` left out is the built-in model. The prompt is put into the checkpoint's chat template once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minicpm_data.generation import Backend, Generator

if TYPE_CHECKING:
    import numpy as np


def _stream_tokens(*arguments: Any) -> "Iterator[np.ndarray]":
    from minicpm_mlx.decoding import stream_tokens  # only now, so that --help answers at once

    return stream_tokens(*arguments)


def _stream_speculated(*arguments: Any) -> Iterator[tuple[int, bool]]:
    from minicpm_mlx.speculation import stream_speculated

    return stream_speculated(*arguments)


def backend() -> Backend:
    """What the command lines ask of this package."""
    from minicpm_mlx import device
    from minicpm_mlx.loading import load
    from minicpm_mlx.sparsity import activation_sparsity

    return Backend(load, generator, device, activation_sparsity)


generator = Generator(_stream_tokens, _stream_speculated)
stream_generate = generator.stream_generate
generate = generator.generate
batch_generate = generator.batch_generate

if __name__ == "__main__":
    from minicpm_data import commands

    commands.run_generate(backend, "python -m minicpm_mlx.generate")
