"""The options that name a model, and loading a model from them.

A command opens its checkpoint once: in `load_model`, or earlier in `open_source` if it needs the config or the
tokenizer before the weights.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicpm_data.generation.api import Backend
from minicpm_data.generation.request import ModelT
from weights_io.command_line import Unneeded
from weights_io.errors import InputError
from weights_io.progress import waiting
from weights_io.rope_config import RopeScaling

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
    trust_remote_code: Annotated[bool, tyro.conf.Suppress, Unneeded("no code of a checkpoint is run")] = False
    """Accepted for scripts of mlx_lm; it changes nothing, as no code of a checkpoint is run."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of weights and computation; default: the checkpoint's own. On a CPU, JAX uses float32, except to generate
    on a CPU with AMX."""

    def loading(self) -> dict[str, Any]:
        """The arguments of a backend's ``load`` that concern weights."""
        return {}

    def scaled(self, checkpoint: "Checkpoint") -> "Checkpoint":
        """The checkpoint with the RoPE scaling that the options choose."""
        return checkpoint


@dataclass(frozen=True)
class ModelOptions(SourceOptions):
    adapter_path: str | None = None
    """Folder with a fine-tuned adapter (of PEFT or mlx_lm) to add to the model."""
    quantize: Literal[4, 8] | None = None
    """Quantize the layers' matrices to this many bits and the head to 8: less memory, and less to read per token."""
    head_bits: Literal[8] | None = None
    """Quantize only the head (and a tied embedding) to 8 bits: also that of a checkpoint whose layers are quantized."""
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """RoPE scaling that replaces the checkpoint's, such as {"type": "linear", "factor": 4}. null: no scaling."""

    def loading(self) -> dict[str, Any]:
        return {"adapter": self.adapter_path, "quantize": self.quantize, "head_bits": self.head_bits}

    @property
    def rescaled(self) -> bool:
        """Whether --rope-scaling replaces the checkpoint's RoPE scaling."""
        return self.rope_scaling is not None

    def scaled(self, checkpoint: "Checkpoint") -> "Checkpoint":
        """The checkpoint with the scaling of --rope-scaling. Raises `InputError` for one that is not understood."""
        if self.rope_scaling is None:
            return checkpoint
        try:
            raw = json.loads(self.rope_scaling)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON ({error}); give an object or null.", option="rope_scaling") from None
        return replace(checkpoint, config=with_rope_scaling(checkpoint.config, raw))


def with_rope_scaling(config: "ModelConfig", raw: Any) -> "ModelConfig":
    """The config with another ``rope_scaling``, written as in config.json. Raises `InputError` for an invalid one."""
    source = "config.json"
    try:
        return type(config).from_dict({**config.to_dict(), "rope_scaling": raw}, source)
    except InputError as error:
        reason = str(error).removeprefix(f"{source}: ")
        raise InputError(f"cannot be used: {reason}", option="rope_scaling") from None


@dataclass(frozen=True)
class Source:
    """An open checkpoint, and the devices to load it on."""

    checkpoint: "Checkpoint"
    placement: dict[str, Any]  # from the options


def open_early(options: Any, model: str | None = None) -> "Checkpoint | None":
    """Refuse a wrong model or adapter before a backend is imported, which takes seconds.

    Arguments:
        options: `SourceOptions`, or others with ``model``, ``revision`` and ``hub``.
        model: a name in place of that of the options.

    Returns:
        The open checkpoint, for `open_source` or `load_model`. None for a model of a hub if several processes run the
        command: they must join before one of them downloads, so only the name is checked.

    Raises:
        InputError: the model cannot be opened, there is no adapter, or the RoPE scaling is not understood.
    """
    from weights_io.checkpoint import open_model
    from weights_io.hub import locate

    name = options.model if model is None else model
    found = locate(name, options.revision, options.hub, check=lambda raw, source: None)
    if isinstance(options, ModelOptions) and options.adapter_path is not None:
        from weights_io.adapters import adapter_folder

        adapter_folder(options.adapter_path)
    several = getattr(options, "distributed", False) or getattr(options, "num_processes", None) is not None
    if several and not isinstance(found, Path):
        return None
    checkpoint = open_model(name, options.revision, options.hub)
    return options.scaled(checkpoint) if isinstance(options, SourceOptions) else checkpoint


def open_source(options: SourceOptions, checkpoint: "Checkpoint | None" = None) -> Source:
    """Open the checkpoint that the options name, unless `open_early` has. No weight is read. Raises `InputError` as
    `open_model` does."""
    from weights_io.checkpoint import open_model

    placement = options.placement()  # must come before the first use of a device
    if checkpoint is None:
        checkpoint = options.scaled(open_model(options.model, options.revision, options.hub))
    return Source(checkpoint, placement)


def load_model(
    backend: Backend[ModelT],
    options: SourceOptions,
    decoding: bool = False,
    source: "Source | Checkpoint | None" = None,
) -> "tuple[ModelT, Tokenizer]":
    """Load the model and the tokenizer that the options name.

    Arguments:
        backend: the backend to load with.
        options: the model, dtype, adapter and placement.
        decoding: load the weights in the form that generates fastest.
        source: from `open_source` or `open_early`, if the checkpoint is open already.

    Raises:
        InputError: the model cannot be loaded, or has no tokenizer.
    """
    with waiting("loading the model"):
        here = source if isinstance(source, Source) else open_source(options, source)
        dtype = options.dtype or partial(backend.device.preferred_dtype, decoding=decoding, **here.placement)
        model, tokenizer = backend.load(
            here.checkpoint, dtype, decoding=decoding, **options.loading(), **here.placement
        )
    if tokenizer is None:
        raise InputError(
            f"{options.model} holds no tokenizer files; put the model's tokenizer.json beside its weights."
        )
    return model, tokenizer


def note_context(config: "ModelConfig", tokens: int, remedy: str = "", rescaled: bool = False) -> bool:
    """Print a note, and return True, if more tokens are needed than the model was trained for, and it would fail.

    Arguments:
        config: the model's config.
        tokens: the number of tokens needed, prompt and answer together.
        remedy: appended to the note.
        rescaled: the user chose the RoPE scaling, whose reach the config does not tell.
    """
    context, scaling = config.max_position_embeddings, config.rope_scaling
    # The checkpoint's LongRoPE is made for max_position_embeddings. Dynamic NTK, a linear factor and factors that
    # were given for a longer text (--rope-scaling) reach further.
    reaches = isinstance(scaling, RopeScaling) or (rescaled and scaling is not None)
    if tokens > context and not reaches:
        print(f"note: {tokens} tokens are more than the {context} this model is made for{remedy}", file=sys.stderr)
        return True
    return False
