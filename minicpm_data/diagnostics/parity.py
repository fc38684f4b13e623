"""Check a conversion: compare a model's numbers with those that another program computed from the same weights.

The reference is a ``.npz`` file of numpy arrays. The following keys are compared if it has them (B batch rows,
T tokens, V vocabulary, L layers, D hidden, P tokens of a prompt, N new tokens; X is any ending, such as T80):

    input_ids[_X] [B, T], logits[_X] [B, T, V]; labels [B, T] (-100: not counted) with loss, a mean
    hidden_states [L + 1, T, D] (scaled embeddings, then after each layer) and final_norm [T, D], both of row 0
    left_*, right_*: input_ids, attention_mask, logits, labels, loss of rows that are padded; compared at tokens only
    prompt_ids[_X] [1, P], greedy_ids[_X] [P + N], the prompt included, greedy_logits[_X] [N, V]
    batch_prompt_ids, batch_attention_mask [B, P], padded on the left, batch_greedy_ids [B, P + N]

A result whose key ends in _f32, _bf16 or _f16 comes from a run in that dtype. If a file has such results for the
requested dtype, its other results come from other runs and are skipped.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minicpm_data.diagnostics.arrays_file import read_arrays
from minicpm_data.diagnostics.vision_parity import Following, VisionBackend, has_images
from minicpm_data.diagnostics.vision_parity import compared as compared_images
from minicpm_data.model_options import open_early
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.memory import SMALLER
from weights_io.progress import waiting

IGNORED = -100  # a label that does not count, as in PyTorch
SUFFIXES = {"float32": "_f32", "bfloat16": "_bf16", "float16": "_f16"}
# Differences measured on the reference models (3 and 4 layers): 4e-6 on logits in float32; 0.05 in bfloat16, the same
# as between the original's own runs in bfloat16 and float32; 0.012 in float16, and 0.02 on hidden states after the
# scaling.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.03}
KEYS = "input_ids with logits, or prompt_ids with greedy_ids"


@dataclass(frozen=True)
class Options:
    model: str
    """Model folder, GGUF file, hub id (owner/name, owner/name/folder) or short name of the catalogue."""
    reference: Path
    """The .npz file with the numbers of the other program."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    tolerance: float | None = None
    """Largest difference that holds (times the root mean square of the expected numbers where that is above 1); by
    default 1e-4 in float32, 0.15 in bfloat16, 0.03 in float16."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is downloaded from if it is not on this disk."""

    def placement(self) -> dict[str, Any]:
        """Further arguments of a backend's ``load``."""
        return {}


@dataclass(frozen=True)
class ParityBackend:
    """The functions that a backend supplies. Arrays are numpy arrays, and results are float32."""

    load: Callable[..., tuple[Any, Any]]
    logits: Callable[[Any, np.ndarray, np.ndarray | None], np.ndarray]  # model, ids and mask [B, T] -> [B, T, V]
    states: Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray]]  # model, ids [1, T] -> [L + 1, T, D], [T, D]
    continued: Callable[[Any, list[np.ndarray], np.ndarray], np.ndarray]
    """model, B prompts, tokens [B, N] -> [B, N, V]: the logits that each token is chosen from, through a cache"""
    vision: VisionBackend


@dataclass(frozen=True)
class Pass:
    """One forward pass, and the results of it that the reference has."""

    name: str  # a format for the name of each result: "left_{}", "{}_T80"
    ids: np.ndarray
    mask: np.ndarray | None
    labels: np.ndarray | None
    expected: dict[str, np.ndarray]


