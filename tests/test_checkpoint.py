"""A checkpoint opened: tensors against the table, the tied head, special ids, scales that are no numbers."""

import json
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
    assert f"2 misshapen ({EMBEDDING} [10, 8] for [11, 8], {UP} [12, 3] for [12, 8])" in text


def test_buffers_are_passed_over(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert open_checkpoint(write(tmp_path, arrays() | buffer)).tensors.keys() == arrays().keys()


def test_whole_numbers_are_refused_with_a_remedy(tmp_path):
    tensors = arrays()
    tensors[UP] = np.ones(tensors[UP].shape, np.int8)
    refused(write(tmp_path, tensors), rf"not floating point \({UP}\); take the checkpoint before its quantisation")


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    tensors = arrays()
    copied = write(tmp_path, tensors | {HEAD: tensors[EMBEDDING]})
    assert HEAD not in open_checkpoint(copied).tensors
    other = tensors[EMBEDDING].copy()
    other[-1, -1] += 1e-6
    for head in (other, other[:10], other[0, 0], other.T):
        write(tmp_path, tensors | {HEAD: np.ascontiguousarray(head).reshape(head.shape)})
        refused(tmp_path, 'differs from the embedding .* write "tie_word_embeddings": false into config.json')
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


def test_eos_is_the_union_of_both_configs(tmp_path):
    write(tmp_path, arrays(), eos_token_id=2, bos_token_id=1)
    assert open_checkpoint(tmp_path).eos_token_ids == (2,)
    generation = tmp_path / "generation_config.json"
    for value, expected in ((7, (2, 7)), ([2, 5], (2, 5)), (None, (2,)), ([0], (2, 0))):
        generation.write_text(json.dumps({"eos_token_id": value}))
        opened = open_checkpoint(tmp_path)
        assert (opened.bos_token_ids, opened.eos_token_ids) == ((1,), expected)
    generation.write_text('{"eos_token_id": "2"}')
    refused(tmp_path, 'generation_config.json: eos_token_id is "2"; it must be a token id')
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
