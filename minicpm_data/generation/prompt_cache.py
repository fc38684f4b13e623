"""Prompt caches: the keys and values of a prompt in a file, which later prompts with the same beginning reuse.

The file has the layout that `mlx_lm` 0.32 writes and reads (`mlx_lm.models.cache.save_prompt_cache`): a safetensors
file with ``LAYER.0`` the keys and ``LAYER.1`` the values of a layer, [1, K, T, H], and ``LAYER.2`` their number T. Of a
quantized cache the keys are three arrays, ``LAYER.0.0`` codes, ``LAYER.0.1`` scales and ``LAYER.0.2`` biases, in MLX's
affine format; so are the values. ``LAYER.2``, ``.3`` and ``.4`` are T, the group size and the bits. The metadata name
the class of each layer. What a later prompt is compared with stands in the key ``minicpm`` of the metadata: the text,
its token ids, the model's `fingerprint` and a checksum of each array.

Latent attention has the latents for keys and the rotary keys for values, with one head.

Dims: K key/value heads, T tokens, H width of a key or value.
"""

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_data.fingerprint import difference
from minicpm_data.generation.options import CacheOptions
from weights_io.casting import largest_magnitude
from weights_io.config import ModelConfig
from weights_io.errors import InputError, short
from weights_io.files.json_text import MAX_CONFIG, loads
from weights_io.files.partial import partial
from weights_io.files.safetensors import Computed, open_with_metadata, write_file
from weights_io.files.tensor import FileTensor
from weights_io.quantization.entries import GROUPS
from weights_io.quantization.packed import pack, unpack
from weights_io.rope_config import LongRoPE

ENDING = ".safetensors"
AGAIN = "make it again with cache_prompt"
OWN = "minicpm"  # the key of our own metadata
PLAIN, QUANTIZED, ROTATING = "KVCache", "QuantizedKVCache", "RotatingKVCache"
SCALARS = {PLAIN: 1, QUANTIZED: 3, ROTATING: 4}  # numbers after the keys and values of a layer
FLOATS = ("float32", "float16", "bfloat16")

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes uint32 [1, K, T, H * bits / 32], scales and biases [.., H/g]
Part = np.ndarray | Triple  # [1, K, T, H], or the same quantized


@dataclass(frozen=True)
class CachedPrompt:
    """The cache of a prompt, as a backend hands it out.

    Arguments:
        length: T.
        layers: their number.
        layer: index -> keys and values.
        bits, group_size: of a quantized cache.
    """

    length: int
    layers: int
    layer: Callable[[int], tuple[Part, Part]]
    bits: int | None = None
    group_size: int | None = None


def check_target(path: Path, option: str = "prompt_cache_file") -> Path:
    """The path to write, absolute. Raises `InputError` where a prompt cache cannot or must not be written there.
    ``option``: names it."""
    try:
        path = path.expanduser().resolve()
        exists, parent = path.exists(), path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{short(path)} cannot be written ({error}); choose another name.") from error
    if path.suffix != ENDING:
        raise InputError(f"is {short(path)}; the name must end with {ENDING}.", option)
    if not parent:
        raise InputError(f"the folder {path.parent} does not exist; make it first.")
    if exists:
        try:
            open_prompt_cache(path)
        except InputError:
            raise InputError(f"{path} exists and is no prompt cache; choose another name.") from None
    return path


def write_prompt_cache(
    path: Path,
    found: CachedPrompt,
    model: str,
    fingerprint: Mapping[str, str],
    text: str,
    ids: Sequence[int],
    eos_token: str | None = None,
) -> None:
    """Write a prompt cache. A file of this name is replaced when the new one is complete.

    Arguments:
        path: the file.
        found: keys and values of the prompt.
        model: the model's name, which mlx_lm compares.
        fingerprint: of the model.
        text: the text of the prompt, without the chat template.
        ids: its token ids.
        eos_token: one more token that ends answers.
    """
    kind = PLAIN if found.bits is None else QUANTIZED
    scalars = [found.length] if found.bits is None else [found.length, found.group_size, found.bits]
    tensors: dict[str, Computed] = {}
    sums: dict[str, int] = {}
    metadata = {"0.model": model, "0.tokenizer_config": json.dumps({"eos_token": eos_token} if eos_token else {})}
    metadata |= {f"1.{layer}": kind for layer in range(found.layers)} | {"2.0": ""}
    numbered = itertools.count(1)
    for layer in range(found.layers):  # twice: the checksums stand before the arrays
        for name, array in _named(layer, *found.layer(layer)):
            sums[name] = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
            tensors[name] = Computed(array.shape, array.dtype, _maker(found, layer, name))
        for place, value in enumerate(scalars, 2):
            tensors[f"{layer}.{place}"] = Computed.of(np.array(value, np.int32))
            number = next(numbered)
            metadata |= {f"2.{number}.0": f"{layer}.{place}", f"2.{number}.1": "scalar"}
    own = {"text": text, "ids": list(map(int, ids)), "fingerprint": dict(fingerprint), "checksums": sums}
    metadata[f"0.{OWN}"] = json.dumps(own)
    with partial(path) as unfinished:
        write_file(unfinished, tensors, metadata)


