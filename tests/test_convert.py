"""Folding into the Llama format and back, and the command that does it."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from documented_commands import typed

from weights_io.casting import Rounding
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.convert import Options, main
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, write_file
from weights_io.llama_format import from_llama, to_llama
from weights_io.parameters import parameters
from weights_io.write import save_checkpoint, unstack_params

BFLOAT16_EPSILON = 2.0**-7
CONVERT = "weights_io.convert"


def test_folding_gives_the_llama_of_the_reference(reference):
    source, expected = open_checkpoint(reference("dense_2b")), open_checkpoint(reference("llama_format"))
    config, tensors = to_llama(source.config, source.tensors)
    assert config == expected.config
    assert tensors.keys() == expected.tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor.read(), expected.tensors[name].read(), rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("name", ["dense_2b", "dense_bf16", "dense_1b"])
def test_unfolding_is_the_inverse_and_ties_again(reference, name):
    source = open_checkpoint(reference(name))
    c = source.config
    config, tensors = to_llama(c, source.tensors)
    arrays = {key: _Held(tensor.read()) for key, tensor in tensors.items()}
    back, unfolded = from_llama(config, arrays, c.scale_emb, c.scale_depth, c.dim_model_base)
    assert back == c and back.tie_word_embeddings
    epsilon = BFLOAT16_EPSILON if source.dtype == "bfloat16" else 2.0**-23  # two roundings of half of it
    for key, tensor in unfolded.items():
        original, again = source.tensors[key].read(), tensor.read()
        assert again.dtype == original.dtype
        np.testing.assert_allclose(
            again.astype(np.float64), original.astype(np.float64), rtol=epsilon, atol=0, err_msg=key
        )


@pytest.mark.parametrize("name", ["dense_untied", "minicpm4_8b"])
def test_an_untied_model_stays_untied(reference, name):
    source = open_checkpoint(reference(name))
    c = source.config
    config, tensors = to_llama(c, source.tensors)
    back, unfolded = from_llama(
        config,
        {key: _Held(tensor.read()) for key, tensor in tensors.items()},
        c.scale_emb,
        c.scale_depth,
        c.dim_model_base,
    )
    assert back == c and not back.tie_word_embeddings
    head = "lm_head.weight"
    np.testing.assert_allclose(unfolded[head].read(), source.tensors[head].read(), rtol=1e-6)


def test_wrong_scales_leave_it_untied(reference):
    llama = open_checkpoint(reference("llama_format"))
    assert from_llama(llama.config, llama.tensors, 12.0, 1.4, 32)[0].tie_word_embeddings
    assert not from_llama(llama.config, llama.tensors, 11.0, 1.4, 32)[0].tie_word_embeddings
    assert not from_llama(llama.config, llama.tensors)[0].tie_word_embeddings  # the released models' numbers


def test_formats_that_leave_nothing_to_do_are_refused(reference):
    minicpm, llama = open_checkpoint(reference("dense_2b")), open_checkpoint(reference("llama_format"))
    with pytest.raises(InputError, match="Llama format already"):
        to_llama(llama.config, llama.tensors)
    with pytest.raises(InputError, match="not in the Llama format"):
        from_llama(minicpm.config, minicpm.tensors)
    with pytest.raises(InputError, match="scale_emb is -1"):
        from_llama(llama.config, llama.tensors, scale_emb=-1)


@pytest.mark.parametrize("name", ["moe_8x2b", "s_1b", "minicpm3", "minicpm4_sparse", "minicpm5"])
def test_other_models_are_rewritten_bit_for_bit(reference, tmp_path, capsys, name):
    main(Options(model=str(reference(name)), to="hf", save_path=tmp_path / "out"))
    assert ("compute the norms of MiniCPM3's latents" in capsys.readouterr().out) == (name == "minicpm3")
    source, written = open_checkpoint(reference(name)), open_checkpoint(tmp_path / "out")
    assert written.config == source.config
    assert written.raw_config.get("sparse_config") == source.raw_config.get("sparse_config")
    assert written.raw_config["rope_theta"] == source.config.rope_theta  # mlx_lm reads no rope_parameters
    heads = source.raw_config["num_key_value_heads"]  # other readers of MiniCPM3 require it
    assert written.raw_config["num_key_value_heads"] == heads
    assert written.tensors.keys() == source.tensors.keys()
    for key, tensor in source.tensors.items():
        np.testing.assert_array_equal(written.tensors[key].read(), tensor.read())


@pytest.mark.parametrize(
    "name, message",
    [
        ("moe_8x2b", "a Llama has no experts"),
        ("s_1b", "a Llama has no FATReLU"),
        ("minicpm4_scaled", "a Llama takes longrope's factors by the length alone"),
    ],
)
def test_what_a_llama_has_not_is_refused(reference, tmp_path, name, message):
    with pytest.raises(InputError, match=f"{message}.*; use --to hf"):
        main(Options(model=str(reference(name)), to="llama", save_path=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_llama_keeps_relu(tmp_path):
    source = open_checkpoint(tiny_model.write(tmp_path, hidden_act="relu"))
    config, _ = to_llama(source.config, source.tensors)
    assert config.to_dict()["hidden_act"] == "relu"
    assert "hidden_act_param" not in config.to_dict()


def test_stacked_experts_are_written_apart(reference, tmp_path):
    """What training saves: arrays stacked over layers and experts."""
    source = open_checkpoint(reference("moe_8x2b"))
    stacked = {
        p.name: np.stack([source.tensors[t].read() for t in p.hf_names(source.config)]).reshape(p.shape(source.config))
        for p in parameters(source.config)
    }
    save_checkpoint(tmp_path / "out", source.config, unstack_params(source.config, stacked))
    for key, tensor in open_checkpoint(tmp_path / "out").tensors.items():
        np.testing.assert_array_equal(tensor.read(), source.tensors[key].read(), err_msg=key)


def test_rounding_to_bfloat16_is_reported(reference, tmp_path, capsys):
    source = open_checkpoint(reference("dense_2b"))
    rounding = Rounding()
    config, tensors = to_llama(source.config, source.tensors, "bfloat16", rounding)
    save_checkpoint(tmp_path / "l", config, tensors, dtype="bfloat16", rounding=rounding)
    assert 2**-9 < rounding.worst <= 2**-8
    assert 0 < rounding.mean < rounding.worst
    main(Options(model=str(source.path), to="llama", save_path=tmp_path / "m", dtype="bfloat16"))
    assert "rounded to bfloat16: worst relative error 0.0039, mean 0.0014" in capsys.readouterr().out


def test_folding_a_bfloat16_model_costs_one_rounding(reference):
    source = open_checkpoint(reference("dense_bf16"))
    rounding = Rounding()
    _, tensors = to_llama(source.config, source.tensors, rounding=rounding)
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
    for name, factor in zip(names, (12.0, 1.4 / np.sqrt(3), 1 / 3), strict=True):
        stored = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        exact = source.tensors[stored].read().astype(np.float64) * factor
        np.testing.assert_allclose(tensors[name].read().astype(np.float64), exact, rtol=BFLOAT16_EPSILON / 2, atol=0)
    assert 0 < rounding.worst <= BFLOAT16_EPSILON / 2


def test_command_there_and_back(reference, tmp_path, capsys):
    main(Options(model=str(reference("dense_2b")), to="llama", save_path=tmp_path / "llama"))
    main(Options(model=str(tmp_path / "llama"), to="hf", save_path=tmp_path / "back", unfold=True, dim_model_base=32))
    said = capsys.readouterr().out
    assert "LlamaForCausalLM, 297,120 parameters, 30 tensors in float32" in said
    assert "are the same numbers and are tied" in said
    assert str(tmp_path / "back") in said and "model.safetensors" in said
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(reference("dense_2b")).config
    llama = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert llama["architectures"] == ["LlamaForCausalLM"] and llama["tie_word_embeddings"] is False
    assert not {"scale_emb", "scale_depth", "dim_model_base"} & llama.keys()


def test_torch_files_become_safetensors(reference, tmp_path):
    main(Options(model=str(reference("bin")), to="hf", save_path=tmp_path / "out"))
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in open_checkpoint(reference("dense_2b")).tensors.items():
        np.testing.assert_array_equal(written[name], tensor.read())


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(reference, tmp_path):
    from minicpm_data import load_tokenizer, tokenizer_from_gguf

    path = reference("gguf") / "model-q4_0.gguf"
    main(Options(model=str(path), to="hf", save_path=tmp_path / "out", dtype="float32"))
    source, written = open_checkpoint(path), open_checkpoint(tmp_path / "out")
    assert written.config == source.config and written.eos_token_ids == source.eos_token_ids
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(written.tensors[name].read(), source.tensors[name].read())
    ours, theirs = load_tokenizer(tmp_path / "out"), tokenizer_from_gguf(source.metadata)
    for text in ("hello world", " a  b\n", "<s>x</s>", "你好"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.encode("x")[0] == ours.bos_token_id == 1
    assert (ours.eos_token_ids, ours.chat_template) == (theirs.eos_token_ids, theirs.chat_template)


def test_overflow_names_the_tensor_and_leaves_nothing(reference, tmp_path):
    source = open_checkpoint(reference("dense_2b"))
    with pytest.raises(InputError, match="model.layers.0.mlp.up_proj.weight has numbers too large"):
        save_checkpoint(tmp_path / "out", source.config, _too_large(source), dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"to": "hf"}, {"to": "hf", "dtype": "bfloat16"}, {"to": "llama"}])
def test_nan_names_tensor_and_file_and_leaves_no_new_folder(reference, tmp_path, options):
    source = open_checkpoint(reference("dense_2b"))
    name = "model.layers.0.mlp.down_proj.weight"  # one that folding scales
    spoiled = np.full(source.tensors[name].shape, np.nan, np.float32)
    save_nan = dict(source.tensors) | {name: Computed(spoiled.shape, spoiled.dtype, lambda: spoiled)}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((source.path / "config.json").read_text())
    write_file(model / "model.safetensors", save_nan)
    with pytest.raises(InputError, match=f"{name} in {model}/model.safetensors holds NaN"):
        main(Options(model=str(model), save_path=tmp_path / "x" / "y" / "z", **options))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_folder_above_the_output_stays(reference, tmp_path):
    (tmp_path / "old").mkdir()
    source = open_checkpoint(reference("dense_2b"))
    with pytest.raises(InputError, match="too large for float16"):
        save_checkpoint(tmp_path / "old" / "new" / "out", source.config, _too_large(source), dtype="float16")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    save_checkpoint(tmp_path / "old" / "new" / "out", source.config, source.tensors)
    assert (tmp_path / "old" / "new" / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("to", ["hf", "llama"])
@pytest.mark.parametrize(
    "files, rows, message",
    [
        ({}, 100, r"wrong tokenizer size: the tokenizer has \d+ ids, and the embedding 100 rows; use the tokenizer"),
        ({"tokenizer.model": b"no SentencePiece"}, 600, "tokenizer.model"),
        ({"tokenizer.json": '{"model": {'}, 600, "tokenizer.json is not JSON"),
        ({"tokenizer_config.json": "[]"}, 600, "tokenizer_config.json holds list, not a JSON object"),
    ],
)
def test_a_tokenizer_that_load_would_refuse_is_refused_before_writing(tmp_path, files, rows, message, to):
    model = tiny_model.write(tmp_path / "source", vocab_size=rows)
    for name, content in files.items():
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        main(Options(model=str(model), to=to, save_path=tmp_path / "x" / "out"))
    assert not (tmp_path / "x").exists()


def test_bad_input_is_refused_by_name_and_leaves_nothing(reference, tmp_path):
    model, broken, out = str(reference("dense_2b")), tmp_path / "broken", tmp_path / "x"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for options, message in (
        (Options(model=str(tmp_path / "nowhere"), to="hf", save_path=out), "nowhere"),
        (Options(model=str(broken), to="hf", save_path=out), "is not JSON"),
        (Options(model=model, to="hf", save_path=broken), "is not empty"),
        (Options(model=model, to="hf", save_path=reference("dense_2b") / "inside"), "is inside the model folder"),
        (Options(model=model, to="hf", save_path=out, scale_emb=3.0), "scale_emb is only used with unfold"),
        (Options(model=model, to="llama", save_path=out, unfold=True), "use it with to hf"),
        (Options(model=model, to="hf", save_path=out, unfold=True), "not in the Llama format"),
        (Options(model=str(reference("llama_format")), to="llama", save_path=out), "Llama format already"),
    ):
        with pytest.raises(InputError, match=message):
            main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert not (reference("dense_2b") / "inside").exists()


def test_command_line_says_one_sentence_and_exits_with_2(reference, tmp_path):
    done = typed(CONVERT, "--model", reference("dense_2b"), "--to", "hf", "--save-path", reference("dense_2b"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (
        typed(CONVERT, "--model", reference("dense_2b"), "--to", "onnx", "--save-path", tmp_path / "x").returncode == 2
    )


def test_a_packed_folder_becomes_one_of_floats_with_the_flags_of_mlx_lm(reference, tmp_path):
    packed = reference("quant/mlx_affine_4bit")
    done = typed("minicpm_mlx.convert", "--hf-path", packed, "--mlx-path", tmp_path / "out", "-d")
    assert done.returncode == 0 and "16 matrices dequantized from MLX 4-bit in groups of 64" in done.stdout
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & raw.keys()
    source, written = open_checkpoint(packed), open_checkpoint(tmp_path / "out")
    for name, tensor in written.tensors.items():
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read().astype(np.float16))


@pytest.mark.slow
def test_mlx_lm_and_transformers_open_the_llama_export(reference, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from transformers import AutoConfig

    main(Options(model=str(reference("dense_2b")), to="llama", save_path=tmp_path / "out"))
    expected = np.load(reference("dense_2b") / "reference.npz")
    model, _ = load_model(tmp_path / "out")
    np.testing.assert_allclose(np.array(model(mx.array(expected["input_ids"]))), expected["logits"], rtol=0, atol=1e-4)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama" and config.eos_token_id == 2 and not config.tie_word_embeddings
    assert ModelConfig.from_dict(config.to_dict()) == open_checkpoint(tmp_path / "out").config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense_2b", "moe_8x2b"])
def test_mlx_lm_runs_the_mlx_export_with_our_model(reference, tmp_path, name):
    """Its loader and, as a user types them, its commands: generate, convert to 4 bits, lora."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    main(Options(model=str(reference(name)), to="mlx", save_path=tmp_path / "out"))
    expected = np.load(reference(name) / "reference.npz")
    model, _ = load_model(tmp_path / "out", trust_remote_code=True)
    np.testing.assert_allclose(np.array(model(mx.array(expected["input_ids"]))), expected["logits"], rtol=0, atol=1e-4)
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(reference(name)).config


