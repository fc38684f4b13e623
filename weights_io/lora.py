"""Low-rank adapters as numpy arrays: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

An adapter holds its matrices by Hugging Face module name, one pair per layer and expert. Three forms are made of it:

- stacked over layers and experts, for the JAX model: `stack_adapter`, and back `unstack_adapter`;
- one entry per layer, for the MLX model: `adapter_by_layer`, and back `adapter_from_layers`;
- added to the weights of a checkpoint: `fuse_adapter`.

Dims: r rank, I in, O out features of a matrix.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weights_io.casting import Rounding, cast, check_finite, numpy_dtype
from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed
from weights_io.files.tensor import LazyTensor, located
from weights_io.parameters import Parameter, module_name, parameters

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # a, b and DoRA's magnitude
RowNorms = Callable[[str], np.ndarray]  # Hugging Face tensor name -> the Euclidean norm [O] of each row


@dataclass(frozen=True)
class AdapterConfig:
    """The hyperparameters of an adapter. Raises `InputError` for a rank, alpha or dropout out of range."""

    rank: int  # r; the largest one where the matrices differ in rank
    alpha: float  # the update is alpha / rank * B A
    dropout: float = 0.0  # on the input of A, in training only
    dora: bool = False
    targets: tuple[str, ...] | None = None  # None: `parameters.default_targets`
    base_model: str | None = None  # a note for the reader: the model that the adapter was trained on

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"the adapter's rank is {self.rank}; it must be a positive whole number.")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise InputError(f"the adapter's alpha is {self.alpha}; it must be a positive number.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"the adapter's dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoRAMatrices:
    """The update of one matrix W [O, I] to W + scale B A. DoRA then rescales each row to the norm ``magnitude``."""

    a: np.ndarray  # [r, I] float32
    b: np.ndarray  # [O, r] float32
    magnitude: np.ndarray | None = None  # [O] float32; DoRA only
    scale: float = 1.0

    def change(self) -> np.ndarray:
        """scale B A, [O, I] float32."""
        return np.float32(self.scale) * (self.b @ self.a)

    def applied(self, weight: np.ndarray) -> np.ndarray:
        """The updated ``weight`` [O, I], computed in float32 (DoRA: equation 5 of its paper)."""
        changed = weight.astype(np.float32) + self.change()
        if self.magnitude is None:
            return changed
        norms = np.linalg.norm(changed, axis=1)
        return changed * (self.magnitude / np.where(norms > 0, norms, 1))[:, None]  # a row of zeros has no direction


@dataclass(frozen=True)
class Adapter:
    """An adapter of one model: its hyperparameters and its matrices."""

    config: AdapterConfig
    tensors: Mapping[str, LoRAMatrices]  # by module name: "model.layers.3.mlp.experts.5.w1"; their scales may differ


def combined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter whose update of each matrix is the weighted sum of theirs. Its rank is the sum of their ranks.

    Arguments:
        adapters: of the same model.
        weights: factor of each.

    Returns:
        The adapter; the given one, if it is one and its weight is 1.

    Raises:
        InputError: one of several is DoRA, whose update is not a sum.
    """
    if len(adapters) == 1 and weights[0] == 1:
        return adapters[0]
    if any(adapter.config.dora for adapter in adapters):
        raise InputError("an adapter is DoRA, whose rescaled rows cannot be weighted or added; fuse it alone.")
    tensors = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.tensors):
        found = [(a.tensors[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.tensors]
        b = [np.float32(weight * matrices.scale) * matrices.b for matrices, weight in found]
        tensors[module] = LoRAMatrices(np.concatenate([m.a for m, _ in found]), np.concatenate(b, axis=1))
    rank = sum(adapter.config.rank for adapter in adapters)
    return Adapter(AdapterConfig(rank, float(rank)), tensors)


@dataclass
class UpdateStats:
    """Sums of squares that tell how much an adapter changes the weights, and how much of the change rounding loses."""

    weights: float = 0.0  # of the adapted weights
    moved: float = 0.0  # of the update
    lost: float = 0.0  # of the rounding errors

    def add(self, weight: np.ndarray, exact: np.ndarray, rounded: np.ndarray) -> None:
        weight = weight.astype(np.float32)
        self.weights += _squares(weight)
        self.moved += _squares(exact - weight)
        self.lost += _squares(rounded.astype(np.float32) - exact)

    @property
    def size(self) -> float:
        """Root mean square of the update, relative to the weights."""
        return math.sqrt(self.moved / (self.weights or 1))

    @property
    def error(self) -> float:
        """Root mean square of the rounding errors, relative to the update."""
        return math.sqrt(self.lost / (self.moved or 1))


def row_norms(checkpoint: Checkpoint) -> RowNorms:
    """The row norms of a checkpoint's matrices, the initial magnitudes of DoRA. Each tensor is read when asked for."""
    return lambda tensor: np.linalg.norm(checkpoint.read(tensor, "float32").astype(np.float32), axis=1)


def stack_adapter(parameter: Parameter, adapter: Adapter, model: ModelConfig, norms: RowNorms | None = None) -> Arrays:
    """An adapter's arrays for one parameter of the JAX model, stacked over layers and experts.

    Smaller ranks are padded with zeros to the config's rank. A scale that differs from the config's is folded into b,
    so that ``adapter.config.scale`` holds for all. A layer or expert without an adapter gets zeros.

    Arguments:
        parameter: the row of the parameter table.
        adapter: the adapter.
        model: the model's config.
        norms: the row norms of the weights (`row_norms`). DoRA needs them for layers without an adapter.

    Returns:
        a [*stack, r, I], b [*stack, O, r] and, for DoRA, magnitude [*stack, O], where ``stack`` is
        ``parameter.stack(model)``; float32.

    Raises:
        ValueError: DoRA, a layer without an adapter, and no ``norms``.
    """
    stack = parameter.stack(model)
    found = [_padded(parameter, tensor, adapter, model, norms) for tensor in parameter.hf_names(model)]
    a, b, magnitude = _joined(found)
    return _reshaped(a, stack), _reshaped(b, stack), None if magnitude is None else _reshaped(magnitude, stack)


def adapter_by_layer(parameter: Parameter, adapter: Adapter, model: ModelConfig) -> dict[str, Arrays]:
    """An adapter's arrays for one parameter of the MLX model, padded and scaled as in `stack_adapter`.

    Arguments: as for `stack_adapter`.

    Returns:
        Module name in the MLX model (``model.layers.3.mlp.experts.w1``) -> a [r, I], b [O, r] and, for DoRA,
        magnitude [O]; experts have a leading axis E. Layers without an adapter are left out.
    """
    result = {}
    for name, tensors in parameter.mlx_names(model).items():
        if not any(module_name(tensor) in adapter.tensors for tensor in tensors):
            continue
        found = [_padded(parameter, tensor, adapter, model, norms=None) for tensor in tensors]
        result[module_name(name)] = _joined(found) if parameter.per_expert else found[0]
    return result


def unstack_adapter(
    config: AdapterConfig, arrays: Mapping[str, Arrays], model: ModelConfig, layers: Collection[int] | None = None
) -> Adapter:
    """The inverse of `stack_adapter`.

    Arguments:
        config: the adapter's hyperparameters.
        arrays: `Parameter.name` -> a, b and magnitude; anything that ``np.asarray`` takes.
        model: the model's config.
        layers: the layers that have an adapter; None means all.
    """
    table = {p.name: p for p in parameters(model)}
    tensors = {}
    for name, (a, b, magnitude) in arrays.items():
        parameter = table[name]
        for place, tensor in zip(np.ndindex(*parameter.stack(model)), parameter.hf_names(model), strict=True):
            if layers is None or place[0] in layers:
                tensors[module_name(tensor)] = _matrices(config, a[place], b[place], _at(magnitude, place))
    return Adapter(config, tensors)


def adapter_from_layers(config: AdapterConfig, arrays: Mapping[str, Arrays], model: ModelConfig) -> Adapter:
    """The inverse of `adapter_by_layer`; ``arrays`` are keyed by module name in the MLX model."""
    table = {module_name(name): p for p in parameters(model) for name in p.mlx_names(model)}
    tensors = {}
    for name, (a, b, magnitude) in arrays.items():
        parameter = table[name]
        for i, tensor in enumerate(parameter.mlx_names(model)[f"{name}.weight"]):
            place = (i,) if parameter.per_expert else ()
            tensors[module_name(tensor)] = _matrices(config, a[place], b[place], _at(magnitude, place))
    return Adapter(config, tensors)


def fuse_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    dtype: str | None = None,
    rounding: Rounding | None = None,
    change: UpdateStats | None = None,
) -> dict[str, LazyTensor | Computed]:
    """The checkpoint's tensors with the adapter added to the weights. A tensor is computed when it is read.

    Arguments:
        checkpoint: the base model.
        adapter: its adapter.
        dtype: dtype of the adapted tensors, which are computed in float32; None keeps each tensor's own.
        rounding: collects the rounding errors as the tensors are read.
        change: collects the size of the update as the tensors are read.

    Returns:
        Hugging Face name -> tensor. Tensors without an adapter are the checkpoint's own.
    """
    result: dict[str, LazyTensor | Computed] = dict(checkpoint.tensors)
    for module, matrices in adapter.tensors.items():
        result[f"{module}.weight"] = _fused(f"{module}.weight", checkpoint, matrices, dtype, rounding, change)
    return result


def _fused(
    name: str,
    checkpoint: Checkpoint,
    matrices: LoRAMatrices,
    dtype: str | None,
    rounding: Rounding | None,
    change: UpdateStats | None,
) -> Computed:
    tensor = checkpoint.tensors[name]
    target = numpy_dtype(dtype or tensor.dtype)

    def make() -> np.ndarray:
        weight = tensor.read()
        check_finite(located(name, tensor), weight)
        exact = matrices.applied(weight)
        rounded = cast(f"{name}, fused,", exact, target, rounding=rounding)
        if change is not None:
            change.add(weight, exact, rounded)
        return rounded

    return Computed(tuple(tensor.shape), target, make)


def _padded(parameter: Parameter, tensor: str, adapter: Adapter, model: ModelConfig, norms: RowNorms | None) -> Arrays:
    """The a, b and magnitude of one matrix, in the rank and scale of the whole adapter; zeros without an adapter."""
    rows, columns = parameter.tensor_shape(model)
    config, magnitude = adapter.config, None
    a, b = np.zeros((config.rank, columns), np.float32), np.zeros((rows, config.rank), np.float32)
    found = adapter.tensors.get(module_name(tensor))
    if found is not None:
        rank = len(found.a)
        a[:rank], b[:, :rank] = found.a, found.b * np.float32(found.scale / config.scale)
        magnitude = found.magnitude
    elif config.dora:
        if norms is None:
            raise ValueError(f"DoRA has no magnitudes for {tensor}: give the row norms of its weights")
        magnitude = norms(tensor)
    return a, b, magnitude


def _joined(found: list[Arrays]) -> Arrays:
    magnitudes = [magnitude for _, _, magnitude in found if magnitude is not None]
    return (
        np.stack([a for a, _, _ in found]),
        np.stack([b for _, b, _ in found]),
        np.stack(magnitudes) if magnitudes else None,
    )


def _reshaped(array: np.ndarray, stack: tuple[int, ...]) -> np.ndarray:
    """[L * E, ...] as [*stack, ...]."""
    return array.reshape(*stack, *array.shape[1:])


def _matrices(config: AdapterConfig, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None) -> LoRAMatrices:
    lengths = None if magnitude is None else np.asarray(magnitude, np.float32)
    return LoRAMatrices(np.asarray(a, np.float32), np.asarray(b, np.float32), lengths, config.scale)


def _at(array: np.ndarray | None, place: tuple[int, ...]) -> np.ndarray | None:
    return None if array is None else array[place]


def _squares(array: np.ndarray) -> float:
    return float(np.square(array).sum(dtype=np.float64))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
