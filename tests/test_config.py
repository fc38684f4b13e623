"""config.json read: what saved ones hold is taken, what would change the numbers is refused by name."""

import json
import math
import re

import pytest

from weights_io import catalog
from weights_io.config import MAX_COUNT, ModelConfig, RopeScaling, stored_dtype
from weights_io.config_keys import note_sparse, sparse_note, token_ids
from weights_io.errors import InputError
from weights_io.files.json_text import read_json
from weights_io.rope_config import LongRoPE

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40}
# HuggingFaceTB/SmolLM2-135M-Instruct, as released.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
# What transformers 4's PretrainedConfig.to_dict() writes besides the model's own numbers.
TRANSFORMERS_4 = {
    "_name_or_path": "openbmb/CPM-2B",
    "_attn_implementation_autoset": True,
    "add_cross_attention": False,
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": True,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "quantization_config": None,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 0.8,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 0.8,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def refused(raw: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_dict(raw, "the file")
    text = str(caught.value)
    assert text.startswith("the file: ") and "\n" not in text and len(text) < 300


def test_the_defaults_are_those_of_minicpms_own_class():
    config = ModelConfig.from_dict({})
    assert (config.model_type, config.rope_theta, config.tie_word_embeddings) == ("minicpm", 10000.0, True)
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (1.0, 1.0, 1)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (32, 128, 1e-6)
    llama = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"]})
    folded = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}  # MiniCPM-S-1B-sft-llama-format states them
    assert ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **folded}) == llama
    assert (llama.model_type, llama.tie_word_embeddings) == ("llama", False)


UNTIED = {3_007_703_808, 3_007_736_064, 8_185_253_888, 1_080_632_832, 2_516_756_480, 3_434_965_792}  # parameters
RELEASED = [entry for entry in catalog.CATALOG if entry.config]


@pytest.mark.parametrize("entry", RELEASED, ids=lambda entry: entry.name)
def test_released_configs(entry):
    config = ModelConfig.from_dict({**entry.config, **TRANSFORMERS_4})
    assert config == ModelConfig.from_dict(dict(entry.config))
    assert config.model_type == entry.architecture
    assert config.tie_word_embeddings == (entry.parameters not in UNTIED)
    assert config.rope_theta == (1e6 if "128k" in entry.name else 5e6 if "cpm5" in entry.name else 1e4)
    if entry.architecture == "minicpm":
        assert config.residual_scale == pytest.approx(1.4 / math.sqrt(config.num_hidden_layers))
        assert config.logit_divisor == config.hidden_size / 256


def test_smollm2():
    config = ModelConfig.from_dict(SMOLLM2)
    assert (config.rope_theta, config.head_dim, config.tie_word_embeddings) == (1e5, 64, True)
    assert (config.embedding_scale, config.residual_scale, config.logit_divisor) == (1, 1, 1)
    refused(SMOLLM2 | {"rope_interleaved": True}, "rope_interleaved = true changes the logits")


