"""Open a checkpoint: read its config, and check its tensors against the parameter table before any weight is read.

`open_model` is the one way from what the user typed to a checkpoint. A command calls it once and passes the checkpoint
on to everything that needs its config, its tokenizer or its weights.
"""

import heapq
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weights_io import catalog
from weights_io import config as config_module
from weights_io.built_in import built_in
from weights_io.casting import check_dtype, check_finite, numpy_dtype
from weights_io.config import ModelConfig
from weights_io.config_keys import token_ids
from weights_io.errors import MOST_NAMES, InputError, listed, short
from weights_io.files.json_text import read_json, read_optional_json
from weights_io.files.near_keys import refuse_near_keys
from weights_io.files.tensor import FileTensor, LazyTensor, located, same_numbers
from weights_io.hub import resolve
from weights_io.parameters import EMBEDDING, EXPERTS, HEAD, NORM, tensor_shapes
from weights_io.quantization.gguf import as_packed
from weights_io.quantization.packed import Packed, PackedTensor, arithmetic_dtype, stored_bytes
from weights_io.quantization.reading import as_matrices
from weights_io.vision.names import in_table_names, with_stored_queries

# Buffers that old files hold. The models compute them.
BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".attn.masked_bias")
OTHER_IDS = frozenset(
    "bos_token_id pad_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id".split()
)
MAX_SETTINGS = 1000  # keys of generation_config.json; transformers has about 70
# Prefix that a wrapper puts before the tensor names -> the rest of the message.
WRAPPERS = {
    "_orig_mod.": "torch.compile put there; save the state_dict of the model before it was compiled",
    "module.": "DataParallel or an engine put there; save the state_dict of model.module",
    "_fsdp_wrapped_module.": "FSDP put there; save the full state_dict of the model inside",
    "base_model.": "PEFT put there; call merge_and_unload() and save its result",
    "language_model.": "a model with other parts puts there; save its language model alone",
    "model.language_": "a model with other parts puts there; save its language model alone",
}
# The same inside the names, of wrappers around single modules.
INNER_WRAPPERS = {
    "_orig_mod.": "torch.compile put there; save the state_dict of the modules before they were compiled",
    "_fsdp_wrapped_module.": "FSDP put there; save the full state_dict of the model",
    "_checkpoint_wrapped_module.": "activation checkpointing put there; save the state_dict of the model without it",
}