@dataclass(frozen=True)
class Continuation:
    """Prompts, the tokens [B, N] after them, and the logits [B, N, V] that each was chosen from, if there are any."""

    name: str
    prompts: list[np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class Result:
    """A comparison of one case."""

    case: str
    worst: float  # largest difference; NaN if our numbers are
    allowed: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.worst <= self.allowed

    def line(self) -> str:
        verdict = "ok" if self.holds else "FAIL"
        return f"{self.case:24} {self.worst:16.2e} {self.allowed:9.2e}  {verdict:5} {self.note}".rstrip()


def run(options: Options, backend: ParityBackend) -> None:
    """Compare a model with a reference and print the result of each case. Exits with 1 if a case fails.

    Arguments:
        options: the command's options.
        backend: the functions of the backend.

    Raises:
        InputError: an option is wrong, or the reference cannot be used.
    """
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    if not 0 <= tolerance < math.inf:
        raise InputError(f"is {tolerance}; it must be a number from 0 on.", option="tolerance")
    reference = Reference(options.reference, options.dtype)
    here = open_early(options)
    with waiting("loading the model"):
        source = {"revision": options.revision, "hub": options.hub, "remedy": SMALLER, **options.placement()}
        model, _ = backend.load(here or options.model, options.dtype, **source)
    compared = comparisons(reference, backend, model, tolerance)
    if not compared:
        raise InputError(f"{options.reference} has no numbers to compare in {options.dtype}; it needs {KEYS}.")
    print(f"{'case':24} {'worst difference':>16} {'allowed':>9}")
    results = []
    with np.errstate(all="ignore"):  # logits that overflow FAIL; a warning would add nothing
        for result in _patiently(itertools.chain(*compared)):
            print(result.line(), flush=True)
            results.append(result)
    failed = [result.case for result in results if not result.holds]
    if failed:
        print(f"{options.model} in {options.dtype}: {len(failed)} of {len(results)} cases FAIL: {', '.join(failed)}")
        sys.exit(1)
    held = "the one case holds" if len(results) == 1 else f"all {len(results)} cases hold"
    print(f"{options.model} in {options.dtype}: {held}")


def comparisons(reference: "Reference", backend: ParityBackend, model: Any, tolerance: float) -> list[Iterator[Result]]:
    """Iterators over the results of all that the reference has."""
    if has_images(reference.arrays):
        return [compare_images(reference, backend, model, tolerance)]
    passes, continuations = reference.passes(model.config), reference.continuations(model.config)
    found = [compare_pass(part, backend, model, tolerance) for part in passes]
    return found + [compare_continuation(part, backend, model, tolerance) for part in continuations]


def compare_images(reference: "Reference", backend: ParityBackend, model: Any, tolerance: float) -> Iterator[Result]:
    """Yields the results of a model that sees (`vision_parity`)."""
    for part in compared_images(reference.arrays, model.config, backend.vision, model):
        if isinstance(part, Following):
            yield compare_tokens(part.case, part.tokens, part.logits, 2 * allowed(part.logits, tolerance))
            continue
        found = difference(part.case, part.ours, part.expected, tolerance)
        yield found if part.allowed is None else replace(found, allowed=part.allowed)


def _patiently(results: Iterator[Result]) -> Iterator[Result]:
    """The same results; `waiting` says so while the next one is computed."""
    for number in itertools.count(1):
        with waiting(f"computing case {number}"):
            result = next(results, None)
        if result is None:
            return
        yield result


def compare_pass(part: Pass, backend: ParityBackend, model: Any, tolerance: float) -> Iterator[Result]:
    """Yields a result for each array of the reference that belongs to a forward pass."""
    expected = part.expected
    if expected.keys() & {"logits", "loss"}:
        logits = backend.logits(model, part.ids, part.mask)
        valid = np.ones(part.ids.shape, bool) if part.mask is None else part.mask == 1
        if "logits" in expected:
            yield difference(part.name.format("logits"), logits[valid], expected["logits"][valid], tolerance)
        if "loss" in expected and part.labels is not None:
            worst = abs(mean_loss(logits, part.labels) - float(expected["loss"]))
            yield Result(part.name.format("loss"), worst, tolerance)
    if expected.keys() & {"hidden_states", "final_norm"}:
        for key, ours in zip(("hidden_states", "final_norm"), backend.states(model, part.ids[:1]), strict=True):
            if key in expected:
                yield difference(part.name.format(key), ours, expected[key], tolerance)


def compare_continuation(part: Continuation, backend: ParityBackend, model: Any, tolerance: float) -> Iterator[Result]:
    """Yields the results of a continuation.

    The model is fed the reference's tokens, so a token that differs does not change the tokens after it. Our tokens
    equal the reference's exactly if a free run's tokens would. A different token holds only as a tie: its lead must be
    within the differences that are allowed for two logits.
    """
    logits = backend.continued(model, part.prompts, part.tokens)
    scale = part.logits if part.logits is not None else logits
    yield compare_tokens(part.name, part.tokens, logits, 2 * allowed(scale, tolerance))
    if part.logits is not None:
        yield difference(part.name.replace("greedy_ids", "greedy_logits"), logits, part.logits, tolerance)


def compare_tokens(case: str, tokens: np.ndarray, logits: np.ndarray, most: float) -> Result:
    """The result of tokens [B, N] that we choose from logits [B, N, V]; another one may lead by at most ``most``."""
    ours = np.argmax(logits, axis=-1)
    lead = np.take_along_axis(logits, ours[..., None], -1) - np.take_along_axis(logits, tokens[..., None], -1)
    other = np.argwhere(ours != tokens)
    note = f"{tokens.size} tokens"
    if other.size:
        row, step = other[0]
        at = f"row {row}, " if len(ours) > 1 else ""
        note += f", {len(other)} differ: {at}new token {step} is {ours[row, step]}, not {tokens[row, step]}"
    return Result(case, float(np.max(lead)), most, note)


def difference(case: str, ours: np.ndarray, expected: np.ndarray, tolerance: float) -> Result:
    """A result with the largest absolute difference between two arrays."""
    worst = np.max(np.abs(ours.astype(np.float64) - expected))
    return Result(case, float(worst), allowed(expected, tolerance))


def allowed(expected: np.ndarray, tolerance: float) -> float:
    """The largest difference that holds. It grows with the numbers, as rounding errors do: hidden states of large
    models are in the hundreds."""
    return tolerance * max(1.0, float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))))


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy in nats; position t - 1 predicts labels[t]."""
    logits, labels = logits[:, :-1].astype(np.float64), labels[:, 1:]
    counted = labels != IGNORED
    picked = np.take_along_axis(logits, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return float((total - picked)[counted].mean())


class Reference:
    """The arrays of a reference file. Each is checked when it is requested."""

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self.arrays = read_arrays(path)
        suffix = SUFFIXES[dtype]
        results = [key.removesuffix(suffix) for key in self.arrays if key.endswith(suffix)]
        self.suffix = suffix if any(self.has_ids(result) for result in results) else ""

    def has_ids(self, result: str) -> bool:
        """Whether the file has the ids of a result; logits_other_f32 without input_ids_other is not compared here."""
        ending = result.partition("logits")[2]
        return any(f"{ids}{ending}" in self.arrays for ids in ("input_ids", "prompt_ids"))

    def passes(self, config: ModelConfig) -> list[Pass]:
        """The forward passes for which the file has results."""
        found = []
        for key in self.arrays:
            prefix, middle, ending = key.partition("input_ids")
            if not middle or prefix not in ("", "left_", "right_") or (prefix and ending):
                continue
            shape = self.arrays[key].shape
            ids = self.ids(key, config, dims=2)
            mask = self.mask(f"{prefix}attention_mask", shape) if prefix else None
            labels, expected = None, {"logits": self.numbers(f"{prefix}logits{ending}", (*shape, config.vocab_size))}
            if f"{prefix}labels" in self.arrays and not ending:
                labels = self.labels(f"{prefix}labels", shape, config)
                expected["loss"] = self.numbers(f"{prefix}loss", ())
            if not prefix and not ending:
                state = (shape[1], config.hidden_size)
                expected["hidden_states"] = self.numbers("hidden_states", (config.num_hidden_layers + 1, *state))
                expected["final_norm"] = self.numbers("final_norm", state)
            given = {name: array for name, array in expected.items() if array is not None}
            if given:
                found.append(Pass(f"{prefix}{{}}{ending}", ids, mask, labels, given))
        return found

    def continuations(self, config: ModelConfig) -> list[Continuation]:
        """The prompts that the file continues."""
        found = []
        for key in self.arrays:
            prefix, middle, ending = key.partition("prompt_ids")
            name = f"{prefix}greedy_ids{ending}"
            if not middle or prefix not in ("", "batch_") or name + self.suffix not in self.arrays:
                continue
            prompts = self.ids(key, config, dims=2)
            tokens = np.atleast_2d(self.ids(name + self.suffix, config, dims=2 if prefix else 1))
            rows, width = prompts.shape
            if len(tokens) != rows or tokens.shape[1] <= width or not np.array_equal(tokens[:, :width], prompts):
                raise self.refuse(name, f"does not continue {key}: each row is the prompt and at least one more token")
            tokens = tokens[:, width:]
            if prefix:
                mask = self.mask("batch_attention_mask", prompts.shape)
                prompts_alone = [row[real == 1] for row, real in zip(prompts, mask, strict=True)]
                found.append(Continuation(name, prompts_alone, tokens, None))
            else:
                logits = self.numbers(f"greedy_logits{ending}", (tokens.size, config.vocab_size))
                found.append(Continuation(name, [prompts[0]], tokens, None if logits is None else logits[None]))
        return found

    def refuse(self, key: str, text: str) -> InputError:
        """The error about an array."""
        return InputError(f"{key} in {self.path} {text}.")

    def ids(self, key: str, config: ModelConfig, dims: int) -> np.ndarray:
        """Token ids [B, T] (or [T]), checked to be in the model's vocabulary."""
        ids = self.whole(key)
        if ids.ndim != dims or ids.size == 0:
            raise self.refuse(key, f"has the shape {list(ids.shape)}, and token ids of {dims} dimensions are needed")
        self.in_vocabulary(key, ids, config)
        return ids.astype(np.int64)

    def labels(self, key: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
        """Labels of the given shape, checked to be in the model's vocabulary or `IGNORED`."""
        labels = self.whole(key)
        if labels.shape != shape or not np.any(labels[:, 1:] != IGNORED):
            raise self.refuse(key, f"has the shape {list(labels.shape)} and is to label tokens {list(shape)}")
        self.in_vocabulary(key, labels[labels != IGNORED], config)
        return labels.astype(np.int64)

    def mask(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """An attention mask of the given shape, checked to have a token in each row."""
        if key not in self.arrays:
            raise self.refuse(key, "is missing; it says which of the ids are padding")
        mask = self.whole(key)
        if mask.shape != shape or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise self.refuse(key, f"is not 1 for tokens and 0 for padding in rows {list(shape)} with a token in each")
        return mask.astype(np.int64)

    def whole(self, key: str) -> np.ndarray:
        """An array, checked to hold whole numbers."""
        if self.arrays[key].dtype.kind not in "iub":
            raise self.refuse(key, f"holds {self.arrays[key].dtype}, and whole numbers are needed")
        return self.arrays[key]

    def in_vocabulary(self, key: str, ids: np.ndarray, config: ModelConfig) -> None:
        """Raises `InputError` where an id is outside the model's vocabulary."""
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if outside.size:
            raise self.refuse(
                key,
                f"holds the id {outside[0]}, and the model's are 0 to {config.vocab_size - 1}; take its own reference",
            )

    def numbers(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """A result of the run in the requested dtype, checked to be finite; None where the file has none."""
        if key + self.suffix not in self.arrays:
            return None
        array = self.arrays[key + self.suffix]
        if array.shape != shape:
            text = f"has the shape {list(array.shape)}, and the model gives {list(shape)}; take its own reference"
            raise self.refuse(key + self.suffix, text)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise self.refuse(key + self.suffix, "does not hold finite floating-point numbers alone")
        return array