@pytest.mark.slow
def test_the_commands_of_mlx_lm_take_the_mlx_export(tmp_path):
    """generate, lora, chat and server, as a user types them; the server alone in a process of its own."""
    main(Options(model="pico", to="mlx", save_path=tmp_path / "pico"))
    rows = [{"prompt": f"{i} + 1 = ?", "completion": f"{i} + 1 = {i + 1}"} for i in range(8)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(verb, *arguments, lines=""):
        ran = typed("mlx_lm", verb, "--trust-remote-code", *arguments, stdin=lines)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    asked = ["--model", tmp_path / "pico", "--prompt", "12 + 7 = ?", "--max-tokens", 12]
    assert "12 + 7 = 19" in said("generate", *asked)
    tuned = ["--train", "--data", tmp_path, "--iters", 2, "--batch-size", 2, "--num-layers", 2, "--val-batches", 1]
    said("lora", "--model", tmp_path / "pico", *tuned, "--adapter-path", tmp_path / "adapters")
    assert "12 + 7" in said("generate", *asked, "--adapter-path", tmp_path / "adapters")
    talk = said("chat", "--model", tmp_path / "pico", "--temp", 0, lines="12 + 7 = ?\n20 + 4 = ?\nq\n")
    assert "12 + 7 = 19" in talk and "20 + 4 = 24" in talk
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = ["mlx_lm", "server", "--trust-remote-code", "--model", str(tmp_path / "pico"), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", *served], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        body = {"messages": [{"role": "user", "content": "12 + 7 = ?"}], "max_tokens": 12, "temperature": 0}
        answer = posted(f"http://127.0.0.1:{port}/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"] == "12 + 7 = 19"
    finally:
        server.kill()
        server.wait()


def posted(address, body, patience=60):
    """The answer of a server that may still be starting."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=patience) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _too_large(source):
    """The tensors of a checkpoint, one of them with numbers that float16 has not."""
    name = "model.layers.0.mlp.up_proj.weight"
    return dict(source.tensors) | {name: _Held(np.full(source.tensors[name].shape, 1e5, np.float32))}


class _Held:
    """A tensor in memory with the reading interface of one in a file."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype, self.source = array, array.shape, array.dtype, None

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.array[index]
