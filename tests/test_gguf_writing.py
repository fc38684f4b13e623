"""GGUF files that are written here, read back; llama.cpp itself opens them in tests/interop/test_llamacpp.py."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from documented_commands import typed
from gguf import GGMLQuantizationType, GGUFReader, quants

import weights_io
from minicpm_data.tokenizer.folder import load_tokenizer
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_data.tokenizer.gguf_writing import PROBES, metadata_of
from minicpm_data.tokenizer.modelfile import modelfile
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files import gguf_blocks, gguf_writing
from weights_io.parameters import tensor_shapes

PICO = Path(weights_io.__file__).parent / "pico"
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.5, 2.5, 3.5, 4.5]}
LONGROPE |= {"original_max_position_embeddings": 64}
MODELS = {
    "minicpm": {},
    "untied": {"tie_word_embeddings": False},
    "minicpm3": {"model_type": "minicpm3", **LATENT},
    "longrope": {"rope_scaling": LONGROPE, "max_position_embeddings": 64},
    "longer": {"rope_scaling": LONGROPE, "max_position_embeddings": 128},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "wide_heads": {"model_type": "llama", "head_dim": 16},
}


def converted(model: Path, out: Path, *flags):
    ran = typed("weights_io.convert", "--model", model, "--to", "gguf", "--save-path", out, *flags)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model(name, tmp_path):
    """Config, tensors and tokenizer, in the order of rows that llama.cpp expects."""
    folder = tiny_model.write(tmp_path, **MODELS[name])
    converted(folder, tmp_path / "model.gguf", "--outtype", "f32")
    source, found = open_checkpoint(folder), open_checkpoint(tmp_path / "model.gguf")
    ours, theirs = source.config.to_dict(), found.config.to_dict()
    left_out = {"initializer_range", "torch_dtype"}
    assert {k: v for k, v in theirs.items() if k not in left_out} == {
        k: v for k, v in ours.items() if k not in left_out
    }
    for tensor in dict(tensor_shapes(source.config)):
        assert np.array_equal(found.tensors[tensor].read(), source.tensors[tensor].read()), tensor
    mine, back = load_tokenizer(folder), tokenizer_of(found)
    for text in PROBES:
        assert back.encode(text) == mine.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert back.apply_chat(messages) == mine.apply_chat(messages) and back.eos_token_ids == mine.eos_token_ids


@pytest.mark.parametrize(
    "outtype, bound", [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2), ("q4_0", 0.2), ("q4_k_m", 0.2)]
)
def test_matrices_are_rounded_as_the_type_says(outtype, bound, tmp_path):
    folder = tiny_model.write(tmp_path, hidden_size=256, intermediate_size=320, num_hidden_layers=8)
    said = converted(folder, tmp_path / "model.gguf", "--outtype", outtype)
    assert "tensors: " in said
    source, found = open_checkpoint(folder), open_checkpoint(tmp_path / "model.gguf")
    for name, tensor in source.tensors.items():
        exact, rounded = tensor.read(), found.tensors[name].read()
        assert np.abs(rounded - exact).max() <= bound * np.abs(exact).max(), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    if outtype == "q4_k_m":  # llama.cpp's mixture; rows of 320 fill no super-block
        assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.1.attn_q.weight"] == "Q4_K"
        values = [kinds[f"blk.{i}.attn_v.weight"] for i in range(8)]
        assert values == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
        assert [kinds[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q8_0", "Q5_0", "Q5_0"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_super_blocks_lose_no_more_than_those_of_llamacpp(kind, reference):
    """Measured: 1.012 times its squared error for Q4_K, and 1.000 for Q6_K."""
    saved = np.load(reference("gguf/llamacpp_blocks.npz"))
    source = saved[f"{kind}_source"].astype(np.float32)
    errors = [
        np.square(quants.dequantize(packed, GGMLQuantizationType[kind]) - source).sum()
        for packed in (gguf_blocks.quantize(source, kind), saved[kind])
    ]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_super_blocks_of_strange_numbers(kind):
    rows = np.zeros((5, 512), np.float32)
    rows[1] = 1.0
    rows[2] = -3.0
    rows[3, ::7] = 1e-20
    rows[4] = np.linspace(0, 1, 512)
    back = quants.dequantize(gguf_blocks.quantize(rows, kind), GGMLQuantizationType[kind])
    assert np.isfinite(back).all() and np.abs(back - rows).max() < 0.05 * 3


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_experts": 2, "num_experts_per_tok": 1}, "experts"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.1}, "silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_has_no_place_is_refused(changes, said, tmp_path):
    folder = tiny_model.write(tmp_path, **changes)
    ran = typed("weights_io.convert", "--model", folder, "--to", "gguf", "--save-path", tmp_path / "new" / "x.gguf")
    assert ran.returncode == 2 and said in ran.stderr and not (tmp_path / "new").exists()


def test_wrong_calls(tmp_path):
    folder, out = tiny_model.write(tmp_path), tmp_path / "x.gguf"
    start = ("weights_io.convert", "--model", folder, "--save-path")
    for flags, said in [
        ((tmp_path / "x", "--to", "gguf"), "x.gguf"),
        ((out, "--to", "hf", "--outtype", "f16"), "only used with --to gguf"),
        ((out, "--to", "gguf", "-q"), "--outtype"),
        ((out, "--to", "gguf", "--dtype", "float16"), "--outtype"),
    ]:
        ran = typed(*start, *flags)
        assert (ran.returncode, said in ran.stderr, out.exists()) == (2, True, False), ran.stderr
    out.write_text("precious")
    ran = typed(*start, out, "--to", "gguf")
    assert ran.returncode == 2 and "exists" in ran.stderr and out.read_text() == "precious"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder = tiny_model.write(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_writing, "quantize", full)
    ran = typed("weights_io.convert", "--model", folder, "--to", "gguf", "--save-path", tmp_path / "new" / "x.gguf")
    assert ran.returncode == 2 and "is full" in ran.stderr and not (tmp_path / "new").exists()


def test_a_tokenizer_that_gguf_cannot_hold_is_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PICO / name, tmp_path / name)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="normalizer"):
        metadata_of(load_tokenizer(tmp_path), 2048)


def test_the_modelfile_of_pico():
    assert modelfile(load_tokenizer(PICO), "pico.gguf").splitlines() == [
        "FROM ./pico.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}<用户>{{ .Content }}<AI>{{ else }}{{ .Content }}'
        '{{ end }}{{ end }}"""',
        'PARAMETER stop "<用户>"',
        'PARAMETER stop "<AI>"',
        "PARAMETER temperature 0.3",
        "PARAMETER top_p 0.8",
    ]
