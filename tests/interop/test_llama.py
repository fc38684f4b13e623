"""Llama, the format MiniCPM is exchanged in: our exports in transformers, and its own models in both backends."""

import json
import subprocess
import sys

import numpy as np
import ours
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig

pytestmark = pytest.mark.interop

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # large enough that every part moves the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "gqa": {"num_key_value_heads": 2},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head_dim of its own": {"num_key_value_heads": 2, "head_dim": 24},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"num_key_value_heads": 2, "rope_parameters": LINEAR},
    "dynamic": {"num_key_value_heads": 2, "rope_parameters": DYNAMIC, "tie_word_embeddings": True},
}


def opened(folder) -> LlamaForCausalLM:
    model, info = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # no tensor is missing, unexpected or of another shape
    return model.eval()


def logits(model: LlamaForCausalLM, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=mask).logits.float().numpy()


def greedy(model: LlamaForCausalLM, prompt: np.ndarray, count: int) -> list[int]:
    """New ids; EOS is one as any other."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor(prompt)[None]
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def convert(*arguments: object) -> None:
    command = [sys.executable, "-m", "weights_io.convert", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module", params=["dense_2b", "dense_untied", "long_linear", "long_128k"])
def minicpm(request, reference, tmp_path_factory):
    """A MiniCPM of the reference, its numbers, and it as a Llama."""
    folder = reference(request.param)
    llama = tmp_path_factory.mktemp(request.param) / "llama"
    convert("--model", folder, "--to", "llama", "--save-path", llama)
    return folder, np.load(folder / "reference.npz"), llama


def test_minicpm_as_a_llama_in_transformers(minicpm):
    _, data, folder = minicpm
    model = opened(folder)
    lengths = [key.removeprefix("logits") for key in data if key == "logits" or key.startswith("logits_T")]
    for end in [end for end in lengths if "_after_" not in end]:
        ours.close(logits(model, data[f"input_ids{end}"]), data[f"logits{end}"])
    prompt = data["prompt_ids"][0]
    assert greedy(model, prompt, 24) == data["greedy_ids"][len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_minicpm_as_a_llama_here(minicpm, backend):
    _, data, folder = minicpm
    model = ours.load(backend, folder)
    assert model.config.model_type == "llama"
    ours.close(ours.logits(model, data["input_ids"]), data["logits"])
    prompt = data["prompt_ids"][0]
    expected = ours.up_to_end(data["greedy_ids"][len(prompt) :], model.eos_token_ids)
    assert ours.greedy(backend, model, prompt, 24) == expected


def test_and_back(minicpm, tmp_path):
    folder, data, llama = minicpm
    before = open_checkpoint(folder).config
    scales = ["--scale-emb", before.scale_emb, "--scale-depth", before.scale_depth]
    scales += ["--dim-model-base", before.dim_model_base]
    convert("--model", llama, "--to", "hf", "--unfold", *scales, "--save-path", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").config == before
    for backend in ours.BACKENDS:
        model = ours.load(backend, tmp_path / "back")
        ours.close(ours.logits(model, data["input_ids"]), data["logits"])


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """A random Llama as transformers saves it, and the model itself."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | CASES[request.param])
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # and not the ones they begin as
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder, model


def test_its_config_is_of_transformers_5(saved):
    folder, model = saved
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in raw and "dtype" in raw and "rope_theta" not in raw and "rope_scaling" not in raw
    config = ModelConfig.from_dict(raw)
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.head_dim == model.config.head_dim and open_checkpoint(folder).dtype == "float32"


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_a_llama_of_transformers_here(saved, backend):
    folder, theirs = saved
    model = ours.load(backend, folder)
    rng = np.random.default_rng(0)
    for length in (7, 48):  # within and beyond max_position_embeddings
        ids = rng.integers(3, SHAPE["vocab_size"], (2, length))
        expected = logits(theirs, ids)
        assert expected.std() > 0.5  # logits that differ
        ours.close(ours.logits(model, ids), expected)
    prompt = rng.integers(3, SHAPE["vocab_size"], 20)
    expected = ours.up_to_end(greedy(theirs, prompt, 24), model.eos_token_ids)  # over that boundary, with a cache
    assert len(expected) > 5 and ours.greedy(backend, model, prompt, 24) == expected


@pytest.mark.parametrize("backend", ours.BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(saved, backend, side):
    folder, theirs = saved
    ids = np.random.default_rng(1).integers(3, SHAPE["vocab_size"], (2, 12))
    mask = np.ones((2, 12), int)
    mask[0, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    ids[mask == 0] = 0
    expected, found = logits(theirs, ids, mask), ours.logits(ours.load(backend, folder), ids, mask)
    ours.close(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_shards_and_bfloat16(tmp_path, backend):
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert open_checkpoint(tmp_path).dtype == "bfloat16"
    ids = np.random.default_rng(2).integers(3, SHAPE["vocab_size"], (1, 16))
    ours.close(ours.logits(ours.load(backend, tmp_path), ids), logits(opened(tmp_path), ids))


def test_the_built_in_model_answers_in_transformers(tmp_path):
    """By its Auto classes, with tokenizer, chat template and generation as a user of it has them."""
    convert("--model", "pico", "--to", "llama", "--save-path", tmp_path / "llama")
    model, tokenizer = opened(tmp_path / "llama"), AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "llama")) is LlamaForCausalLM
    messages = [{"role": "user", "content": "12 + 7 = ?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "12 + 7 = 19"
