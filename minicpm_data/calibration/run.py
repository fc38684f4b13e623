"""Quantize a model layer by layer. What is done is kept in a folder beside the output, so that a killed run goes on."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_data.calibration import awq, gptq
from minicpm_data.calibration.inputs import InputStats, LayerRunner, groups_of
from weights_io.checkpoint import Checkpoint
from weights_io.errors import InputError
from weights_io.files.partial import partial, write_whole
from weights_io.files.safetensors import Computed
from weights_io.parameters import EMBEDDING, tensor_shapes
from weights_io.progress import progress_bar
from weights_io.quantization.packed import Packed
from weights_io.quantization.zero_points import ZeroPoints
from weights_io.write import Tensor

UNFINISHED = ".calibrating"  # suffix of the folder with the layers that are done


@dataclass(frozen=True)
class Layer:
    """A quantized layer.

    Attributes:
        packed: module within the layer -> its codes.
        changed: tensor within the layer -> array, where AWQ folded factors into it.
        error: of the layer's outputs, relative to them (root mean square).
    """

    packed: Mapping[str, Packed]
    changed: Mapping[str, np.ndarray]
    error: float


class Calibration:
    """Quantizes a model's layers.

    Arguments:
        checkpoint: the model.
        runner: runs its layers.
        form: ``gptq`` or ``awq``; also the format that is written.
        bits, group_size: of the codes.
        work: folder for the layers that are done.
        settings: what the layers depend on; a run with others does not go on from them.

    Raises:
        InputError: the model has experts, the group size does not divide a matrix, or ``work`` is of other settings.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: LayerRunner,
        form: str,
        bits: int,
        group_size: int,
        work: Path,
        settings: Mapping[str, Any],
    ):
        self.checkpoint, self.runner, self.form, self.work = checkpoint, runner, form, work
        self.bits, self.group_size = bits, group_size
        self.groups = groups_of(checkpoint.config)
        ZeroPoints(form, bits, group_size).matrices(checkpoint.config)
        self._layers: list[Layer] = []
        stated = work / "settings.json"
        if work.exists():
            if not stated.is_file() or json.loads(stated.read_text("utf-8")) != dict(settings):
                raise InputError(f"{work} is of a run with other settings; finish that one, or remove the folder.")
        else:
            work.mkdir(parents=True)
            write_whole(stated, json.dumps(dict(settings)))

    def run(self, ids: np.ndarray) -> list[float]:
        """Quantize all layers.

        Arguments:
            ids: [n, T] token ids of the calibration texts.

        Returns:
            The error of each layer.
        """
        config = self.checkpoint.config
        table = np.asarray(self.checkpoint.tensors[EMBEDDING.hf_name].read(), np.float32)
        x, count = table[ids] * np.float32(config.embedding_scale), config.num_hidden_layers
        del table
        with progress_bar("layers", count, unit="layer") as bar:
            for number in range(count):
                weights = self._weights(number)
                done = self._read(number)
                if done is None:
                    done = self._quantized(weights, x)
                    self._write(number, done)
                x = self._run(self._with_codes(weights, done), x, {})
                self._layers.append(done)
                bar.set_postfix_str(f"error {done.error:.2%}")
                bar.update(1)
        return [layer.error for layer in self._layers]

    def packing(self) -> ZeroPoints:
        """The format to write, with the codes that were chosen."""

        def chosen(module: str, matrix: np.ndarray) -> Packed:
            _, _, number, name = module.split(".", 3)
            return self._layers[int(number)].packed[name]

        return ZeroPoints(self.form, self.bits, self.group_size, self.form == "gptq", chosen)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, before they are quantized."""
        found: dict[str, Tensor] = {
            name: self.checkpoint.tensors[name] for name, _ in tensor_shapes(self.checkpoint.config)
        }
        for number, layer in enumerate(self._layers):
            found |= {f"model.layers.{number}.{name}": Computed.of(array) for name, array in layer.changed.items()}
        return found

    def remove(self) -> None:
        """Remove the folder with the layers that are done."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _run(self, weights: Mapping[str, np.ndarray], x: np.ndarray, recorded: Mapping[str, InputStats]) -> np.ndarray:
        return self.runner(self.checkpoint.config, weights, x, recorded)

    def _weights(self, number: int) -> dict[str, np.ndarray]:
        start = f"model.layers.{number}."
        names = [name for name, _ in tensor_shapes(self.checkpoint.config) if name.startswith(start)]
        return {n.removeprefix(start): np.asarray(self.checkpoint.tensors[n].read(), np.float32) for n in names}

    def _quantized(self, weights: dict[str, np.ndarray], x: np.ndarray) -> Layer:
        recorded = {
            group.modules[0]: InputStats.empty(weights[f"{group.modules[0]}.weight"].shape[1]) for group in self.groups
        }
        expected = self._run(weights, x, recorded)
        if self.form == "gptq":
            packed = {
                module: gptq.quantize(
                    weights[f"{module}.weight"], recorded[group.modules[0]], self.bits, self.group_size, symmetric=True
                )
                for group in self.groups
                for module in group.modules
            }
            changed: dict[str, np.ndarray] = {}
        else:
            packed, changed = self._by_awq(dict(weights), recorded)
        layer = Layer(packed, changed, 0.0)
        found = self._run(self._with_codes(weights, layer), x, {})
        scale = float(np.square(expected - x, dtype=np.float64).mean())  # of what the layer adds
        error = float(np.square(found - expected, dtype=np.float64).mean())
        return Layer(packed, changed, (error / (scale or 1)) ** 0.5)

    def _by_awq(
        self, weights: dict[str, np.ndarray], recorded: Mapping[str, InputStats]
    ) -> tuple[dict[str, Packed], dict[str, np.ndarray]]:
        inputs: dict[str, InputStats] = {}
        touched: set[str] = set()
        for group in self.groups:
            stats = recorded[group.modules[0]]
            if group.before is not None:
                matrices = {module: weights[f"{module}.weight"] for module in group.modules}
                factor = awq.best_factor(matrices, stats, self.bits, self.group_size)
                awq.fold(weights, group, factor)
                stats = awq.scaled(stats, factor)
                touched |= {f"{module}.weight" for module in (*group.modules, group.before)}
            inputs |= dict.fromkeys(group.modules, stats)
        packed = {
            module: awq.quantize(module, weights[f"{module}.weight"], stats, self.bits, self.group_size)
            for module, stats in inputs.items()
        }
        norms = {name: weights[name] for name in touched if weights[name].ndim == 1}
        return packed, norms

    def _with_codes(self, weights: Mapping[str, np.ndarray], layer: Layer) -> dict[str, np.ndarray]:
        rounded = {f"{module}.weight": packed.dequantize() for module, packed in layer.packed.items()}
        return {**weights, **layer.changed, **rounded}

    def _path(self, number: int) -> Path:
        return self.work / f"layer-{number:04d}.npz"

    def _write(self, number: int, layer: Layer) -> None:
        arrays: dict[str, np.ndarray] = {"error": np.array(layer.error)}
        for module, packed in layer.packed.items():
            assert packed.zeros is not None
            arrays |= {
                f"{module}:codes": packed.codes,
                f"{module}:scales": packed.scales,
                f"{module}:zeros": packed.zeros,
            }
        arrays |= {f"{name}:changed": array for name, array in layer.changed.items()}
        with partial(self._path(number)) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _read(self, number: int) -> Layer | None:
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                arrays = dict(saved)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}); remove it, and the layer is quantized again.") from None
        packed = {}
        for name in arrays:
            module, _, part = name.partition(":")
            if part == "codes":
                scales, zeros = arrays[f"{module}:scales"], arrays[f"{module}:zeros"]
                packed[module] = Packed(arrays[name], scales, self.bits, self.group_size, zeros=zeros)
        changed = {n.removesuffix(":changed"): array for n, array in arrays.items() if n.endswith(":changed")}
        return Layer(packed, changed, float(arrays["error"]))