def test_transformers_5_writes_rope_parameters_and_dtype():
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
    raw = {**TINY, "rope_parameters": rope, "dtype": "bfloat16", "layer_types": ["full_attention"] * 2}
    config = ModelConfig.from_dict(raw)
    assert (config.rope_theta, config.rope_scaling) == (1e6, RopeScaling("dynamic", 4.0))
    assert config == ModelConfig.from_dict(
        {**TINY, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    )
    plain = ModelConfig.from_dict({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert (plain.rope_theta, plain.rope_scaling) == (5e5, None)
    refused({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling .*yarn.* is not supported")
    refused({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "changes the default RoPE")
    refused({"rope_parameters": [1]}, "must be an object")


@pytest.mark.parametrize(
    "raw, dtype",
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "half"}, "float16"),
        ({"torch_dtype": "auto"}, None),
        ({}, None),
    ],
)
def test_stored_dtype(raw, dtype):
    assert stored_dtype(raw) == dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["int8", "bfloat15", "", ["float32"], {"": "float32"}, 16, True, "float64"])
def test_a_dtype_that_is_none_of_ours(key, value):
    refused({**TINY, key: value}, rf"{key} is {re.escape(json.dumps(value))}; it must be float32, bfloat16 or float16")


@pytest.mark.parametrize(
    "key, value",
    [
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("no_rope_layers", [0, 1]),
        ("position_embedding_type", "alibi"),
        ("norm_type", "layernorm"),
        ("use_rope", False),
        ("logit_scale", 0),
        ("anything", {}),
        ("anything", []),
        ("_sliding_window_pattern", 6),
        ("attention_bias", True),
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(key, value):
    refused({**TINY, key: value}, f"{key} = {re.escape(json.dumps(value))} .*change")
    assert ModelConfig.from_dict({**TINY, key: None}) == ModelConfig.from_dict(TINY)


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention_bias", 0),
        ("attention_bias", "false"),
        ("attention_bias", []),
        ("partial_rotary_factor", True),
        ("num_local_experts", False),
        ("is_decoder", 1),
        ("sliding_window", []),
    ],
)
def test_a_value_of_another_kind_is_not_the_neutral_one(key, value):
    refused({**TINY, key: value}, f"{key} = {re.escape(json.dumps(value))} changes the logits")


@pytest.mark.parametrize("value", [False, 0.0, "0", [], 2.0])
def test_experts_are_whole_numbers(value):
    refused({**TINY, "num_experts": value, "num_experts_per_tok": 2}, "num_experts is .*; it must be a positive whole")


def test_what_is_said_twice_must_be_the_same():
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
    same = {"rope_theta": 1000000, "rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelConfig.from_dict({**TINY, "rope_parameters": rope, **same}).rope_theta == 1e6
    assert ModelConfig.from_dict({**TINY, "rope_parameters": rope, "rope_scaling": None}).rope_scaling.factor == 2
    refused(
        {**TINY, "rope_parameters": rope, "rope_theta": 1e4}, "rope_theta is 10000.0, which rope_parameters contradicts"
    )
    other = {"type": "linear", "factor": 3}
    refused(
        {**TINY, "rope_parameters": rope, "rope_scaling": other},
        "rope_scaling is .*3.*, which rope_parameters contradicts",
    )
    refused({**TINY, "rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}}, "has two types")


@pytest.mark.parametrize("key, value", [("architectures", ""), ("architectures", 0), ("model_type", "")])
def test_what_is_empty_is_not_absent(key, value):
    refused({**TINY, key: value}, f"{key} ")


def test_a_long_value_is_quoted_in_part():
    refused({**TINY, "weights": ["x" * 50] * 1000}, r"weights = \[\"xxx.*\.\.\. is unknown")
    refused({**TINY, "k" * 5000: 1}, r"k\.\.\. = 1 is unknown")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", ["minicpm"]),
        ("model_type", {"a": 1}),
        ("architectures", "MiniCPMForCausalLM"),
        ("architectures", [["MiniCPMForCausalLM"]]),
        ("hidden_act", ["silu"]),
        ("tie_word_embeddings", 1),
        ("rope_scaling", "dynamic"),
        ("rope_scaling", {"type": ["dynamic"], "factor": 2.0}),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("hidden_size", 32.0),
        ("max_position_embeddings", 10**12),
        ("dim_model_base", 10**400),
    ],
)
def test_values_of_the_wrong_kind(key, value):
    refused({**TINY, key: value}, key)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "scale_emb", "scale_depth"])
@pytest.mark.parametrize("value", [10**400, 1e300, 1e-45, 0, -1.0, math.nan, math.inf, "1", True, None])
def test_scales_are_numbers_that_float32_holds(key, value):
    refused({**TINY, key: value}, f"{key} is .*; it must be a positive number in float32's range.")


@pytest.mark.parametrize("factor", [10**400, 1e300, 1, 0.5, math.nan, math.inf, "2", True, None])
def test_factor_of_rope_scaling(factor):
    refused({**TINY, "rope_scaling": {"type": "linear", "factor": factor}}, "rope_scaling factor")


LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2, 3, 4, 5], "original_max_position_embeddings": 2048}


