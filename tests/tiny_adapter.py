"""An adapter of random numbers, large enough to move the logits."""

from collections.abc import Sequence

import numpy as np

from weights_io.adapters import Adapter, AdapterConfig, LoRAMatrices, target_parameters
from weights_io.checkpoint import Checkpoint
from weights_io.parameters import module_name


def make(
    checkpoint: Checkpoint,
    targets: Sequence[str] = ("all-linear",),
    layers: Sequence[int] | None = None,
    ranks: Sequence[int] = (4,),
    dora: bool = False,
    seed: int = 0,
) -> Adapter:
    """``ranks`` go round; each rank has a scale of its own, the largest the adapter's 2.0."""
    model, random = checkpoint.config, np.random.default_rng(seed)
    tensors = {}
    for parameter in target_parameters(model, targets):
        rows, columns = parameter.tensor_shape(model)
        for place, name in zip(np.ndindex(*parameter.stack(model)), parameter.hf_names(model), strict=True):
            if layers is not None and place[0] not in layers:
                continue
            rank = ranks[len(tensors) % len(ranks)]
            a, b = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
            lengths = np.linalg.norm(checkpoint.tensors[name].read().astype(np.float32), axis=1)
            magnitude = (lengths * random.uniform(0.5, 1.5, rows)).astype(np.float32) if dora else None
            scale = 2.0 * (1 + max(ranks) - rank)
            tensors[module_name(name)] = LoRAMatrices(a, b, magnitude, scale)
    names = tuple(dict.fromkeys(name.rpartition(".")[2] for name in tensors))
    return Adapter(AdapterConfig(max(ranks), 2.0 * max(ranks), dora=dora, targets=names), tensors)


def same(found: Adapter, expected: Adapter) -> None:
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name, matrices in expected.tensors.items():
        for part in ("a", "b", "magnitude"):
            array, wanted = getattr(found.tensors[name], part), getattr(matrices, part)
            np.testing.assert_array_equal(array, wanted, err_msg=f"{name} {part}")
        np.testing.assert_allclose(found.tensors[name].scale, matrices.scale, rtol=1e-6)
