"""Quantized folders of other shapes than tests/reference/quant are the model of their dequantized weights."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_quantized as tools
import tiny_tokenizer
import tiny_training
from jax.sharding import SingleDeviceSharding
from mlx.utils import tree_flatten

import minicpm_jax
import minicpm_mlx
from minicpm_data import load_tokenizer
from minicpm_jax.aot import hlo_cost
from minicpm_jax.parallel.chips import Topology
from minicpm_jax.quantization.table import TableWeight
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, open_file, write_file
from weights_io.fuse import Options
from weights_io.fuse import main as fuse

IDS = np.random.default_rng(0).integers(0, 128, (2, 7)).astype(np.int32)
ODD = {"hidden_size": 72, "intermediate_size": 88, "num_attention_heads": 3, "num_key_value_heads": 3}
WHOLE = {"skip": ()}  # embedding and head are quantized too
MIXED = {**WHOLE, "tools": {"o_proj": tools.mlx(8, 32)[0], "layers.1.mlp.up_proj": tools.mlx(6, 64)[0]}}
PARTS = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
CASES = {
    "2b gptq in 8 bits": ("2b", tools.gptq(8, 64, sym=True), {}),
    "2b gptq with act-order in odd groups": ("2b", tools.gptq(4, 16, act_order=True), {}),
    "2b gptq with a smaller last group": ("2b", tools.gptq(4, 64, act_order=True), PARTS),
    "2b gptq in groups larger than a row": ("2b", tools.gptq(3, 128, version="gptq_v2"), PARTS),
    "2b nf4 with its head": ("2b", tools.bnb(), {"skip": ("embed_tokens",)}),
    "2b mixed bits": ("2b", tools.mlx(4, 64), MIXED),
    "2b tied": ("2b", tools.mlx(8, 32), {**WHOLE, "tie_word_embeddings": True}),
    "llama gptq in whole rows": ("llama", tools.gptq(4, -1), {}),
    "llama nf4, double": ("llama", tools.bnb("nf4", double=True), {"tie_word_embeddings": True}),
    "minicpm3 gptq": ("minicpm3", tools.gptq(4, 128, sym=True, act_order=True), {}),
    "minicpm3 fp4": ("minicpm3", tools.bnb("fp4"), {}),
    "moe gptq with act-order": ("moe", tools.gptq(4, 32, act_order=True), {}),
    "moe gptq in odd groups": ("moe", tools.gptq(3, 16, act_order=True, version="gptq_v2"), {}),
    "moe nf4": ("moe", tools.bnb(), {}),
    "odd awq": ("2b", tools.awq(-1), ODD),
    "odd nf4": ("2b", tools.bnb(), ODD),
    "odd int8": ("2b", tools.bnb_int8(), ODD),
}
IN_JAX = ("2b nf4 with its head",)  # the others take seconds to compile


def written(folder, name, **changes):
    shape, (tool, entry), more = CASES[name]
    return tools.write(folder, shape, tool, entry, **{**more, **changes})


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_dequantized_model(tmp_path, capsys, name):
    """Bit for bit in the matrices, to 1e-5 in the logits; and nothing is dequantized in memory."""
    packed, whole = written(tmp_path, name, num_hidden_layers=2 if name == "2b mixed bits" else 1)
    for tensor, own in open_checkpoint(packed).tensors.items():
        np.testing.assert_array_equal(own.read(), open_checkpoint(whole).tensors[tensor].read(), err_msg=tensor)
    expected = np.array(minicpm_mlx.load(whole)[0](IDS))
    close = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    model = minicpm_mlx.load(packed, "float32")[0]
    np.testing.assert_allclose(np.array(model(IDS)), expected, **close)
    np.testing.assert_allclose(np.array(model(IDS[:1, :1])), expected[:1, :1], **close)  # the experts of one row
    half = minicpm_mlx.load(packed)[0]
    held = sum(array.nbytes for _, array in tree_flatten(half.parameters()))
    # Blocks of 64 that end inside of rows become groups of 8; 3 bits in odd groups take 4.
    # A scale of 64 inputs is repeated for each 32.
    most = {"odd nf4": 1.1, "2b gptq with a smaller last group": 1.2, "moe gptq in odd groups": 1.15}.get(name, 1.05)
    assert held < most * (packed / "model.safetensors").stat().st_size
    assert np.isfinite(np.array(half(IDS))).all()
    if name in IN_JAX:
        found = minicpm_jax.load(packed, "float32", decoding=True)[0](IDS)
        np.testing.assert_allclose(np.array(found), expected, **close)
    assert "dequantized in memory" not in capsys.readouterr().err


def test_a_table_over_a_mesh(tmp_path):
    """Each expert's codes are split over the devices, and its table is on all."""
    packed, whole = written(tmp_path, "moe nf4", num_hidden_layers=1)
    model, _ = minicpm_jax.load(packed, "float32", mesh=jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor")))
    weight = model.model.layers.mlp.experts.w1.weight
    assert weight.qweight.sharding.shard_shape(weight.qweight.shape) == (1, 2, 64, 64)
    expected = np.array(minicpm_mlx.load(whole)[0](IDS))
    np.testing.assert_allclose(np.array(model(IDS)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_table_that_is_no_number_is_refused(tmp_path):
    packed, _ = written(tmp_path, "2b nf4 with its head", num_hidden_layers=1)
    file = packed / "model.safetensors"
    tensors = {name: Computed.of(tensor.read()) for name, tensor in open_file(file).items()}
    name = "model.layers.0.mlp.up_proj.weight.quant_map"
    write_file(file, tensors | {name: Computed.of(np.full(16, np.nan, np.float32))})
    for backend in (minicpm_jax, minicpm_mlx):
        with pytest.raises(InputError, match="up_proj.weight in .* holds NaN or infinite numbers"):
            backend.load(packed)


@pytest.mark.tpu
@pytest.mark.parametrize(("rows", "most"), [(1, 0.27), (512, 0.4)])
def test_a_program_for_a_tpu_never_holds_a_table_dequantized(rows, most):
    """Of the weights' bytes in bfloat16, of which 0.2656 are stored; 512 rows have activations too."""
    place = SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    layers, width = 4, 2048

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def run(x, qweight, scales, table):
        def layer(x, parts):
            return jax.nn.silu(TableWeight(*parts, jnp.bfloat16).times(x)), None

        return jax.lax.scan(layer, x, (qweight, scales, table))[0]

    weights = array(jnp.int4, layers, width, width), array(jnp.bfloat16, layers, width // 64, width)
    inputs = array(jnp.bfloat16, 1, rows, width), *weights, array(jnp.float32, layers, 16)
    compiled = jax.jit(run).lower(*inputs).compile()
    read = hlo_cost.traffic(compiled.as_text()).hbm / (2 * layers * width * width)
    print(f"{rows} rows: {read:.4f} of the bytes in bfloat16")
    assert read < most and compiled.memory_analysis().temp_size_in_bytes < 2e6


@pytest.mark.parametrize(
    ("backend", "name", "dora"),
    [
        ("minicpm_jax", "2b nf4 with its head", False),
        ("minicpm_mlx", "2b mixed bits", False),
        ("minicpm_mlx", "2b gptq with act-order in odd groups", True),
        ("minicpm_mlx", "moe gptq with act-order", False),
        ("minicpm_mlx", "moe nf4", True),
    ],
)
def test_adapters_train_on_it_and_fuse_into_the_source(tmp_path, capsys, backend, name, dora):
    """The fused source has the logits of the quantized base with its adapter, as the base has no error here."""
    tiny_tokenizer.write(tmp_path / "tokenizer")
    rows = -(-load_tokenizer(tmp_path / "tokenizer").vocab_size // 32) * 32
    packed, whole = written(tmp_path, name, num_hidden_layers=1, vocab_size=rows)
    for folder in (packed, whole):
        shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
    tiny_training.write_data(tmp_path / "data", tiny_training.chats(4))
    (tmp_path / "model").symlink_to(packed)
    kind = {"fine_tune_type": "dora" if dora else "lora", "targets": ("all-linear",), "dropout": 0.0}
    tiny_training.finetune(backend, tiny_training.lora(tmp_path, tmp_path / "adapter", iters=2, val_batches=0, **kind))
    for source, out in ((whole, "from-source"), (packed, "from-packed")):
        fuse(Options(str(source), (tmp_path / "adapter",), save_path=tmp_path / out))
    assert "packed is quantized (" in capsys.readouterr().out
    loaded = ((packed, {"adapter": tmp_path / "adapter"}), (tmp_path / "from-source", {}), (packed, {}))
    adapted, fused, base = (np.array(minicpm_mlx.load(path, "float32", **how)[0](IDS)) for path, how in loaded)
    assert np.abs(adapted - base).max() > 0.01 * np.abs(base).max()
    np.testing.assert_allclose(fused, adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
