"""GGUF files: the tensors and the config of the Hugging Face checkpoint that they were made of."""

import json
import struct
from pathlib import Path

import gguf as package
import ml_dtypes
import numpy as np
import pytest

from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files import gguf

HIDDEN, HEADS, KV_HEADS, ROWS = 64, 4, 2, 40  # of the files made here; head size 16
NUMBERS = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
SCALES = {"embedding_scale": 12.0, "residual_scale": 1.4, "logit_scale": HIDDEN / 16}
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(ROWS, HIDDEN)).astype(np.float32)
QUERY = RNG.normal(size=(HIDDEN, HIDDEN)).astype(np.float32)
KEY = RNG.normal(size=(HIDDEN // 2, HIDDEN)).astype(np.float32)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores q and k (weights or biases)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def made(path: Path, architecture: str = "minicpm", numbers=NUMBERS, tensors=(), **metadata) -> Path:
    """A file of one q and one k projection. Metadata without a dot goes behind the architecture's name."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in (numbers | metadata).items():
        key = key if key.startswith(("tokenizer", "split", "general")) else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", EMBEDDING)
    kind = package.GGMLQuantizationType.Q4_0
    writer.add_tensor("blk.0.attn_q.weight", package.quantize(permuted(QUERY, HEADS), kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_k.weight", permuted(KEY, KV_HEADS).astype(np.float16))
    for name, array in dict(tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        gguf.open_file(path)
    assert "\n" not in str(caught.value)


def test_reference_config_and_tensors(reference):
    file = gguf.open_file(reference("gguf") / "model-q4_0.gguf")
    original = json.loads((reference("gguf") / "config.json").read_text())
    for key, value in file.config.items():
        assert value == original[key], key
    known = np.load(reference("gguf") / "reference.npz")
    for module in ("self_attn.k_proj", "mlp.down_proj"):
        expected = known[f"deq.q4_0.model.layers.0.{module}"]
        tensor = file.tensors[f"model.layers.0.{module}.weight"]
        assert tensor.shape == expected.shape and tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), expected)
        part = (slice(3, 77), slice(40, 99))
        np.testing.assert_array_equal(tensor.read(part), expected[part])
    assert len(file.tensors) == 2 * 9 + 3 and "lm_head.weight" in file.tensors


def test_header_is_read_as_the_package_reads_it(reference):
    path = reference("gguf") / "model-q4_0.gguf"
    file, oracle = gguf.open_file(path), package.GGUFReader(path)
    own = {name: field.contents() for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == own
    head = next(tensor for tensor in oracle.tensors if tensor.name == "output.weight")
    expected = package.dequantize(head.data, head.tensor_type)  # Q6_K: blocks of 256
    np.testing.assert_array_equal(file.tensors["lm_head.weight"].read((slice(100, 300),)), expected[100:300])


@pytest.mark.parametrize("rows", [(0, None), (0, 1), (5, 24), (15, 17), (40, 40), (63, 64)])
@pytest.mark.parametrize("columns", [(0, None), (0, 32), (31, 33), (7, 7)])
def test_rows_of_queries_and_keys_are_in_hugging_face_order(path, rows, columns):
    file = gguf.open_file(made(path))
    index = (slice(*rows), slice(*columns))
    kind = package.GGMLQuantizationType.Q4_0
    query = package.dequantize(package.quantize(QUERY, kind), kind)  # blocks lie along rows, which only change places
    np.testing.assert_array_equal(file.tensors["model.layers.0.self_attn.q_proj.weight"].read(index), query[index])
    key = file.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert key.dtype == np.float16
    np.testing.assert_array_equal(key.read(index), KEY.astype(np.float16)[index])
    np.testing.assert_array_equal(file.tensors["model.embed_tokens.weight"].read(index), EMBEDDING[index])


def test_numbers_of_a_file_without_scales_are_those_of_2b(path):
    config = gguf.open_file(made(path)).config
    assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (12.0, 1.4, 256)
    assert (config["vocab_size"], config["rope_theta"], config["rms_norm_eps"]) == (ROWS, 10000.0, 1e-5)
    assert config["tie_word_embeddings"] is True and config["rope_scaling"] is None and "head_dim" not in config


def test_scales_and_options_that_are_stored(path):
    numbers = NUMBERS | {"block_count": 3}
    scales = {"embedding_scale": 8.0, "residual_scale": 1.2 / 3**0.5, "logit_scale": HIDDEN / 24}
    rope = {
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "rope.dimension_count": 16,
    }
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    file = gguf.open_file(made(path, numbers=numbers, tensors={"output.weight": EMBEDDING}, **scales, **rope, **tokens))
    config = file.config
    assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (8.0, 1.2, 24)
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0} and config["rope_theta"] == 1e6
    assert config["head_dim"] == 16 and config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


FACTORS = {
    "rope_factors_long.weight": np.linspace(1.1, 31.02392307921529, 8).astype(np.float32),
    "rope_factors_short.weight": np.linspace(1, 2, 8).astype(np.float32),
}
LONGROPE = {"rope.scaling.type": "longrope"}


@pytest.mark.parametrize("original", [{}, {"rope.scaling.original_context_length": 512}])
def test_longrope_has_its_factors_in_two_tensors(path, original):
    file = gguf.open_file(made(path, tensors=FACTORS, **SCALES, **LONGROPE, **original))
    scaling = ModelConfig.from_dict(file.config).rope_scaling
    assert scaling.original_max_position_embeddings == (512 if original else NUMBERS["context_length"])
    np.testing.assert_array_equal(np.float32(scaling.long_factor), FACTORS["rope_factors_long.weight"])
    np.testing.assert_array_equal(np.float32(scaling.short_factor), FACTORS["rope_factors_short.weight"])
    assert not file.tensors.keys() & FACTORS.keys()


LATENT = NUMBERS | {
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 12,
    "attention.key_length": 32,
    "rope.dimension_count": 16,
}


@pytest.mark.parametrize("kind", [{}, {"rope.scaling.type": "none"}, LONGROPE])
def test_minicpm3(path, kind):
    """Its factors are used whatever the type says, and its scales are constants of llama.cpp's code."""
    file = gguf.open_file(made(path, "minicpm3", numbers=LATENT, tensors=FACTORS, **kind))
    config = ModelConfig.from_dict(file.config)
    assert config.family.architecture == "MiniCPM3ForCausalLM"
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12.0, 1.4, 256)
    assert (config.q_lora_rank, config.kv_lora_rank) == (24, 12)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.head_dim) == (16, 16, HIDDEN // HEADS)
    assert config.rope_scaling.original_max_position_embeddings == NUMBERS["context_length"]
    plain = gguf.open_file(made(path, "minicpm3", numbers=LATENT)).config
    assert plain["rope_scaling"] is None


def test_an_amplitude_of_longrope(path):
    """It is the one that the model computes. A file may state it."""
    original = {"rope.scaling.original_context_length": 32}
    amplitude = {"rope.scaling.attn_factor": float((1 + np.log(128 / 32) / np.log(32)) ** 0.5)}
    stated = gguf.open_file(made(path, tensors=FACTORS, **SCALES, **LONGROPE, **original, **amplitude)).config
    assert stated == gguf.open_file(made(path, tensors=FACTORS, **SCALES, **LONGROPE, **original)).config
    made(path, tensors=FACTORS, **SCALES, **LONGROPE, **original, **{"rope.scaling.attn_factor": 1.0})
    refused(path, r"attn_factor = 1.0, where the model's code computes 1\.18")
    refused(made(path, **amplitude), "where the model's code computes 1 from")


def test_llama_and_what_has_no_hugging_face_name(path):
    bias = RNG.normal(size=HIDDEN).astype(np.float32)
    brain = RNG.normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    extra = {"blk.0.attn_q.bias": permuted(bias, HEADS), "blk.0.attn_q_norm.weight": bias}
    made(path, "llama", tensors=extra)
    file = gguf.open_file(path)
    assert file.config["architectures"] == ["LlamaForCausalLM"] and file.config["model_type"] == "llama"
    assert "scale_emb" not in file.config
    np.testing.assert_array_equal(file.tensors["model.layers.0.self_attn.q_proj.bias"].read(), bias)
    np.testing.assert_array_equal(file.tensors["blk.0.attn_q_norm.weight"].read(), bias)
    writer = package.GGUFWriter(path, "llama")
    for key, value in NUMBERS.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    kind = package.GGMLQuantizationType.BF16
    writer.add_tensor("token_embd.weight", brain.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.open_file(path).tensors["model.embed_tokens.weight"]
    assert tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.read(), brain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; read here are minicpm, minicpm3 and llama"),
        ({"expert_count": 8}, "minicpm.expert_count = 8, which is not supported"),
        ({"attention.sliding_window": 512}, "sliding_window = 512"),
        ({"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"rope.scaling.factor": 0.0}, "rope.scaling.factor = 0.0 where a positive number"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "has rope_freqs.weight"),
        ({"tensors": FACTORS}, "has rope_factors_long.weight, rope_factors_short.weight, which is used with"),
        (LONGROPE, "has no rope_factors_long.weight, rope_factors_short.weight for its longrope"),
        (LONGROPE | {"tensors": FACTORS, "rope.scaling.factor": 4.0}, "which exclude each other"),
        (
            {"tensors": {"model.embed_tokens.weight": np.ones(8, np.float32)}},
            "two tensors for model.embed_tokens.weight",
        ),
        ({"attention.head_count": [4, 4]}, r"head_count = \[4, 4\] where a positive whole number"),
        ({"attention.head_count": 0}, "head_count = 0 where"),
        ({"attention.head_count": 5}, "q_proj.weight in .* has 64 rows"),
        ({"attention.key_length": 16, "rope.dimension_count": 8}, "different attention.key_length and rope.dim"),
        (SCALES | {"logit_scale": 3.0}, "logit_scale that is not hidden_size / a whole number"),
        (SCALES | {"logit_scale": float("nan")}, "logit_scale = nan where"),
        ({"numbers": {k: v for k, v in NUMBERS.items() if k != "context_length"}}, "no minicpm.context_length"),
        ({"split.count": 2}, "one part of a split file"),
        ({"general.type": "adapter"}, "is of general.type adapter, not a model"),
        ({"expert_used_count": 2}, "minicpm.expert_used_count = 2, which is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, which is not supported"),
        ({"rope.freq_basf": 1e6}, "minicpm.rope.freq_basf = 1000000.0, which is not understood"),
        ({"architecture": "llama", "embedding_scale": 12.0}, "llama.embedding_scale = 12.0, which is not understood"),
        ({"rope.freq_base": 10000}, "rope.freq_base = 10000 where a positive number"),  # of the wrong type
        ({"block_count": 1.0}, "block_count = 1.0 where a positive whole number"),
        ({"attention.kv_lora_rank": 8}, "minicpm.attention.kv_lora_rank = 8, which is not understood"),
        ({"architecture": "minicpm3"}, "no minicpm3.attention.q_lora_rank where a positive whole number"),
        ({"architecture": "minicpm3", "numbers": LATENT, "attention.key_length": 16}, "leaves no part of a key"),
        ({"architecture": "minicpm3", "numbers": LATENT, "attention.value_length": 8}, "value_length = 8 where"),
        ({"residual_scale": 1.4}, "lacks minicpm.embedding_scale, minicpm.logit_scale and has others of the scales"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path, change, message):
    refused(made(path, **change), message)


@pytest.mark.parametrize("scale", [f"minicpm.{name}" for name in SCALES])
def test_a_scale_whose_key_has_one_other_character(path, scale):
    """All three or none: the file would be read with other scales."""
    data = made(path, **SCALES).read_bytes()
    assert gguf.open_file(path).config["scale_emb"] == 12
    start = data.index(scale.encode())
    for place in range(start, start + len(scale)):
        for other in b"a", b".", b"\x00":
            path.write_bytes(data[:place] + other + data[place + 1 :])
            if other != data[place : place + 1]:
                refused(path, "lacks minicpm.* scales|not understood|reads like a key")


def test_keys_that_others_write_are_passed_over(path):
    ours = {"vocab_size": ROWS, "expert_count": 0, "attention.layer_norm_epsilon": 1e-5, "pooling_type": 0}
    others = {"general.source.huggingface.repository": "a/b", "general.tags": ["a"], "general.license": "x"}
    assert gguf.open_file(made(path, **ours, **others)).config["scale_emb"] == 12
    data = path.read_bytes()
    key = b"general.license"
    for other in (b"mradermacher.qb", b"quantize.imatrx"):
        path.write_bytes(data.replace(key, other))
        assert gguf.open_file(path).config["scale_emb"] == 12


def header(*numbers: bytes, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(numbers)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "data, message",
    [
        (header(keys=2**40), "promises 0 tensors and 1099511627776 keys, more than any model has"),
        (header(tensors=2**40), "promises 1099511627776 tensors"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 8, 2**40), keys=1), "1099511627776 elements"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 0, 10**7), bytes(10**7), keys=1), "10000000 elements"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), struct.pack("<IQ", 9, 1), keys=1), "array of the type 9"),
        (header(text(b"a"), struct.pack("<IQ", 8, 2**63), keys=1), "truncated or damaged"),
        (header(*2 * [text(b"a") + struct.pack("<II", 4, 1)], keys=2), "metadata key a twice"),
        (header(text(b"k" * 10**6) * 2, keys=1), "metadata of the unknown type"),
    ],
)
def test_a_header_is_bounded(path, data, message):
    path.write_bytes(data)
    refused(path, message)


