"""Shared code of the notebooks for TPUs: checks of the runtime, loading over all devices, and speed."""

import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm_data.cli import notebook as shared
from minicpm_data.cli.notebook import accept_cpu
from minicpm_data.cli.notebook import fresh as fresh  # for the notebooks
from minicpm_data.cli.notebook import of_a_clone as of_a_clone
from minicpm_data.cli.notebook import resume as resume
from minicpm_data.cli.notebook import run as run
from minicpm_data.cli.notebook import run_folder as run_folder
from minicpm_data.cli.notebook import take_token as take_token
from minicpm_jax.parallel import chips
from weights_io.memory import size
from weights_io.parameters import parameters

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from minicpm_jax.model import Model

# Seconds to compile two programs (4 s and 2 s for a v5e by `minicpm_jax.fit`, docs/fit.md) and some small ones.
COMPILING = 10


def check_runtime() -> None:
    """Print the devices that JAX runs on. Raises `InputError` if that is a CPU that was not requested."""
    for line in runtime():
        print(line)


def runtime() -> Iterator[str]:
    """Versions, devices and their memory."""
    import jax

    from minicpm_jax import device

    libtpu = importlib.util.find_spec("libtpu") is not None
    platform = chips.platform()
    yield f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu') if libtpu else 'not installed'}"
    yield device.description()
    if platform == "cpu":
        remedy = "in Colab choose Runtime > Change runtime type > TPU"
        yield accept_cpu("a TPU", remedy if libtpu else f"{remedy}; elsewhere pip install 'minicpm-jax-mlx[tpu]'")
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        yield f"{size(stats['bytes_limit'])} of memory on each"


def check_room(model: str, *copies: str | None) -> None:
    """`minicpm_data.cli.notebook.check_room` over all devices."""
    import jax

    from minicpm_jax import device

    free = device.free_memory()
    devices = 1 if chips.platform() == "cpu" else jax.device_count()  # devices on a CPU share its memory
    shared.check_room(model, copies, device.usual_dtype, None if free is None else free * devices, COMPILING)


def load(model: str, dtype: str | None = None) -> "tuple[Model, Tokenizer | None]":
    """Load a model over all devices, sharded as `minicpm_jax.fit` compiles it (`sharding.default_mesh`): heads
    first, then experts or weights."""
    from minicpm_jax import device
    from minicpm_jax.loading import load as load_model
    from minicpm_jax.parallel.sharding import serving_mesh
    from weights_io.checkpoint import open_model

    checkpoint = open_model(model)
    mesh = serving_mesh(checkpoint.config)
    print(f"{model} on {device.description()}" + ("" if mesh is None else f", {dict(mesh.shape)}"))
    return load_model(checkpoint, dtype or device.preferred_dtype, mesh=mesh)


def shares(model: "Model") -> Iterator[str]:
    """One line per array of a model: name, dtype, shape, and the shard that each device holds."""
    for parameter in parameters(model.config):
        weight = functools.reduce(getattr, parameter.name.split("."), model)[...]
        devices, part = len(weight.sharding.device_set), weight.sharding.shard_shape(weight.shape)
        held = "whole" if part == weight.shape else str(part)
        yield f"{parameter.name:44} {weight.dtype.name} {weight.shape!s:20} {held} on each of {devices}"


@dataclass(frozen=True)
class Speed:
    """Decoding speed. The floor is the time to read a step's weights once at the bandwidth of all chips."""

    rows: int
    tokens_per_second: float  # of all rows together
    bytes_read: int  # bytes of weights per step, on all chips
    floor: float | None  # seconds per step; None: unknown bandwidth

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        text = f"{rows}: {self.tokens_per_second:,.1f} tokens/s, {size(self.bytes_read)} of weights a step"
        if self.floor is None:
            return f"{text}; the bandwidth of this device is not known"
        return f"{text}: {self.floor * self.tokens_per_second / self.rows:.0%} of what the bandwidth allows"


def decoding_speed(model: "Model", rows: int = 1, prompt_tokens: int = 32, new_tokens: int = 128) -> Speed:
    """The speed of ``new_tokens`` greedy tokens per row after the first one, in a second run (the first compiles)."""
    import jax
    import numpy as np

    from minicpm_data.generation.request import GenerationRequest, PromptIds
    from minicpm_jax.generation.decoding import stream_tokens
    from minicpm_jax.parallel.chips import chip_of

    vocab_size = model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab_size, (rows, prompt_tokens))
    request = GenerationRequest(
        tuple(PromptIds(row, vocab_size) for row in prompts), new_tokens + 1
    )  # without end-of-text ids
    seconds = 0.0
    for _ in range(2):
        steps = stream_tokens(model, request)
        next(steps)
        began = time.perf_counter()
        count = sum(1 for _ in steps)
        seconds = time.perf_counter() - began
    chip, read = chip_of(jax.devices()[0].device_kind), bytes_read(model, rows)
    here = model.model.embed_tokens.weight[...].sharding.device_set
    # The cores of a chip have the same coordinates.
    floor = None if chip is None else read / (chip.bandwidth * len({tuple(device.coords) for device in here}))
    return Speed(rows, rows * count / seconds, read, floor)


def bytes_read(model: "Model", rows: int) -> int:
    """Bytes of weights that a decode step reads at least. An untied embedding is only looked up, and at most as many
    experts are read as the rows can choose."""
    import jax

    config = model.config
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name, held = jax.tree_util.keystr(path), leaf.nbytes
        if "embed_tokens" in name and not config.tie_word_embeddings:
            held = 0
        if ".experts" in name:
            held = held * min(config.num_experts, rows * config.num_experts_per_tok) // config.num_experts
        total += held
    return total
