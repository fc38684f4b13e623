"""Layers of MLX that are computed as one give what they give by themselves, and stay what they are."""

import numpy as np
import pytest
import tiny_model

mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten  # noqa: E402

from benchmarks import graph_nodes  # noqa: E402
from minicpm_mlx import load  # noqa: E402
from minicpm_mlx.layers.fused_linear import fuse  # noqa: E402
from minicpm_mlx.quantization.model import quantize_model  # noqa: E402
from minicpm_mlx.training.adapters import attach, init_lora_params  # noqa: E402
from weights_io.adapters import AdapterConfig  # noqa: E402

SHAPE = {"tie_word_embeddings": False, "rope_theta": 10000.0}


@pytest.fixture
def model(tmp_path):
    return load(tiny_model.write(tmp_path, **SHAPE), "float32")[0]


def test_a_decode_step_has_few_nodes(model):
    """Against `mlx_lm`'s model of the same weights."""
    found = dict(graph_nodes.steps(model))
    (expected, most), (apart, apart_nodes), (joined, joined_nodes) = found.values()
    for logits in (apart, joined):
        np.testing.assert_allclose(np.array(logits), np.array(expected), atol=1e-5)
    assert joined_nodes < apart_nodes <= 0.8 * most
    assert joined_nodes <= 0.65 * most


def test_parameters_are_what_they_were(model):
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    held = mx.get_active_memory()
    fuse(model)
    after = tree_flatten(model.parameters())
    assert [name for name, _ in after] == list(before)
    assert all(np.array_equal(np.array(array), before[name]) for name, array in after)
    rows = model.layers[0].self_attn._fused.transposed.nbytes
    assert mx.get_active_memory() <= held + rows  # not twice: four such groups, and larger ones


@pytest.mark.parametrize("change", ["adapter", "quantised", "weight"])
def test_what_changes_a_layer_is_noticed(model, tmp_path, change):
    def changed(model):
        if change == "adapter":
            matrices = init_lora_params(
                model, AdapterConfig(4, 8.0, targets=("k_proj", "up_proj")), range(2), mx.random.key(0)
            )
            for pair in matrices.values():
                pair["b"] = mx.random.normal(pair["b"].shape, key=mx.random.key(1))
            return attach(model, matrices, 2.0)
        if change == "quantised":
            return quantize_model(model, 8)
        model.layers[0].self_attn.v_proj.weight = 2 * model.layers[0].self_attn.v_proj.weight
        model.layers[1].mlp.gate_proj.weight = -model.layers[1].mlp.gate_proj.weight
        return model

    shape = SHAPE | {"intermediate_size": 64}
    first, second = (load(tiny_model.write(tmp_path / name, **shape), "float32")[0] for name in "ab")
    ids = [[7], [4]]  # single tokens, which alone are computed so
    plain = np.array(first(ids))
    expected = np.array(changed(first)(ids))
    fuse(second)
    assert np.abs(plain - expected).max() > 5e-4
    np.testing.assert_allclose(np.array(changed(second)(ids)), expected, atol=1e-5)
