"""llama.cpp (the wheel xllamacpp) opens the GGUF files that are written here, and says what our models say."""

import json
from pathlib import Path

import pytest
import tiny_model
from documented_commands import typed

import weights_io
from minicpm_mlx import generate, load

pytestmark = pytest.mark.interop
xllamacpp = pytest.importorskip("xllamacpp")

PICO = Path(weights_io.__file__).parent / "pico"
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 3.0, 3.5, 4.0], "long_factor": [5.0] * 8}
MODELS = {
    "minicpm": {},
    "untied": {"tie_word_embeddings": False},
    "minicpm3": {"model_type": "minicpm3", **LATENT},
    "longrope": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 256}, "max_position_embeddings": 256},
    "llama": {"model_type": "llama"},
}


def theirs(path, prompt, most):
    """Greedy continuation of a text by llama.cpp."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(path), 256, 1
    options.cpuparams.n_threads, options.warmup, options.verbosity = 2, False, -1
    server = xllamacpp.Server(options)
    answer = server.handle_completions({"prompt": prompt, "temperature": 0, "max_tokens": most})
    return (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["text"]


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_pico(outtype, tmp_path):
    """Also with weights in 8 bits: the numbers differ by a percent, the words do not."""
    check(PICO, tmp_path / "pico.gguf", outtype, ["The fox and", "12 + 30 =", "你好"])


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    folder = tiny_model.write(tmp_path, **{**shape, **MODELS[name]})
    check(folder, tmp_path / "model.gguf", "f32", ["Hello", "你好"])


def check(folder, path, outtype, prompts):
    ran = typed("weights_io.convert", "--model", folder, "--to", "gguf", "--save-path", path, "--outtype", outtype)
    assert ran.returncode == 0, ran.stderr
    model, tokenizer = load(folder, "float32")
    for prompt in prompts:
        said = generate(model, tokenizer, prompt, max_tokens=16)
        assert theirs(path, prompt, 16).lstrip(" ") == said  # which drops the space that begins a text


@pytest.mark.parametrize("outtype", ["q4_0", "q4_k_m"])
def test_four_bits_open_and_answer(outtype, tmp_path):
    folder = tiny_model.write(tmp_path, hidden_size=256, intermediate_size=512, max_position_embeddings=256)
    path = tmp_path / "model.gguf"
    ran = typed("weights_io.convert", "--model", folder, "--to", "gguf", "--save-path", path, "--outtype", outtype)
    assert ran.returncode == 0, ran.stderr
    model, tokenizer = load(path, "float32")
    assert theirs(path, "Hello", 4).lstrip(" ") == generate(model, tokenizer, "Hello", max_tokens=4)