@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"rope_type": "longrope", "factor": 1.0}])
def test_longrope(kind):
    """MiniCPM3's configs say ``type``, MiniCPM4's ``rope_type``; one long-context model adds an unused factor."""
    config = ModelConfig.from_dict({**TINY, "rope_scaling": kind | LONG, "mup_denominator": 32})
    assert config.rope_scaling == LongRoPE((1, 1.5, 2, 2.5), (2, 3, 4, 5), 2048) and config.rope_amplitude == 1
    five = {"rope_parameters": {"rope_theta": 10000.0, **kind, **LONG}}
    assert ModelConfig.from_dict({**TINY, **five}) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["rope_scaling"]["type"] == config.to_dict()["rope_scaling"]["rope_type"] == "longrope"
    longer = ModelConfig.from_dict({**TINY, "rope_scaling": kind | LONG, "max_position_embeddings": 2048**2})
    assert longer.rope_amplitude == pytest.approx(math.sqrt(2)) and longer.rope_scaling.always_long(2048**2)
    llama = {"architectures": ["LlamaForCausalLM"], "rope_scaling": kind | LONG}
    assert ModelConfig.from_dict({**TINY, **llama}).rope_scaling == config.rope_scaling
    refused({**TINY, **llama, "max_position_embeddings": 4096}, "transformers computes longrope of a Llama otherwise")
    refused(
        {**TINY, **llama, "rope_scaling": kind | LONG | {"factor": 4.0}}, "transformers computes longrope of a Llama"
    )
    other = {"rope_scaling": {**LONG, "type": "longrope", "long_factor": [1, 1, 1, 1]}}
    refused({**TINY, **five, **other}, "rope_scaling is .*, which rope_parameters contradicts")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"short_factor": [1.0, 1.5, 2.0]}, "short_factor is a list of 3, where RoPE needs 4"),
        ({"long_factor": [1.0] * 5}, "long_factor is a list of 5, where RoPE needs 4"),
        ({"long_factor": None}, "has no long_factor"),
        ({"long_factor": 4.0}, "long_factor is 4.0; it must be a list of numbers"),
        ({"long_factor": []}, r"long_factor is \[\]; it must be a list of numbers"),
        ({"short_factor": [1, 1, "2", 1]}, r"short_factor\[2\] is \"2\"; it must be a positive number"),
        ({"short_factor": [1, True, 1, 1]}, r"short_factor\[1\] is true"),
        ({"short_factor": [0, 1, 1, 1]}, r"short_factor\[0\] is 0"),
        ({"short_factor": [1, 1, 1, math.nan]}, r"short_factor\[3\] is NaN"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0; it must be a whole number"),
        ({"original_max_position_embeddings": 32.0}, "original_max_position_embeddings is 32.0; it must be a whole"),
        ({"beta_fast": 32, "long_mscale": 1.2}, "has beta_fast and long_mscale, not understood in longrope"),
        ({"rope_type": "dynamic"}, "has two types"),
    ],
)
def test_longrope_that_is_not_understood(change, message):
    refused({**TINY, "rope_scaling": {"type": "longrope", **LONG, **change}}, message)


SPARSE = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64}


def test_sparse_config_is_dense_with_a_note(capsys):
    assert ModelConfig.from_dict({**TINY, "sparse_config": SPARSE}) == ModelConfig.from_dict(TINY)
    note = sparse_note({"sparse_config": SPARSE})
    assert "what the model does below 8192 tokens. From there on the results differ" in note
    assert "implemented. At every length the results" in sparse_note({"sparse_config": SPARSE | {"dense_len": -1}})
    assert sparse_note({"sparse_config": None}) is sparse_note(TINY) is None
    for _ in range(2):
        note_sparse({"sparse_config": SPARSE | {"dense_len": 8999}})
    assert capsys.readouterr().err.count("note: config.json asks for InfLLM-v2") == 1