def test_bytes_behind_the_last_tensor_are_refused(path):
    path.write_bytes(made(path).read_bytes() + bytes(4096))
    refused(path, "4096 bytes behind its last tensor")


def test_other_files_are_refused(path, tmp_path):
    path.write_bytes(b"GGML" + bytes(100))
    refused(path, "no GGUF file")
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    refused(path, "version 0x3000000")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refused(path, "version 0x1")
    refused(tmp_path / "none.gguf", "cannot read")


def test_every_truncation_is_refused(path):
    data = made(path).read_bytes()
    file = gguf.open_file(path)
    end = max(t.offset + t.dtype.itemsize * int(np.prod(t.shape)) for t in map(stored, file.tensors.values()))
    for length in [*range(0, 1500, 3), *range(1500, end, 997), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            gguf.open_file(path)
    path.write_bytes(data[:end])  # the padding behind the last tensor may be missing
    assert gguf.open_file(path).tensors.keys() == file.tensors.keys()


def stored(tensor):
    """The plain bytes or numbers in the file under a tensor."""
    tensor = getattr(tensor, "stored", tensor)
    return getattr(tensor, "packed", tensor)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the package, on blocks that are nonsense
@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_flipped_byte_of_the_header_gives_another_error(path, flip):
    data = made(path, **{"tokenizer.ggml.scores": [0.0] * 4, "tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    header = stored(gguf.open_file(path).tensors["model.embed_tokens.weight"]).offset
    outcomes = {"refused": 0, "read": 0}
    for i in range(header):
        path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        try:
            for tensor in gguf.open_file(path).tensors.values():
                assert tensor.read().shape == tensor.shape
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("folder", ["minicpm4_8b", "minicpm3"])
def test_a_model_with_longrope_computes_the_originals_logits(reference, path, folder):
    """The reference folder, written as llama.cpp's converter writes it."""
    minicpm_mlx = pytest.importorskip("minicpm_mlx")
    source = open_checkpoint(reference(folder))
    config, scaling = source.config, source.config.rope_scaling
    writer = package.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_embedding_scale(config.scale_emb)
    writer.add_residual_scale(config.residual_scale)
    writer.add_logit_scale(config.logit_divisor)
    if config.is_latent:  # no type of RoPE scaling is written
        writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
    else:
        writer.add_rope_scaling_type(package.RopeScalingType.LONGROPE)
    architecture = package.MODEL_ARCH[config.model_type.upper()]
    names = package.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in source.tensors.items():
        array = np.asarray(tensor.read(), np.float32)
        for module, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            array = permuted(array, heads) if f".{module}." in name else array
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(array))
    writer.add_tensor("rope_factors_long.weight", np.float32(scaling.long_factor))
    writer.add_tensor("rope_factors_short.weight", np.float32(scaling.short_factor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _ = minicpm_mlx.load(path, "float32")
    known = np.load(reference(folder) / "reference.npz")
    for length in (32, 33):
        logits = np.asarray(model(known[f"input_ids_T{length}"]))
        np.testing.assert_allclose(logits, known[f"logits_T{length}"], rtol=0, atol=2e-5)
