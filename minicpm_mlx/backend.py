"""What commands shared by both backends ask of this package."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minicpm_data.generation.api import Backend, Generator

if TYPE_CHECKING:
    import numpy as np

    from minicpm_mlx.training.trainer import Trainer
    from weights_io.checkpoint import Checkpoint


def trainer(model: Any, options: Any, source: "Checkpoint | None" = None) -> "Trainer":
    """What the training loop works with."""
    from minicpm_mlx.training.trainer import Trainer  # only now, so that --help answers at once

    return Trainer(model, options, source)


def _stream_tokens(*arguments: Any) -> "Iterator[np.ndarray]":
    from minicpm_mlx.generation.decoding import stream_tokens  # only now, so that --help answers at once

    return stream_tokens(*arguments)


def _stream_speculated(*arguments: Any) -> Iterator[tuple[int, bool]]:
    from minicpm_mlx.generation.speculation import stream_speculated

    return stream_speculated(*arguments)


def backend() -> Backend:
    """What the command lines ask of this package."""
    from minicpm_mlx import device
    from minicpm_mlx.generation.sparsity import activation_sparsity
    from minicpm_mlx.loading import load

    return Backend(load, generator, device, device.for_decoding, activation_sparsity)


generator = Generator(_stream_tokens, _stream_speculated)