def _named(layer: int, keys: Part, values: Part) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a layer with their names."""
    for which, part in enumerate((keys, values)):
        if isinstance(part, tuple):
            yield from ((f"{layer}.{which}.{i}", array) for i, array in enumerate(part))
        else:
            yield f"{layer}.{which}", part


def _maker(found: CachedPrompt, layer: int, name: str) -> Callable[[], np.ndarray]:
    return lambda: dict(_named(layer, *found.layer(layer)))[name]


@dataclass(frozen=True, eq=False)
class PromptCache:
    """An open file.

    Attributes:
        path: the file.
        tensors: name -> array in it.
        layers: number of layers.
        length: T.
        bits, group_size: of a quantized cache, otherwise None.
        max_size: of mlx_lm's rotating cache, which has not begun to rotate; otherwise None.
        model: the name of its model.
        eos_token: one more token that ends answers.
        text, ids, fingerprint, checksums: those of a file that was written here; mlx_lm writes none of them.
    """

    path: Path
    tensors: Mapping[str, FileTensor]
    layers: int
    length: int
    bits: int | None
    group_size: int | None
    max_size: int | None
    model: str
    eos_token: str | None
    text: str | None = None
    ids: tuple[int, ...] = ()
    fingerprint: Mapping[str, str] | None = None
    checksums: Mapping[str, int] | None = None

    def check_model(self, config: ModelConfig, name: str, fingerprint: Mapping[str, str]) -> None:
        """Raises `InputError` if the file belongs to another model.

        Arguments:
            config: of the model.
            name: of the model, which a file of mlx_lm must have.
            fingerprint: of the model.
        """
        if self.fingerprint is not None:
            other = difference(fingerprint, self.fingerprint)
        else:
            other = None if self.model in (name, str(Path(name).expanduser())) else "another --model"
        if other is not None:
            remedy = f"use it with that, or {AGAIN} for {short(name)}"
            raise InputError(f"{self.path} was made with {other}: {short(self.model)}; {remedy}.")
        if self.layers != config.num_hidden_layers:
            raise InputError(f"{self.path} has {self.layers} layers, not {config.num_hidden_layers}; {AGAIN}.")
        heads = 1 if config.is_latent else config.num_key_value_heads
        widths = (config.kv_lora_rank, config.qk_rope_head_dim) if config.is_latent else (config.head_dim,) * 2
        for layer in range(self.layers):
            for which, width in enumerate(widths):
                for name, expected in self._expected(layer, which, heads, width).items():
                    if name not in self.tensors or self.tensors[name].shape != expected:
                        raise self._fault(f"has no array {name} of shape {list(expected)}")
        if any(not 0 <= i < config.vocab_size for i in self.ids):
            raise self._fault("holds token ids outside the vocabulary")

    def _expected(self, layer: int, which: int, heads: int, width: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the arrays of the keys (``which`` 0) or the values (1) of a layer."""
        stem = f"{layer}.{which}"
        rows = self.tensors[f"{stem}.0" if self.bits else stem].shape[2]  # mlx_lm keeps room for more than T
        if self.bits is None or self.group_size is None:
            return {stem: (1, heads, rows, width)}
        if width % self.group_size:
            raise self._fault(f"has groups of {self.group_size}, which do not divide {width}")
        sizes = (width * self.bits // 32, *[width // self.group_size] * 2)
        return {f"{stem}.{i}": (1, heads, rows, size) for i, size in enumerate(sizes)}

    def cache_options(self, given: CacheOptions) -> CacheOptions:
        """The options of a cache that continues this one. Raises `InputError` where the given ones are others."""
        if self.bits is None:
            return given if given.max_kv_size else replace(given, max_kv_size=self.max_size)
        for name, own in (("kv_bits", self.bits), ("kv_group_size", self.group_size)):
            wanted = getattr(given, name)
            if wanted is not None and wanted != own:
                raise InputError(
                    f"is {wanted}, and {self.path} holds a cache with {own}; leave it out, or {AGAIN}.", option=name
                )
        if given.max_kv_size:
            raise InputError(f"does not go with {self.path}, which is quantized; leave it out.", option="max_kv_size")
        return replace(given, kv_bits=self.bits)

    def shared(self, config: ModelConfig, prompt: Sequence[int], max_kv_size: int | None = None) -> int:
        """The number of tokens at the beginning of a prompt whose keys and values are in this file.

        It is less than the prompt's length, because the last token must be run. It is 0 where the prompt is so long
        that the model's RoPE rotates its keys in another way, and where a rotating cache would forget some.
        """
        if not same_rotation(config, self.length, len(prompt)) or len(prompt) > (max_kv_size or len(prompt)):
            return 0
        if self.fingerprint is None:  # the caller has put placeholders for the ids, which mlx_lm does not write
            return self.length
        most = min(len(prompt) - 1, len(self.ids))
        return next((i for i in range(most) if prompt[i] != self.ids[i]), most)

    def layer(self, index: int, length: int) -> tuple[Part, Part]:
        """Keys and values of the first ``length`` tokens in a layer. Raises `InputError` where the file is damaged."""

        def read(name: str) -> np.ndarray:
            array = self.tensors[name].read()
            wanted = None if self.checksums is None else self.checksums.get(name)
            if self.checksums is not None and zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data) != wanted:
                raise self._fault(f"is damaged: {name} differs from its checksum")
            array = array[:, :, :length]
            if array.dtype.name in FLOATS:
                self._check_finite(name, array)
            return array

        def part(stem: str) -> Part:
            if self.bits is None:
                return read(stem)
            return read(f"{stem}.0"), read(f"{stem}.1"), read(f"{stem}.2")

        return part(f"{index}.0"), part(f"{index}.1")

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        if not np.isfinite(largest_magnitude(array)):
            raise self._fault(f"holds NaN or infinite numbers in {name}")

    def _fault(self, what: str) -> InputError:
        return InputError(f"{self.path} {what}; {AGAIN}.")


