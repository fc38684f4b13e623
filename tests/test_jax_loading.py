"""From files to placed arrays: dtype, sharding, and what is read and held meanwhile."""

import collections

import loading_cost
import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from minicpm_jax import load, stream_generate  # noqa: E402
from minicpm_jax.cpu.form import unstack_layers  # noqa: E402
from minicpm_jax.layers.linear import Linear  # noqa: E402
from minicpm_jax.parallel.mesh import use_mesh  # noqa: E402
from minicpm_jax.parallel.sharding import pad_config_over  # noqa: E402
from minicpm_jax.training.losses import packed_loss  # noqa: E402
from minicpm_jax.training.step import weights_of  # noqa: E402
from weights_io.checkpoint import open_checkpoint  # noqa: E402
from weights_io.errors import InputError  # noqa: E402
from weights_io.files.tensor import FileTensor  # noqa: E402
from weights_io.parameters import count, tensor_shapes  # noqa: E402

MESHES = {
    "fsdp8": {"fsdp": 8},
    "tensor8": {"tensor": 8},
    "fsdp2-tensor4": {"fsdp": 2, "tensor": 4},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data8": {"data": 8},
}


@pytest.fixture(scope="module", params=MESHES)
def axes(request):
    return collections.Counter(MESHES[request.param])  # an axis that is not there counts as none


@pytest.fixture(scope="module")
def over_mesh(folder, axes):
    return load(str(folder), mesh=mesh_of(axes))[0]


@pytest.fixture(scope="module")
def whole(folder):
    """Its weights on one device."""
    return weights_of(load(folder)[0])


def mesh_of(axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


@pytest.fixture(scope="module")
def folder(reference):
    return reference("dense_1b")  # V 352, D 96, F 144, NH 96, KH 32: 8 divides all but the two key/value heads


def test_a_folder_without_tokenizer_gives_none(folder):
    model, tokenizer = load(folder)
    assert tokenizer is None
    assert model.eos_token_ids == (2,)


def test_logits_do_not_depend_on_the_mesh(folder, over_mesh):
    data = np.load(folder / "reference.npz")
    logits = np.asarray(over_mesh(data["input_ids"]))
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=2e-5)  # measured: 4.4e-6


