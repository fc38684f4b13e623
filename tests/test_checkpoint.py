"""A checkpoint opened: tensors against the table, the tied head, special ids, scales that are no numbers."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, write_file
from weights_io.parameters import tensor_shapes

CONFIG = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "scale_emb": 12,
}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = tensor_shapes(ModelConfig.from_dict(CONFIG))
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes}


def write(folder: Path, tensors: dict[str, np.ndarray], **changes) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    computed = {name: Computed(a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()}
    write_file(folder / "model.safetensors", computed)
    return folder


def refused(folder: Path, message: str) -> str:
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)) and text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text


def test_missing_unexpected_and_misshapen_are_in_one_message(tmp_path):
    tensors = arrays()
    del tensors[NORM]
    tensors |= {"model.extra.weight": tensors[UP], UP: tensors[UP][:, :3], EMBEDDING: tensors[EMBEDDING][:10]}
    text = refused(write(tmp_path, tensors), "do not fit config.json; take both, whole, from one checkpoint")
    assert f"1 missing ({NORM})" in text
    assert "1 unexpected (model.extra.weight)" in text
    assert f"2 misshapen ({EMBEDDING} [10, 8] for [11, 8] and 1 more)" in text


def test_buffers_are_passed_over(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert open_checkpoint(write(tmp_path, arrays() | buffer)).tensors.keys() == arrays().keys()


def test_a_message_names_three_tensors_and_a_count(tmp_path):
    tensors = arrays() | {f"extra.{i}.{'x' * 60}": np.zeros(1, np.float32) for i in range(50)}
    text = refused(write(tmp_path, tensors), "do not fit config.json")
    assert "and 47 more" in text and text.count("extra.") == 3 and len(text) < 500
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 20}))
    text = refused(tmp_path, "do not fit config.json")  # of missing and of unexpected ones, one each
    assert text.count("extra.") == 1 and text.count("model.layers.") == 1


@pytest.mark.parametrize(
    "prefix, remedy",
    [
        ("_orig_mod.", "torch.compile put there; save the state_dict of the model before it was compiled"),
        ("module.", "DataParallel or an engine put there; save the state_dict of model.module"),
        ("module._orig_mod.", "DataParallel"),
        ("base_model.model.", "PEFT put there; call merge_and_unload"),
        ("language_model.", "a model with other parts puts there; save its language model alone"),
        ("transformer.", "is no prefix of the model; save the state_dict of the model inside"),
    ],
)
def test_a_prefix_of_every_name_is_one_fault(tmp_path, prefix, remedy):
    tensors = arrays() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    write(tmp_path, {prefix + name: array for name, array in tensors.items()})
    text = refused(tmp_path, f"the tensor names begin with '{prefix}', which {remedy}")
    assert len(text.removeprefix(str(tmp_path))) < 160


def test_many_names_of_one_ending_are_no_prefixes(tmp_path):
    """Each would be looked for with the whole table: 80 s."""
    write(tmp_path, {f"{n}.{NORM}": np.zeros(0, np.float32) for n in range(3000)}, num_hidden_layers=1000)
    began = time.monotonic()
    assert "3000 unexpected" in refused(tmp_path, "do not fit config.json")
    assert time.monotonic() - began < 20


def test_names_without_their_beginning(tmp_path):
    write(tmp_path, {name.removeprefix("model."): array for name, array in arrays().items()})
    refused(tmp_path, "the tensor names lack the prefix 'model.'")


def test_a_draft_head_is_called_by_its_name(tmp_path):
    write(tmp_path, {"fc.weight": np.zeros((8, 16), np.float32), "layers.0.mlp.up_proj.weight": arrays()[UP]})
    refused(tmp_path, "holds a draft head .Eagle, FRSpec., which only proposes tokens for a larger model")


def test_shards_hold_what_the_index_leaves_out(tmp_path):
    """As in a single file: buffers are passed over, a tied head is compared, the rest is unexpected."""
    tensors = arrays()
    names = list(tensors)
    shards = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def write_shards(**more):
        for shard, inside in shards.items():
            held = {name: tensors[name] for name in inside} | (more if "2-of" in shard else {})
            write_file(tmp_path / shard, {name: Computed.of(array) for name, array in held.items()})

    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    write_shards(**buffer, **{HEAD: tensors[EMBEDDING], names[0]: tensors[names[0]]})
    assert open_checkpoint(tmp_path).tensors.keys() == tensors.keys()
    write_shards(**{HEAD: tensors[EMBEDDING] + 1})
    refused(tmp_path, "lm_head.weight differs from the embedding")
    write_shards(**{names[0]: tensors[names[0]] + 1})
    with pytest.raises(InputError, match=f"{names[0]} is another one in .*model-1-of-2.* than in .*model-2-of-2"):
        open_checkpoint(tmp_path)
    write_shards(extra=np.ones(2, np.float32))
    refused(tmp_path, "1 unexpected .extra.")


def test_shards_are_opened_one_after_the_other(tmp_path):
    """A process may have few files open at once."""
    tensors, resource = arrays(), pytest.importorskip("resource")
    shards = {f"model-{i}-of-{len(tensors)}.safetensors": name for i, name in enumerate(tensors)}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {name: shard for shard, name in shards.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard, name in shards.items():
        write_file(tmp_path / shard, {name: Computed.of(tensors[name])})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    *held, first, second = (os.open(os.devnull, os.O_RDONLY) for _ in range(50))  # leaves no number below them free
    os.close(first)
    os.close(second)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (second + 1, limits[1]))
        checkpoint = open_checkpoint(tmp_path)
        for name, array in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name, "float32"), array)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first, limits[1]))
        with pytest.raises(InputError, match="cannot read .*Too many open files"):
            open_checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in held:
            os.close(number)


def test_whole_numbers_are_refused_with_a_remedy(tmp_path):
    tensors = arrays()
    tensors[UP] = np.ones(tensors[UP].shape, np.int8)
    refused(write(tmp_path, tensors), rf"not floating point \({UP}\); use the checkpoint before its quantization")


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    tensors = arrays()
    copied = write(tmp_path, tensors | {HEAD: tensors[EMBEDDING]})
    assert HEAD not in open_checkpoint(copied).tensors
    other = tensors[EMBEDDING].copy()
    other[-1, -1] += 1e-6
    for head in (other, other[:10], other[0, 0], other.T):
        write(tmp_path, tensors | {HEAD: np.ascontiguousarray(head).reshape(head.shape)})
        refused(tmp_path, 'differs from the embedding .* set "tie_word_embeddings": false in config.json')
    write(tmp_path, tensors | {HEAD: other}, tie_word_embeddings=False)
    np.testing.assert_array_equal(open_checkpoint(tmp_path).tensors[HEAD].read(), other)


def test_head_and_embedding_without_dimensions(tmp_path):
    scalar = np.ones((), np.float32)
    refused(write(tmp_path, arrays() | {EMBEDDING: scalar, HEAD: scalar}), rf"misshapen \({EMBEDDING} \[\] for \[11, 8")
    tensors = arrays()
    del tensors[EMBEDDING]
    refused(write(tmp_path, tensors | {HEAD: scalar}), rf"1 missing \({EMBEDDING}\)")


def test_a_thousand_million_layers_are_refused_at_once(tmp_path):
    write(tmp_path, arrays(), num_hidden_layers=10**9)
    refused(tmp_path, "config.json: num_hidden_layers is 1000000000; .* at most 1000")


@pytest.mark.parametrize("experts", [2**31 - 1, 2**31, 1025])
def test_experts_without_end_are_refused_before_they_are_written_out(tmp_path, experts):
    write(tmp_path, arrays(), num_experts=experts, num_experts_per_tok=2)
    refused(tmp_path, f"config.json: num_experts is {experts}; .* at most 1024")
    write(tmp_path, arrays(), num_experts=1024, num_experts_per_tok=2, num_hidden_layers=1000)
    refused(tmp_path, "config.json: num_experts 1024 x 1000 layers is above the limit of 100000 experts")


def test_eos_is_the_union_of_both_configs(tmp_path):
    write(tmp_path, arrays(), eos_token_id=2, bos_token_id=1)
    assert open_checkpoint(tmp_path).eos_token_ids == (2,)
    generation = tmp_path / "generation_config.json"
    for value, expected in ((7, (2, 7)), ([2, 5], (2, 5)), (None, (2,)), ([0], (2, 0))):
        generation.write_text(json.dumps({"eos_token_id": value}))
        opened = open_checkpoint(tmp_path)
        assert (opened.bos_token_ids, opened.eos_token_ids) == ((1,), expected)
    for value in (11, 2**70, [2, 11]):
        generation.write_text(json.dumps({"eos_token_id": value}))
        refused(tmp_path, "generation_config.json: eos_token_id is .*, and the vocabulary has the ids 0 to 10; use")
    for slip in ("eos_token_ids", "eos_token_ie", "eos_tokem_id", "eos_token"):
        generation.write_text(json.dumps({slip: 7}))
        refused(tmp_path, f"generation_config.json has {slip}, which is no key; write eos_token_id")
    generation.write_text(
        '{"bos_token_id": 1, "pad_token_id": 0, "forced_eos_token_id": 3, "_from_model_config": true}'
    )
    assert open_checkpoint(tmp_path).eos_token_ids == (2,)
    generation.write_text('{"eos_token_id": "2"}')
    refused(tmp_path, 'generation_config.json: eos_token_id is "2"; it must be a token id')
    generation.write_text(json.dumps(dict.fromkeys(map("eos_token_di{:04}".format, range(5000)))))
    refused(tmp_path, "generation_config.json has 5000 keys .at most 1000.")
    generation.write_text("[]")
    refused(tmp_path, "generation_config.json holds list, not a JSON object; download it again")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "0", "-12"])
def test_scales_that_are_no_numbers(tmp_path, number):
    write(tmp_path, arrays())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"scale_emb": 12', f'"scale_emb": {number}'))
    refused(tmp_path, "config.json: scale_emb is .*; it must be a positive number")


@pytest.mark.parametrize("raw, dtype", [({}, "float32"), ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16")])
def test_dtype_is_what_config_json_says_else_that_of_the_embedding(tmp_path, raw, dtype):
    assert open_checkpoint(write(tmp_path, arrays(), **raw)).dtype == dtype
