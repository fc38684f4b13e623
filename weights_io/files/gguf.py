"""GGUF files of llama.cpp as Hugging Face checkpoints: tensors under Hugging Face names and a ``config.json`` dict.

Quantized blocks are taken apart by ``gguf.quants``. The header is read here and not by ``gguf.GGUFReader`` (the oracle
of the tests), which trusts every count in the file: one wrong array length makes it walk through the whole file.
Format: github.com/ggml-org/ggml docs/gguf.md. What the numbers mean: llama.cpp, conversion and model code of the
``minicpm``, ``minicpm3`` and ``llama`` architectures.
"""

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.gguf_config import LONGROPE, config_of
from weights_io.files.regular import open_regular
from weights_io.files.tensor import FileTensor, LazyTensor, contiguous_strides

ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
MAX_DIMS = 4  # of ggml
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's names
U32, U64 = SCALARS[4], SCALARS[10]
MAX_KEYS, MAX_TENSORS = 10_000, 100_000  # a file has about 40 of the ones, and 9 of the others for each layer
MAX_HEADER = 2**26  # bytes; a vocabulary of 256k with its merges has 16 million
MAX_ELEMENTS = 1_500_000  # of all arrays together; such a vocabulary has 1.3 million
PLAIN = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
}

MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file, in the terms of a Hugging Face folder."""

    metadata: dict[str, Any]  # as stored; arrays are lists
    tensors: dict[str, LazyTensor]  # by Hugging Face name; a tensor without one keeps its GGUF name
    config: dict[str, Any]  # the contents of a config.json


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in quantized blocks along its last axis. Only the blocks of a slice are read and dequantized."""

    packed: FileTensor  # uint8, last axis in bytes
    shape: tuple[int, ...]
    kind: str  # Q4_0, Q6_K, ...
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def source(self) -> Path:
        return self.packed.source

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.kind]
        elements, size = GGML_QUANT_SIZES[kind]  # of a block
        lead, last = index[: len(self.shape) - 1], index[len(self.shape) - 1 :]
        start, stop, _ = last[0].indices(self.shape[-1]) if last else (0, self.shape[-1], 1)
        first = start // elements
        blocks = slice(first * size, math.ceil(stop / elements) * size)
        every = (slice(None),) * (len(self.shape) - 1 - len(lead))
        packed = np.ascontiguousarray(self.packed.read((*lead, *every, blocks)))
        shape = (*packed.shape[:-1], max(0, stop - start))
        if 0 in shape:
            return np.empty(shape, self.dtype)
        return quants.dequantize(packed, kind)[..., start - first * elements : stop - first * elements]