def test_each_device_holds_its_part(over_mesh, axes, whole):
    weights = weights_of(over_mesh)
    fsdp, tensor = axes["fsdp"] or 1, axes["tensor"] or 1
    expected = {
        "model.embed_tokens.weight": (352 // tensor, 96 // fsdp),
        "model.layers.self_attn.k_proj.weight": (4, 32 // tensor, 96 // fsdp),
        "model.layers.self_attn.o_proj.weight": (4, 96 // fsdp, 96 // tensor),
        "model.layers.mlp.gate_proj.weight": (4, 144 // tensor, 96 // fsdp),
        "model.layers.mlp.down_proj.weight": (4, 96 // fsdp, 144 // tensor),
        "model.layers.input_layernorm.weight": (4, 96),
    }
    for name, shape in expected.items():
        shards = weights[name].addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert {shard.data.shape for shard in shards} == {shape}, name
        for shard in shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index], err_msg=name)
    held = sum(array.addressable_shards[0].data.size for array in weights.values())
    norms = sum(array.size for name, array in weights.items() if "norm" in name)
    assert held == (count(over_mesh.config) - norms) // (fsdp * tensor) + norms


def test_a_dimension_that_the_mesh_does_not_divide_is_filled_up(reference):
    model, _ = load(reference("dense_2b"), mesh=Mesh(np.array(jax.devices()[:5]), ("tensor",)))
    assert model.model.embed_tokens.weight[...].addressable_shards[0].data.shape == (320 // 5, 96)
    assert model.model.layers.mlp.up_proj.weight[...].addressable_shards[0].data.shape == (3, 145 // 5, 96)
    data = np.load(reference("dense_2b") / "reference.npz")
    np.testing.assert_allclose(np.asarray(model(data["input_ids"])), data["logits"], rtol=0, atol=2e-5)
    whole = weights_of(load(reference("dense_2b"))[0])
    for name, array in weights_of(model).items():  # without what was filled up
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_each_number_is_read_once_and_in_the_rows_of_the_devices(folder, axes, monkeypatch):
    reads = collections.defaultdict(list)
    original = FileTensor.read

    def read(tensor, index=()):
        array = original(tensor, index)
        reads[tensor].append(array.shape)
        return array

    monkeypatch.setattr(FileTensor, "read", read)
    load(folder, mesh=mesh_of(axes))
    config, tensors = open_checkpoint(folder).config, open_checkpoint(folder).tensors
    assert reads.keys() == set(tensors.values())
    fsdp, tensor = axes["fsdp"] or 1, axes["tensor"] or 1
    placed = dict(tensor_shapes(pad_config_over(config, tensor, lanes=1)))  # two key/value heads are as many as devices
    for name, stored in tensors.items():
        embed_first = name.endswith(("o_proj.weight", "down_proj.weight"))
        split = 1 if name.endswith("norm.weight") else fsdp if embed_first else tensor
        own = placed[name][0] // split
        assert reads[stored] == [(own, *stored.shape[1:])] * (stored.shape[0] // own), name


def form_of(model):
    """The name of the form in which the experts run on two rows of five tokens."""
    with use_mesh(model.mesh):
        return getattr(model.model.layers.mlp.form((2, 5)), "__name__", "in place")


def gradients(model, ids):
    return weights_of(jax.jit(jax.grad(packed_loss), static_argnums=2)(model, ids, 1))


@pytest.fixture(scope="module")
def whole_gradients(reference):
    """Of the mixture on one device."""
    folder = reference("moe_8x2b")
    return gradients(load(folder)[0], np.load(folder / "reference.npz")["input_ids"])


@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_experts_on_a_mesh(reference, axes, whole_gradients):
    """Each device holds its experts, and logits, a cached step and gradients do not depend on where they are."""
    folder = reference("moe_8x2b")  # E 8, D 64, F 40
    data = np.load(folder / "reference.npz")
    model, _ = load(folder, mesh=mesh_of(axes))
    expert, fsdp, tensor = (axes.get(name, 1) for name in ("expert", "fsdp", "tensor"))
    weights = weights_of(model)
    w1 = weights["model.layers.mlp.experts.w1.weight"].addressable_shards
    assert {shard.data.shape for shard in w1} == {(3, 8 // expert, 40 // tensor, 64 // fsdp)}
    router = weights["model.layers.mlp.gate.weight"].addressable_shards
    assert {shard.data.shape for shard in router} == {(3, 8, 64 // fsdp)}
    assert (form_of(model) == "dense_experts") == ("expert" in axes)
    np.testing.assert_allclose(np.asarray(model(data["input_ids"])), data["logits"], rtol=0, atol=2e-5)
    prompt, expected = data["prompt_ids"][0].tolist(), data["greedy_ids"][8:].tolist()
    assert [r.token for r in stream_generate(model, None, prompt, max_tokens=24)] == expected
    for name, gradient in gradients(model, jnp.asarray(data["input_ids"])).items():
        whole = np.asarray(whole_gradients[name])
        scale = np.abs(whole).max()
        np.testing.assert_allclose(gradient, whole, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_experts_that_the_mesh_does_not_divide_stay_whole(reference):
    model, _ = load(reference("moe_8x2b"), mesh=Mesh(np.array(jax.devices()[:3]), ("expert",)))
    assert weights_of(model)["model.layers.mlp.experts.w1.weight"].addressable_shards[0].data.shape == (3, 8, 40, 64)
    assert form_of(model) != "dense_experts"


def test_an_axis_of_another_name_is_refused(folder):
    with pytest.raises(InputError, match="the mesh has the axis 'model'; name its axes data, fsdp, tensor, expert"):
        load(folder, mesh=jax.make_mesh((8,), ("model",)))
    with pytest.raises(InputError, match="mesh is 'tensor=2'; give what minicpm_jax.parallel.mesh.make_mesh"):
        load(folder, mesh="tensor=2")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtype(reference, dtype):
    folder = reference("dense_bf16")
    model, _ = load(folder, dtype)
    assert {array.dtype for array in jax.tree.leaves(model)} == {jnp.dtype(dtype or "bfloat16")}
    name = "model.layers.1.mlp.up_proj.weight"
    stored = open_checkpoint(folder).tensors[name].read()
    np.testing.assert_array_equal(
        np.asarray(weights_of(model)["model.layers.mlp.up_proj.weight"][1]),
        stored.astype(jnp.dtype(dtype or "bfloat16")),
    )


def test_on_a_cpu_layers_are_taken_apart_where_they_lie(folder):
    """No second copy: not of what was read, nor of what XLA made itself. A layer that begins elsewhere than at a
    multiple of 64 bytes is copied, and has the same numbers."""
    model = load(folder, "float32")[0]
    for stacked in (model, jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(model)):
        layers = unstack_layers(stacked).model.layers
        for name in ("gate_proj", "down_proj"):
            whole = getattr(stacked.model.layers.mlp, name).weight[...]
            row = whole.nbytes // len(layers)
            begins = [getattr(layer.mlp, name).weight[...].unsafe_buffer_pointer() for layer in layers]
            assert begins == [whole.unsafe_buffer_pointer() + i * row for i in range(len(layers))]
    model.model.layers.mlp.gate_proj = Linear(jnp.arange(4 * 5 * 7.0).reshape(4, 5, 7))
    found = [layer.mlp.gate_proj.weight[...] for layer in unstack_layers(model).model.layers]
    np.testing.assert_array_equal(np.stack(found), model.model.layers.mlp.gate_proj.weight[...])


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


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    # XLA's threads and the compiler's pages only ever add, up to 12 MB where the cores are shared.
    return loading_cost.peaks_and_held("jax", tmp_path_factory.mktemp("big"), tries=2)


@pytest.mark.slow
@pytest.mark.skipif(not loading_cost.MEASURED, reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", loading_cost.DTYPES)
@pytest.mark.parametrize("config", loading_cost.CONFIGS)
def test_peak_memory_is_the_weights_and_less_than_a_layer(costs, config, dtype):
    """Measured: nothing above the weights' 194 MB in float32, 10 above the 97 in bfloat16; a layer has 28."""
    peak, held = costs[config, dtype]
    weights = loading_cost.DTYPES[dtype] * loading_cost.weights(config)
    assert 0.95 * weights < held <= peak < weights + loading_cost.layer(config)
