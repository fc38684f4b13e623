"""From files to arrays: dtype, and what is held meanwhile."""

import loading_cost
import ml_dtypes
import numpy as np
import pytest
import tiny_model

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from minicpm_mlx import load  # noqa: E402
from minicpm_mlx.quantization.model import quantize_model  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def folder(reference):
    return reference("dense_1b")


def test_a_folder_without_tokenizer_gives_none(folder):
    model, tokenizer = load(folder)
    assert tokenizer is None
    assert model.eos_token_ids == (2,)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtype(reference, dtype):
    folder = reference("dense_bf16")
    model, _ = load(folder, dtype)
    weights = dict(tree_flatten(model.parameters()))
    assert {array.dtype for array in weights.values()} == {getattr(mx, dtype or "bfloat16")}
    name = "model.layers.1.mlp.up_proj.weight"
    stored = open_checkpoint(folder).tensors[name].read().astype(dtype or ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(weights[name].astype(mx.float32)), stored.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_another_dtype_is_refused(folder, dtype):
    with pytest.raises(InputError, match=f"dtype '{dtype}' is not supported; choose float32, bfloat16 or float16."):
        load(folder, dtype)


def test_what_is_no_adapter_is_refused_and_not_passed_over(folder, tmp_path):
    with pytest.raises(InputError, match="is no adapter: give the folder"):
        load(folder, adapter=tmp_path)


def test_a_path_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json does not exist"):
        load(tmp_path)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_while_it_is_read_is_what_a_loaded_model_would_be_packed_to(tmp_path, dtype, experts):
    """And no more than the packed weights and the largest array of the model is held, from files that are mapped
    (float32) or cast. Packed afterwards it was all of both."""
    shape = {"num_experts": experts, "num_experts_per_tok": 2} if experts else {}
    folder = tiny_model.write(tmp_path, hidden_size=64, intermediate_size=64, num_hidden_layers=6, **shape)
    for head in (False, True):
        whole = load(folder, dtype)[0]
        largest = max(x.nbytes for _, x in tree_flatten(whole.parameters()))
        expected = dict(tree_flatten(quantize_model(whole, 8, head).parameters()))
        mx.eval(expected)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = dict(tree_flatten(load(folder, dtype, quantize=8, quantize_head=head)[0].parameters()))
        mx.eval(found)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(array, expected[name]) for name, array in found.items())
        held = sum(array.nbytes for array in found.values())
        assert mx.get_peak_memory() - before < held + 1.5 * largest


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    return loading_cost.peaks_and_held("mlx", tmp_path_factory.mktemp("big"))


@pytest.mark.slow
@pytest.mark.skipif(not loading_cost.MEASURED, reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", loading_cost.DTYPES)
@pytest.mark.parametrize("config", loading_cost.CONFIGS)
def test_peak_memory_is_the_weights_and_less_than_a_layer(costs, config, dtype):
    """Measured: nothing above the weights' 194 MB where they are mapped; 13 above the 97 where they are cast to
    bfloat16, and a layer of the file has 28."""
    peak, held = costs[config, dtype]
    weights = loading_cost.DTYPES[dtype] * loading_cost.weights(config)
    assert 0.95 * weights < held
    assert max(held, peak) < weights + loading_cost.layer(config)  # equal to a page where nothing but weights is held
