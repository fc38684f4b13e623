"""What the comparisons ask of the two backends, in numpy and lists."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BACKENDS = ("minicpm_jax", "minicpm_mlx")
# Float32 against float32: at most 4e-5 was measured, of logits up to 30; a wrong constant moves them by 0.01 and more.
TOLERANCE = 1e-4


def load(backend: str, folder: Path, dtype: str = "float32"):
    return importlib.import_module(backend).load(folder, dtype=dtype)[0]


def logits(model, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """[B, T, V] for ids [B, T]."""
    return np.asarray(model(ids) if attention_mask is None else model(ids, attention_mask=attention_mask))


def greedy(backend: str, model, prompt: Sequence[int], count: int) -> list[int]:
    """The first ``count`` new ids; fewer where the model says EOS, which is the last then."""
    stream = importlib.import_module(backend).stream_generate
    return [r.token for r in stream(model, None, list(map(int, prompt)), max_tokens=count, temperature=0.0)]


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """``ids`` as far as `greedy` gives them: an id that ends an answer is the last."""
    ids = list(map(int, ids))
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def close(actual, expected, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)