@pytest.mark.parametrize(
    "sparse, message",
    [
        ({"kernel": 3}, "has kernel, not understood"),
        ({"topk": 64.0}, "topk is 64.0; it must be a whole number"),
        ({"use_nope": 1}, "use_nope is 1; it must be true or false"),
        ({"dense_len": -2}, "dense_len is -2; it must be a number of tokens"),
        ([1], "it must be null or an object"),
    ],
)
def test_sparse_config_that_is_not_understood(sparse, message):
    refused({**TINY, "sparse_config": SPARSE | sparse if isinstance(sparse, dict) else sparse}, message)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"architectures": ["MiniCPMSALAForCausalLM"]}, "MiniCPM-SALA is not supported: 24 of its 32 layers .* SGLang"),
        ({"architectures": ["MiniCPMForCausalLM"], "mixer_types": ["minicpm4"]}, "MiniCPM-SALA is not supported"),
        ({"model_type": "minicpm_sala"}, "MiniCPM-SALA is not supported"),
        ({"architectures": ["EagleMiniCPMForCausalLM"]}, "EagleMiniCPMForCausalLM is a draft head .* CPM.cu"),
        ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 32000}, "is a draft head .* CPM.cu"),
        ({"architectures": ["MiniCPM"], "is_causal": False}, "MiniCPM is an embedding model or a reranker"),
        ({"architectures": ["MiniCPMForCausalLM"], "is_causal": False}, "is an embedding model or a reranker"),
        ({"architectures": ["MiniCPMForSequenceClassification"]}, "is an embedding model or a reranker"),
        (
            {"architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": 2.6},
            "MiniCPMV is not supported",
        ),
        (
            {"architectures": ["MiniCPMO"]},
            "MiniCPMO is not supported: of the models that take images or sound, MiniCPM-V 1.0",
        ),
        ({"model_type": "minicpmv4_6"}, "minicpmv4_6 is not supported: of the models that take images"),
    ],
)
def test_other_models_of_openbmb_are_refused_by_name(raw, message):
    refused({**TINY, **raw}, message)


def test_shapes_that_contradict_each_other():
    refused({**TINY, "num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3")
    refused({**TINY, "hidden_size": 36}, "head_dim 9 is odd")
    refused({**TINY, "hidden_size": 34}, "is not num_attention_heads 4 x head_dim 8")
    assert ModelConfig.from_dict({**TINY, "head_dim": 16}).head_dim == 8  # as in the original, which does not read it
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": MAX_COUNT}
    refused({**TINY, **dynamic, "num_attention_heads": 16}, "head_dim 2 and dynamic rope_scaling")
    ModelConfig.from_dict({**TINY, **dynamic, "num_attention_heads": 8})
    refused({"architectures": ["MiniCPMForCausalLM"], "model_type": "llama"}, "contradicts architectures")


@pytest.mark.parametrize("raw", [{}, SMOLLM2, {**TINY, "rope_scaling": {"type": "linear", "factor": 2}}])
def test_what_is_written_is_read_back(raw):
    config = ModelConfig.from_dict(raw)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("text", [f'{{"a": {"1" * 5000}}}', "[" * 100_000, "{", "[1]", "", b"\xff\xfe{}"])
def test_json_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"config.json (is not JSON|holds list).*; download it again\.$"):
        read_json(path)


def test_token_ids():
    found = [token_ids({"eos_token_id": value}, "eos_token_id", 6) for value in (None, 0, [2, 5], [])]
    assert found == [(), (0,), (2, 5), ()]
    for value in ("2", -1, True, [2, None], {"id": 2}, 1.0):
        with pytest.raises(InputError, match="the file: eos_token_id is .*; it must be a token id or a list"):
            token_ids({"eos_token_id": value}, "eos_token_id", 6, "the file")
    for value in (6, [2, 6], 2**70):
        with pytest.raises(InputError, match="the file: eos_token_id is .*, and the vocabulary has the ids 0 to 5; "):
            token_ids({"eos_token_id": value}, "eos_token_id", 6, "the file")