@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginning of a prompt, with its keys and values from a file. It is part of a request."""

    source: PromptCache
    length: int  # tokens

    @property
    def bits(self) -> int | None:
        return self.source.bits

    @property
    def group_size(self) -> int | None:
        return self.source.group_size

    def layer(self, index: int) -> tuple[Part, Part]:
        """Keys and values of a layer, as in the file."""
        return self.source.layer(index, self.length)

    def floats(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, [1, K, T, H]; dequantized, if they are quantized, to float32."""
        keys, values = (
            dequantized(part, self.bits or 0, self.group_size or 0) if isinstance(part, tuple) else part
            for part in self.layer(index)
        )
        return keys, values


def same_rotation(config: ModelConfig, one: int, other: int) -> bool:
    """Whether the keys of two prompts of these lengths are rotated by the same angles. Dynamic NTK's depend on the
    length beyond the context, and LongRoPE's on whether it is beyond the original context."""
    scaling, context = config.rope_scaling, config.max_position_embeddings
    if isinstance(scaling, LongRoPE):
        return scaling.grows(context, one) == scaling.grows(context, other)
    return scaling is None or one == other or not scaling.grows(context, max(one, other))


def open_prompt_cache(path: Path) -> PromptCache:
    """Open a prompt cache of this package or of mlx_lm. Its arrays are read later.

    Raises:
        InputError: it is missing, damaged, of another kind, or has rotated, so that its beginning is lost.
    """
    try:
        tensors, metadata = open_with_metadata(path)
        return _opened(path, tensors, metadata)
    except InputError as error:
        said = re.sub("; download it again.$", "", str(error)).rstrip(".")
        raise InputError(said if AGAIN in said else f"{said}; {AGAIN}.") from None