@dataclass(frozen=True)
class UnpermutedTensor:
    """A q or k projection in Hugging Face's row order.

    llama.cpp's RoPE rotates adjacent pairs, so it stores the two halves of a head's rows interleaved: Hugging Face's
    row ``half * H/2 + j`` of a head is GGUF's row ``2 * j + half``.
    """

    stored: LazyTensor
    head_dim: int  # H

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def source(self) -> Path:
        return self.stored.source

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        start, stop, _ = index[0].indices(self.shape[0]) if index else (0, self.shape[0], 1)
        if start >= stop:
            return self.stored.read((slice(0, 0), *index[1:]))
        head, row = np.divmod(np.arange(start, stop), self.head_dim)
        half, j = np.divmod(row, self.head_dim // 2)
        rows = head * self.head_dim + 2 * j + half
        first = int(rows.min())
        return self.stored.read((slice(first, int(rows.max()) + 1), *index[1:]))[rows - first]


def open_file(path: Path) -> GGUFFile:
    """Read the header of a GGUF file; its tensors stay in the file.

    Raises:
        InputError: the file is missing, damaged or truncated, not of the architectures minicpm, minicpm3 and llama, or
            has something that would change the numbers and is not supported (experts, Llama 3.1's RoPE, YaRN, split
            files).
    """
    with open_regular(path) as file:
        metadata, stored = _Header(path, file).read()
    config = config_of(path, metadata, stored)
    # MiniCPM3's projections keep their row order: llama.cpp rotates the halves of a head there.
    latent = "kv_lora_rank" in config
    heads = {} if latent else {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if name in LONGROPE.values():
            continue  # read into the config
        name = _hugging_face_name(name)
        if name in tensors:
            raise InputError(f"{path} has two tensors for {short(name)}; convert the model anew.")
        count = heads.get(name.split(".")[-2]) if name.startswith("model.layers.") else None
        if count is not None and tensor.shape:
            if tensor.shape[0] % (2 * count):
                raise InputError(
                    f"{short(name)} in {path} has {tensor.shape[0]} rows, no pairs for {count} heads each."
                )
            tensor = UnpermutedTensor(tensor, tensor.shape[0] // count)
        tensors[name] = tensor
    return GGUFFile(metadata, tensors, config)


def _hugging_face_name(name: str) -> str:
    match name.split("."):
        case [module, kind] if module in MODULES:
            return f"{MODULES[module]}.{kind}"
        case ["blk", layer, module, kind] if module in LAYER_MODULES:
            return f"model.layers.{layer}.{LAYER_MODULES[module]}.{kind}"
    return name


class _Header:
    """Reads a GGUF header from front to back. Every stated size is checked against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = file.seek(0, 2)
        self.position = file.seek(0)
        self.elements = 0  # of the arrays so far

    def refuse(self, text: str) -> InputError:
        return InputError(f"{self.path} {text}; download it again or convert it anew.")

    def read(self) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
        """The metadata, and the tensors under their GGUF names."""
        if self.size < 8 or self.take(4) != b"GGUF":
            raise self.refuse("is no GGUF file (it does not begin with GGUF)")
        version = self.number(U32)
        if version not in (2, 3):
            raise self.refuse(f"has GGUF version {version:#x}, and 2 and 3 (little-endian) are read here")
        tensor_count, key_count = self.number(U64), self.number(U64)
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise self.refuse(f"promises {tensor_count} tensors and {key_count} keys, more than any model has")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            if key in metadata:
                raise self.refuse(f"has the metadata key {short(key)} twice")
            metadata[key] = self.value(self.number(U32))
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self.string()
            if name in entries:
                raise self.refuse(f"has the tensor {short(name)} twice")
            entries[name] = self.tensor_entry(name)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.refuse(f"has the alignment {short(alignment)}, not a power of two")
        return metadata, self.place(entries, alignment)

    def place(self, entries: dict[str, tuple[tuple[int, ...], int, int]], alignment: int) -> dict[str, LazyTensor]:
        """Locate the tensors, which follow each other and are padded to the alignment."""
        start = _padded(self.position, alignment)
        position = 0
        tensors: dict[str, LazyTensor] = {}
        for name, (shape, kind, offset) in entries.items():
            if offset != position:
                raise self.refuse(f"has {short(name)} at byte {offset} of its data where {position} is due")
            tensors[name], length = self.tensor(name, shape, kind, start + offset)
            if start + offset + length > self.size:
                raise self.refuse(f"is truncated: {short(name)} ends at byte {start + offset + length} of {self.size}")
            position = _padded(offset + length, alignment)
        if entries and self.size > start + position:
            raise self.refuse(f"has {self.size - start - position} bytes behind its last tensor")
        return tensors

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> tuple[LazyTensor, int]:
        """A tensor at a place in the file, and its length in bytes."""
        block = _block(kind)
        if block is None:
            raise InputError(
                f"{short(name)} in {self.path} has the type number {kind}, which the gguf package cannot read."
            )
        label, elements, size = block
        if label in PLAIN:
            dtype = PLAIN[label]
            tensor = FileTensor(self.path, offset, dtype, shape, contiguous_strides(shape))
            return tensor, math.prod(shape) * dtype.itemsize
        if not shape or shape[-1] % elements:
            raise self.refuse(
                f"has {short(name)} of shape {list(shape)} in {label} blocks of {elements} along the last axis"
            )
        packed = (*shape[:-1], shape[-1] // elements * size)
        bytes_ = FileTensor(self.path, offset, np.dtype(np.uint8), packed, contiguous_strides(packed))
        return BlockTensor(bytes_, shape, label), math.prod(packed)

    def tensor_entry(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape (the file has it reversed), type number, offset (bytes into the data)."""
        dims = self.number(U32)
        if dims > MAX_DIMS:
            raise self.refuse(f"gives {short(name)} {dims} dimensions, more than ggml's {MAX_DIMS}")
        shape = tuple(self.number(U64) for _ in range(dims))[::-1]
        if math.prod(max(n, 1) for n in shape) >= 2**60:
            raise self.refuse(f"gives {short(name)} the impossible shape {list(shape)}")
        return shape, self.number(U32), self.number(U64)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.refuse(f"has metadata of the unknown type {kind}")
        kind, count = self.number(U32), self.number(U64)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.refuse(f"has metadata of {self.elements} elements, more than any model needs")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise self.refuse(f"has a metadata array of the type {kind}")
        dtype = np.dtype(f"<{SCALARS[kind]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def string(self) -> str:
        try:
            return self.take(self.number(U64)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"has a string that is not UTF-8 before byte {self.position}") from error

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self.size:
            raise self.refuse(f"is truncated or damaged: {count} bytes are due at byte {start} of {self.size}")
        if self.position > MAX_HEADER:
            raise self.refuse(f"has a header of more than {MAX_HEADER} bytes, more than any model needs")
        return self.file.read(count)


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


@cache
def _block(kind: int) -> tuple[str, int, int] | None:
    """Name, elements and bytes of a block of a ggml type; None where the gguf package cannot dequantize it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        known = GGMLQuantizationType(kind)
        elements, size = GGML_QUANT_SIZES[known]
        if known.name not in PLAIN:
            quants.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, NotImplementedError):
        return None
    return known.name, elements, size