@dataclass(frozen=True)
class Checkpoint:
    """An open model folder or GGUF file. Tensors are read on demand."""

    path: Path
    raw_config: Mapping[str, Any]  # config.json, unchanged
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]  # Hugging Face name -> tensor; exactly the names of the parameter table
    dtype: str  # float32 | bfloat16 | float16
    bos_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]  # union of config.json and generation_config.json
    metadata: Mapping[str, Any] | None = None  # of a GGUF file; None for a folder
    on_read: Callable[[int], object] | None = None  # called with the bytes of each read, for a progress bar

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def target(self, dtype: "str | Callable[[Checkpoint], str] | None") -> str:
        """The dtype to load the weights in.

        Arguments:
            dtype: a dtype's name, a function of the checkpoint that returns one, or None for the checkpoint's own.

        Raises:
            InputError: the dtype is not supported.
        """
        if callable(dtype) and not isinstance(dtype, type):  # jnp.bfloat16 is a type
            return check_dtype(dtype(self))
        return check_dtype(dtype or self.dtype)

    def read(self, name: str, dtype: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor in the dtype of its file.

        Arguments:
            name: its Hugging Face name.
            dtype: the dtype that the caller casts it to; only checked for its range.
            index: the slices to read; all by default.

        Returns:
            A contiguous array in the file's dtype.

        Raises:
            InputError: as `checked`.
        """
        return self.checked(name, dtype, np.ascontiguousarray(self.tensors[name].read(index)))

    def packed(self, name: str, rows: slice = slice(None)) -> Packed | None:
        """A quantized matrix in packed form, or its ``rows``. `read` dequantizes it instead.

        Returns None for a matrix that is not quantized, and for GGUF blocks of a rare kind. Raises `InputError` where
        the file contradicts its format, or a scale or a table is NaN or infinite.
        """
        tensor = self.tensors[name]
        if not isinstance(tensor, PackedTensor):
            return None
        start, stop, _ = rows.indices(tensor.shape[0])
        found = tensor.packed(start, stop)
        for part in (found.scales, found.biases, found.table):
            if part is not None:
                check_finite(located(name, tensor), part)
        if self.on_read is not None:
            self.on_read(stored_bytes(tensor, found.codes.size))
        return found

    def read_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Fill the array ``rows`` with a tensor's rows from ``start`` on, cast to its dtype. Raises as `read` does."""
        tensor, dtype = self.tensors[name], rows.dtype.name
        if isinstance(tensor, FileTensor) and tensor.read_rows(start, rows):
            self.checked(name, dtype, rows)
        else:
            rows[...] = self.read(name, dtype, (slice(start, start + len(rows)),))

    def checked(self, name: str, dtype: str, values: np.ndarray) -> np.ndarray:
        """Check values that were read from a tensor, count them for the progress bar, and return them.

        Raises:
            InputError: a value is NaN, infinite or too large for ``dtype``. One such value makes every logit NaN.
        """
        self.check(name, dtype, values)
        if self.on_read is not None:
            self.on_read(stored_bytes(self.tensors[name], values.size))
        return values

    def check(self, name: str, dtype: str, values: np.ndarray) -> None:
        """Raise as `checked` for values of a tensor."""
        name = located(name, self.tensors[name])
        largest = check_finite(name, values)
        with np.errstate(over="ignore"):
            fits = np.isfinite(largest.astype(numpy_dtype(dtype)))
        if not fits:
            raise InputError(
                f"{name} holds {float(largest):.4g}, which is too large for {dtype}; choose a dtype of wider range."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored; of quantized ones, those of the codes."""
        return sum(stored_bytes(tensor, math.prod(tensor.shape)) for tensor in self.tensors.values())


def open_model(
    path_or_repo: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    weights: bool = True,
) -> Checkpoint:
    """Find a model by its name, download it if needed, and open it.

    Arguments:
        path_or_repo, revision, hub: as in `hub.resolve`; None is the built-in model.
        weights: False neither downloads nor opens the weights; ``tensors`` is then empty.

    Returns:
        The open checkpoint. Each header is read once.

    Raises:
        InputError: as `hub.resolve` and `open_checkpoint`. A repository whose config.json cannot be used is refused
            before its weights are downloaded.
    """
    found: list[ModelConfig] = []  # of a hub

    def check(raw: dict[str, Any], source: str) -> None:
        found.append(ModelConfig.from_dict(raw, source))

    path = resolve(path_or_repo, revision=revision, hub=hub, check=check, weights=weights)
    return open_checkpoint(path, found[0] if found else None, weights)


def config_of(model: str) -> ModelConfig:
    """The config of a folder, a config.json or a short name of the catalogue. Nothing is downloaded."""
    path, entry = Path(model), catalog.find(model)
    if entry is not None and entry.repo is None:
        path = built_in(entry.name)
    elif entry is not None:
        if entry.config is None:
            raise InputError(f"the catalogue does not hold the config.json of {model}; download it and give its path.")
        return ModelConfig.from_dict(dict(entry.config), entry.name)
    elif not path.exists():
        close = catalog.nearest(model)
        hint = f"did you mean {' or '.join(close)}?" if close else "`python -m weights_io.catalog` lists the names."
        raise InputError(f"{model} is neither a folder, a config.json nor a short name; {hint}")
    return ModelConfig.from_file(path / "config.json" if path.is_dir() else path)


def open_checkpoint(path: Path, config: ModelConfig | None = None, weights: bool = True) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file.

    Arguments:
        path: the folder or the file.
        config: the folder's config, if it has been read already.
        weights: as in `open_model`.

    Raises:
        InputError: config.json or a header cannot be used, or the tensors do not fit the config (all faults in one
            message).
    """
    tensors: Mapping[str, LazyTensor] = {}
    metadata: Mapping[str, Any] | None = None
    if path.suffix == ".gguf":
        from weights_io.files import gguf

        file = gguf.open_file(path)
        raw, tensors, metadata = file.config, as_packed(file.tensors), file.metadata
        config = ModelConfig.from_dict(raw, str(path))
    else:
        from weights_io.files.folder import open_folder

        if not path.is_dir():
            raise InputError(f"{path} is neither a model folder nor a .gguf file.")
        raw = read_json(path / "config.json")
        if config is None:  # the model is refused before its weights are looked for
            config = ModelConfig.from_dict(raw, str(path / "config.json"))
        if weights:
            found = in_table_names(open_folder(path), config)
            config = with_stored_queries(config, raw, found)
            _check_names(dict(tensor_shapes(config)), found, path)  # packed matrices are looked for by their names
            _check_inner_names(found, path)
            config, tensors = as_matrices(config, raw, found, path)
    begin, end = special_ids(path, raw, config.vocab_size)
    return Checkpoint(
        path=path,
        raw_config=raw,
        config=config,
        tensors=check_tensors(config, tensors, path) if weights else {},
        dtype=config_module.stored_dtype(raw) or _file_dtype(tensors),
        bos_token_ids=begin,
        eos_token_ids=end,
        metadata=metadata,
    )


def special_ids(path: Path, raw: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The BOS ids of config.json, and the union of the EOS ids of config.json and generation_config.json."""
    raw, source = dict(raw), str(path / "config.json") if path.is_dir() else str(path)
    ends = token_ids(raw, "eos_token_id", vocab_size, source)
    if path.is_dir():
        generation = path / "generation_config.json"
        settings = read_optional_json(generation)
        if len(settings) > MAX_SETTINGS:
            raise InputError(f"{generation} has {len(settings)} keys (at most {MAX_SETTINGS}); download it again.")
        refuse_near_keys(settings, ("eos_token_id",), OTHER_IDS, generation)  # the only key that is used
        ends += token_ids(settings, "eos_token_id", vocab_size, str(generation))
    return token_ids(raw, "bos_token_id", vocab_size, source), tuple(dict.fromkeys(ends))


def check_tensors(config: ModelConfig, tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Check tensors against the parameter table.

    Returns:
        The tensors of the table, in table order. Buffers and the second copy of a tied head are left out.

    Raises:
        InputError: tensors are missing, unexpected, of another shape or not floating point (counted, with examples).
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    copied_head = found.pop(HEAD.hf_name, None) if config.tie_word_embeddings else None
    expected = dict(tensor_shapes(config))
    _check_names(expected, found, path)
    _check_experts(config, found, path)
    misshapen = [name for name in expected if name in found and tuple(found[name].shape) != expected[name]]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [f"{name} {short(list(found[name].shape))} for {list(expected[name])}" for name in misshapen],
    }
    faults = _listed({kind: names for kind, names in kinds.items() if names})
    if faults:
        raise InputError(
            f"{path}: the tensors do not fit config.json; take both, whole, from one checkpoint: {'; '.join(faults)}."
        )
    not_float = [name for name in expected if not _is_float(found[name].dtype)]
    if not_float:
        raise InputError(
            f"{path}: tensors are not floating point ({listed(not_float)}); use the checkpoint before its quantization."
        )
    if copied_head is not None:
        _check_tied_head(found[EMBEDDING.hf_name], copied_head, path)
    return {name: found[name] for name in expected}


def _check_names(expected: Mapping[str, object], found: Mapping[str, object], path: Path) -> None:
    """Report names with a wrapper's prefix, or without ``model.``, as one fault. Raises `InputError`.

    Modules are compared, because the parts of a packed matrix have other names than the matrix.
    """
    if NORM.hf_name in found:
        return
    if "fc.weight" in found or any(name.startswith("midlayer.") for name in found):
        raise InputError(
            f"{path} holds a draft head (Eagle, FRSpec), which only proposes tokens for a larger model; SGLang, vLLM "
            "and CPM.cu run both together."
        )
    wrapped = (name for name in found if name.endswith(NORM.hf_name))
    wanted, modules = (frozenset(name.rpartition(".")[0] for name in names) for names in (expected, found))
    for name in heapq.nsmallest(MOST_NAMES, wrapped, key=len):  # each is compared with the whole table
        start = name.removesuffix(NORM.hf_name)
        if 2 * sum(f"{start}{each}" in modules for each in wanted) > len(wanted):
            remedy = next((text for known, text in WRAPPERS.items() if start.startswith(known)), None)
            raise InputError(
                f"{path}: the tensor names begin with {short(start)!r}, which "
                f"{remedy or 'is no prefix of the model; save the state_dict of the model inside'}."
            )
    if 2 * sum(each.removeprefix("model.") in modules for each in wanted) > len(wanted):
        raise InputError(
            f"{path}: the tensor names lack the prefix 'model.', as in a model without its head; save the whole "
            "ForCausalLM model."
        )


def _check_inner_names(found: Mapping[str, object], path: Path) -> None:
    """Report the wrappers of single modules inside the names as one fault. Raises `InputError`."""
    for known, remedy in INNER_WRAPPERS.items():
        if NORM.hf_name in found and (inside := [name for name in found if known in name]):
            raise InputError(f"{path}: tensor names hold {known!r} ({listed(inside, 1)}), which {remedy}.")


def _check_experts(config: ModelConfig, found: Mapping[str, LazyTensor], path: Path) -> None:
    """config.json and the files must agree on whether there are experts. Otherwise every MLP tensor is a fault."""
    pattern = EXPERTS[0].hf_name
    first, place = pattern.format(layer=0, expert=0), pattern[pattern.index("}") + 1 : pattern.index("{expert}")]
    stored = any(place in name for name in found)
    if config.num_experts and not stored:
        raise InputError(
            f"{path}: config.json has num_experts {config.num_experts} and the files hold no expert tensors ({first} "
            "and the like); remove num_experts and num_experts_per_tok if the model is dense."
        )
    if stored and not config.num_experts:
        raise InputError(
            f"{path}: the files hold expert tensors ({first} and the like) and config.json has no num_experts; write "
            "num_experts and num_experts_per_tok (8 and 2 in MiniCPM-MoE-8x2B) into it."
        )


def _listed(kinds: Mapping[str, list[str]]) -> list[str]:
    """The number of faults of each kind, with at most `MOST_NAMES` names in all."""
    of_each = MOST_NAMES // max(1, len(kinds))
    return [f"{len(names)} {kind} ({listed(names, of_each)})" for kind, names in kinds.items()]


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float64", *config_module.DTYPES)


def _check_tied_head(embedding: LazyTensor, head: LazyTensor, path: Path) -> None:
    """A tied checkpoint may store its head again, with the same values as the embedding. Raises `InputError`."""
    if not same_numbers(embedding, head):
        raise InputError(
            f"{path}: lm_head.weight differs from the embedding that config.json ties it to; "
            'set "tie_word_embeddings": false in config.json to use the stored head.'
        )


def _file_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The dtype of the stored embedding, for a config.json that states none."""
    embedding = tensors.get(EMBEDDING.hf_name)
    name = "float32" if embedding is None else arithmetic_dtype(embedding)
    return name if name in config_module.DTYPES else "float32"