def _opened(path: Path, tensors: Mapping[str, FileTensor], metadata: Mapping[str, str]) -> PromptCache:
    kinds = [metadata[key] for key in (f"1.{layer}" for layer in range(len(metadata))) if key in metadata]
    if not kinds or "0.model" not in metadata or "2.0" not in metadata:
        raise InputError(f"{path} is no prompt cache, or one of a version of mlx_lm before 0.32")
    if len({*kinds}) > 1 or kinds[0] not in SCALARS:
        raise InputError(f"{path} holds caches of the kind {short(sorted({*kinds})[0])}, which is not read here")
    parts = ("0.0", "0.1", "0.2", "1.0", "1.1", "1.2") if kinds[0] == QUANTIZED else ("0", "1")
    arrays = {f"{layer}.{part}" for layer in range(len(kinds)) for part in parts}
    places = range(2, 2 + SCALARS[kinds[0]])
    names = arrays | {f"{layer}.{i}" for layer in range(len(kinds)) for i in places}
    if wrong := sorted(names ^ tensors.keys()):
        raise InputError(f"{path} does not hold the arrays of {len(kinds)} layers, such as {short(wrong[0])}")
    for name in sorted(arrays):
        codes = kinds[0] == QUANTIZED and name.endswith(".0")
        if len(tensors[name].shape) != 4 or tensors[name].dtype.name not in (("uint32",) if codes else FLOATS):
            raise InputError(f"{path} has the array {name} of another type or shape")
    numbers = {
        tuple(_number(path, tensors, f"{n}.{2 + i}") for i in range(SCALARS[kinds[0]])) for n in range(len(kinds))
    }
    if len(numbers) > 1:
        raise InputError(f"{path} has layers of different lengths")
    (length, *others), bits, group, most = numbers.pop(), None, None, None
    if not 1 <= length <= min(tensors[name].shape[2] for name in arrays):
        raise InputError(f"{path} has rotated, or holds less than the {length} tokens that it promises")
    if kinds[0] == QUANTIZED:
        group, bits = others
        if group not in GROUPS["mlx"] or bits not in (4, 8):
            raise InputError(f"{path} is quantized to {bits} bits in groups of {group}, which is not read here")
    elif kinds[0] == ROTATING:
        _, most, place = others
        if place != length or most < max(length, 8):
            raise InputError(f"{path} has rotated, so its beginning is lost")
    config = loads(metadata.get("0.tokenizer_config", "{}"), f"tokenizer_config of {path}", MAX_CONFIG, AGAIN)
    if not isinstance(config, dict) or config.keys() - {"eos_token", "trust_remote_code"}:
        raise InputError(f"{path} has a tokenizer_config that is not understood")
    ends = config.get("eos_token")
    if not isinstance(ends, str | None):
        raise InputError(f"{path} has an eos_token that is no text")
    found = PromptCache(path, tensors, len(kinds), length, bits, group, most, metadata["0.model"], ends)
    return _with_own(found, metadata[f"0.{OWN}"], arrays) if f"0.{OWN}" in metadata else found


def _with_own(found: PromptCache, written: str, arrays: set[str]) -> PromptCache:
    """The cache with the metadata that only this package writes."""
    own = loads(written, f"the metadata of {found.path}", MAX_CONFIG, AGAIN)
    kinds: dict[str, type] = {"text": str, "ids": list, "fingerprint": dict, "checksums": dict}
    if not isinstance(own, dict) or own.keys() != kinds.keys() or not all(isinstance(own[k], kinds[k]) for k in kinds):
        raise InputError(f"{found.path} has metadata that are not understood")
    if len(own["ids"]) != found.length or not all(type(i) is int for i in own["ids"]):
        raise InputError(f"{found.path} has ids that are not those of its {found.length} tokens")
    if own["checksums"].keys() != arrays:
        raise InputError(f"{found.path} has checksums of other arrays")
    return replace(
        found, text=own["text"], ids=tuple(own["ids"]), fingerprint=own["fingerprint"], checksums=own["checksums"]
    )


def _number(path: Path, tensors: Mapping[str, FileTensor], name: str) -> int:
    tensor = tensors[name]
    if tensor.shape != () or tensor.dtype.kind not in "iu":
        raise InputError(f"{path} has {name}, which is not a whole number")
    return int(tensor.read())


def quantized(x: np.ndarray, group: int) -> Triple:
    """Float values [.., H] with one scale for each H, as JAX's 8-bit cache has them, in MLX's format: codes around 128,
    and the scale once for each group. Values that came from such a cache keep their codes."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    codes = (np.rint(x / scale) + 128).astype(np.uint8)
    scales = np.repeat(scale, x.shape[-1] // group, axis=-1)
    return pack(codes, 8).view("<u4").astype(np.uint32, copy=False), scales, scales * np.float32(-128)


def dequantized(part: Triple, bits: int, group: int) -> np.ndarray:
    """The values of MLX's affine format in float32, [.., H]."""
    words, scales, biases = (np.ascontiguousarray(x) for x in part)
    codes = unpack(words.astype("<u4", copy=False).view(np.uint8), bits).astype(np.float32)
    wide: list[Any] = [np.repeat(x.astype(np.float32), group, axis=-1) for x in (scales, biases)]
    return codes * wide[0] + wide[1]
