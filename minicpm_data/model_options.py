"""The options that name a model, and loading a model from them.

A command opens its checkpoint once: in `load_model`, or earlier in `open_source` if it needs the config or the
tokenizer before the weights.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from minicpm_data.generation.api import Backend
from minicpm_data.generation.request import ModelT
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.checkpoint import Checkpoint
    from weights_io.config import ModelConfig


class OneDevice:
    """Options without a mesh. A backend with several devices overrides these methods."""

    def check_placement(self) -> None:
        """Raises `InputError` where `placement` would fail."""

    def placement(self) -> dict[str, Any]:
        """The arguments of a backend's ``load`` that concern devices."""
        return {}


@dataclass(frozen=True)
class SourceOptions(OneDevice):
    model: str | None = None
    """Model folder, GGUF file, hub id (owner/name, owner/name/folder) or short name; default: the built-in model."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of weights and computation; default: the checkpoint's own. On a CPU, JAX uses float32, except to generate
    on a CPU with AMX."""

    def loading(self) -> dict[str, Any]:
        """The arguments of a backend's ``load`` that concern weights."""
        return {}


@dataclass(frozen=True)
class ModelOptions(SourceOptions):
    adapter_path: str | None = None
    """Folder with a fine-tuned adapter (of PEFT or mlx_lm) to add to the model."""
    quantize: Literal[4, 8] | None = None
    """Quantize the layers' matrices to this many bits and the head to 8: less memory, and less to read per token."""

    def loading(self) -> dict[str, Any]:
        return {"adapter": self.adapter_path, "quantize": self.quantize}


@dataclass(frozen=True)
class Source:
    """An open checkpoint, and the devices to load it on."""

    checkpoint: "Checkpoint"
    placement: dict[str, Any]  # from the options


def open_source(options: SourceOptions) -> Source:
    """Open the checkpoint that the options name. No weight is read. Raises `InputError` as `open_model` does."""
    from weights_io.checkpoint import open_model

    placement = options.placement()  # must come before the first use of a device
    return Source(open_model(options.model, options.revision, options.hub), placement)


def load_model(
    backend: Backend[ModelT], options: SourceOptions, decoding: bool = False, source: Source | None = None
) -> "tuple[ModelT, Tokenizer]":
    """Load the model and the tokenizer that the options name.

    Arguments:
        backend: the backend to load with.
        options: the model, dtype, adapter and placement.
        decoding: load the weights in the form that generates fastest.
        source: from `open_source`, if the checkpoint is open already.

    Raises:
        InputError: the model cannot be loaded, or has no tokenizer.
    """
    placement = options.placement() if source is None else source.placement  # before the first use of a device
    named = {"revision": options.revision, "hub": options.hub} if source is None else {}
    where = options.model if source is None else source.checkpoint
    dtype = options.dtype or partial(backend.device.preferred_dtype, decoding=decoding, **placement)
    model, tokenizer = backend.load(where, dtype, decoding=decoding, **named, **options.loading(), **placement)
    if tokenizer is None:
        raise InputError(
            f"{options.model} holds no tokenizer files; put the model's tokenizer.json beside its weights."
        )
    return model, tokenizer


def note_context(config: "ModelConfig", tokens: int, remedy: str = "") -> bool:
    """Print a note, and return True, if more tokens are needed than the model was trained for, and it would fail.

    Arguments:
        config: the model's config.
        tokens: the number of tokens needed, prompt and answer together.
        remedy: appended to the note.
    """
    context = config.max_position_embeddings
    if tokens > context and config.rope_scaling is None:
        print(f"note: {tokens} tokens are more than the {context} this model is made for{remedy}", file=sys.stderr)
        return True
    return False
