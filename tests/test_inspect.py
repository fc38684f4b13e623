"""What is said of a model without reading its weights."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from minicpm_data.cli.inspect import inspect, look_up
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, write_file
from weights_io.files.tensor import FileTensor
from weights_io.inspect import Options, lines, main
from weights_io.quantization.ternary import SAMPLE


@pytest.fixture
def model(reference, tmp_path):
    """A copy of dense_2b that a test may spoil."""
    return shutil.copytree(reference("dense_2b"), tmp_path / "model", copy_function=shutil.copyfile)


def test_counts_sizes_and_scales(reference):
    report = inspect(reference("dense_2b"))
    tensors = open_checkpoint(reference("dense_2b")).tensors
    assert report.parameters == sum(t.read().size for t in tensors.values())
    assert report.parameters - report.parameters_without_embedding == 320 * 96
    assert report.stored == {"float32": 29} and report.dtype == "float32"
    size = (reference("dense_2b") / "model.safetensors").stat().st_size
    assert report.files == {"model.safetensors": {"bytes": size, "tensors": 29}} and report.bytes == size
    assert report.context_length == 4096
    assert report.derived == pytest.approx(
        {"embedding_scale": 12, "residual_scale": 1.4 / np.sqrt(3), "logit_divisor": 3}
    )
    assert report.tokenizer is None and not report.problems
    assert [note.split(";")[0] for note in report.unusual] == [
        "config.json has no model_type",
        "config.json has no rope_theta",
        "config.json has no tie_word_embeddings",
    ]


def test_head_counts_as_embedding_when_it_is_untied(reference):
    report = inspect(reference("llama_format"))
    assert report.parameters - report.parameters_without_embedding == 2 * 320 * 96
    assert report.unusual == [] and report.derived["logit_divisor"] == 1


def test_of_the_weights_a_few_rows_are_read(reference, monkeypatch):
    """Those that tell whether the weights are ternary; here the first matrix has other values."""
    whole, read = FileTensor.read, []

    def counted(self, index=()):
        read.append(whole(self, index))
        return read[-1]

    monkeypatch.setattr(FileTensor, "read", counted)
    for name in ("dense_2b", "bin", "sharded", "gguf/model-q4_0.gguf"):
        read.clear()
        assert inspect(reference(name)).files
        assert sum(len(rows) for rows in read) <= SAMPLE


def test_every_shard_is_counted(reference):
    report = inspect(reference("sharded"))
    assert [file["tensors"] for file in report.files.values()] == [10, 10, 9]


def test_gguf_types_and_tokenizer(reference):
    report = inspect(reference("gguf/model-q4_0.gguf"))
    assert report.stored == {"Q4_0": 15, "Q6_K": 1, "float32": 5}
    assert (report.tokenizer, report.tokenizer_ids) == ("GGUF (llama)", 512)


def test_unusual_tensors_are_told(model, reference):
    notes = " ".join(inspect(reference("bin")).unusual)
    assert "stored a second time" in notes and "torch pickles" in notes
    tensors = dict(open_checkpoint(model).tensors)
    half = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = Computed(half.shape, np.dtype(np.float16), lambda: half.read().astype(np.float16))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Computed(
        (8,), np.dtype(np.float32), lambda: np.ones(8, np.float32)
    )
    write_file(model / "new", tensors)
    (model / "new").replace(model / "model.safetensors")
    report = inspect(model)
    notes = " ".join(report.unusual)
    assert "rotary buffers are stored (1 tensors)" in notes and "several dtypes: float16, float32" in notes
    assert "config.json says float32 and the tensors are float16 and float32" in notes
    assert not report.problems


def bpe(vocab: dict[str, int] | int, *added: int) -> str:
    vocab = {f"{i}": i for i in range(vocab)} if isinstance(vocab, int) else vocab
    tokens = [{"id": i, "content": f"<{i}>", "special": True, **FLAGS} for i in added]
    return json.dumps({"version": "1.0", "added_tokens": tokens, **STEPS, "model": {**BPE, "vocab": vocab}})


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
STEPS = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
BPE = {"type": "BPE", "merges": []}


def test_tokenizer_and_chat_template(model):
    (model / "tokenizer.json").write_text(bpe(300, 300))
    report = inspect(model)
    assert (report.tokenizer, report.tokenizer_ids) == ("tokenizer.json (BPE)", 301)
    assert "<用户>{}<AI>" in report.chat_template
    assert any("19 more rows than the tokenizer has ids (301)" in note for note in report.unusual)
    config = {"chat_template": "x", "added_tokens_decoder": {"400": {"content": "<y>"}}}
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    report = inspect(model)
    assert "tokenizer_config.json" in report.chat_template
    (model / "chat_template.jinja").write_text("x")
    assert "chat_template.jinja" in inspect(model).chat_template
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert any("not of one checkpoint" in problem for problem in inspect(model).problems)
    (model / "tokenizer.json").write_text('{"model": []}')
    assert any("does not describe a tokenizer" in problem for problem in inspect(model).problems)


def test_a_token_beyond_the_table_is_told(model):
    (model / "tokenizer.json").write_text(bpe(320, 320))
    report = inspect(model)
    assert not report.problems
    assert any("'<320>' are beyond the model's 320 rows" in note for note in report.unusual)
    (model / "tokenizer.json").write_text(bpe(321))
    assert any("321 ids, and the embedding 320 rows" in problem for problem in inspect(model).problems)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": bpe({"a": 0})},
        {"tokenizer.json": bpe({"a": 0}, 5)},  # the library would give it the id 1
        {"tokenizer.json": bpe({"a": 0}).replace("null", '{"type": "FixedLength", "length": 0}', 2)},
        {"tokenizer.json": bpe({"a": 999})},
        {"tokenizer.json": bpe({"a": 0}).replace('"BPE"', '"WordLevel"')},
        {"tokenizer.json": bpe({"a": 0}), "chat_template.jinja": b"\xff"},
        {"tokenizer.json": bpe({"a": 0}), "tokenizer_config.json": '{"add_bos_token": "no"}'},
        {"tokenizer.json": bpe({"a": 0}), "tokenizer_config.json": '{"legacy": false, "legacy": true}'},
        {"tokenizer.json": "\ufeff" + bpe({"a": 0}), "tokenizer_config.json": '{"model_max_length": 1e30, "x": 1}'},
        {"tokenizer.model": b"no"},
    ],
)
def test_inspect_refuses_the_tokenizers_that_load_refuses(model, files):
    for name, content in files.items():
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        tokenizer_of(open_checkpoint(model))
        refused = None
    except InputError as error:
        refused = str(error)
    assert inspect(model).problems == ([] if refused is None else [refused])


def test_faults_of_the_weights_are_told_beside_what_is_known(model, capsys):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        main(Options(model=str(model)))
    assert "266,400" in capsys.readouterr().out
    weights.unlink()
    assert inspect(model).problems and not inspect(model, downloaded=True).problems
    assert any("not (or not wholly) downloaded" in note for note in inspect(model, downloaded=True).unusual)
    tensors = {"model.norm.weight": Computed((96,), np.dtype(np.float32), lambda: np.ones(96, np.float32))}
    write_file(weights, tensors)
    assert any("28 missing" in problem for problem in inspect(model).problems)


def test_experts_and_activation_are_told(reference):
    report = inspect(reference("moe_8x2b"))
    tensors = open_checkpoint(reference("moe_8x2b")).tensors
    assert report.parameters == sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    idle = [tensor for name, tensor in tensors.items() if re.search(r"experts\.[2-7]\.", name)]
    assert report.parameters_active == report.parameters - sum(int(np.prod(tensor.shape)) for tensor in idle)
    text = "\n".join(lines(report))
    assert "MiniCPMForCausalLM (2 of 8 experts a token), tied head" in text
    assert f"{report.parameters_active:,} active a token" in text
    assert "MLP 40 (silu)" in text
    text = "\n".join(lines(inspect(reference("s_1b"))))
    assert "(dense)" in text and "active" not in text and "MLP 160 (fatrelu from 0.3 up)" in text


def test_the_catalogue_answers_where_the_hub_cannot(monkeypatch):
    def refuse(*arguments, **options):
        raise InputError("no network.")

    monkeypatch.setattr("weights_io.hub.resolve", refuse)
    report = look_up(Options(model="minicpm-2b"))
    assert (report.parameters, report.parameters_without_embedding) == (2_724_880_896, 2_442_057_984)
    assert report.unusual == ["the repository itself could not be asked: no network."]
    assert "unknown" in "\n".join(lines(report))
    with pytest.raises(InputError, match="no network"):
        look_up(Options(model="someone/else"))


def test_memory_is_told_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = look_up(Options(model="minicpm-moe-8x2b"))
    assert report.memory["stored"] == report.memory["bfloat16"] == 2 * 13_873_291_776
    rest = 2 * (81 * 2304 + 40 * 8 * 2304)  # norms and routers
    table = 122753 * 2304
    packed = 13_873_291_776 - rest // 2 - table
    assert report.memory["int8"] == (packed + table) * 17 // 16 + rest  # a scale and an offset for 64 numbers
    assert report.memory["int4"] == packed * 9 // 16 + table * 17 // 16 + rest  # the head in 8 bits
    assert report.cache == {"bfloat16": 2 * 40 * 36 * 64 * 2 * 1000, "int8": 2 * 40 * (36 * 64 + 40 * 4) * 1000}
    text = "\n".join(lines(look_up(Options(model="minicpm-2b-128k"))))
    assert "6.02 GB as stored; 6.02 GB in bfloat16, 3.46 GB in int8, 2.24 GB in int4" in text
    assert "for 1,000 tokens; 24.16 GB in bfloat16, 12.92 GB in int8 for 65,536" in text
    text = "\n".join(lines(look_up(Options(model="minicpm3-4b"))))
    assert "35.7 MB in bfloat16, 18.4 MB in int8 for 1,000 tokens; 1.17 GB in bfloat16" in text
    assert "40 heads of 64 (keys of 96), cached as latents of 256 and a rotary key of 32 a token" in text
    report = look_up(Options(model="minicpm-2b-history"))
    assert report.dtype == "unknown" and report.memory["stored"] is None and report.memory["bfloat16"] == 5449761792
    assert "unknown as stored; 5.45 GB in bfloat16" in "\n".join(lines(report))


def test_memory_as_the_backends_have_it(reference):
    import jax
    from mlx.utils import tree_flatten

    from minicpm_jax import model as jax_model
    from minicpm_jax.layers.kv_cache import Cache
    from minicpm_jax.quantization.model import quantize_model as quantised_jax
    from minicpm_mlx.model import abstract
    from minicpm_mlx.quantization.model import quantize_model
    from weights_io.config import ModelConfig
    from weights_io.memory import cache_bytes, packed_bytes, weight_bytes

    latent = ModelConfig.from_file(reference("minicpm3") / "config.json")
    config = ModelConfig.from_file(reference("dense_2b") / "config.json")
    config = dataclasses.replace(config, hidden_size=128, intermediate_size=96, num_attention_heads=4, head_dim=32)
    whole = abstract(config)
    assert sum(array.nbytes for _, array in tree_flatten(whole.parameters())) == weight_bytes(config, "bfloat16")
    for bits, least in ((8, 0.96), (4, 0.93)):
        told = packed_bytes(config, "bfloat16", bits, head=True)
        held = quantize_model(abstract(config), bits, head=True).parameters()  # down's rows of 96 in groups of 32
        assert sum(array.nbytes for _, array in tree_flatten(held)) == told
        # JAX has no offsets; int4 is half a byte, whatever numpy says.
        plain = jax_model.abstract(config, "bfloat16")
        packed = jax.eval_shape(lambda model, bits=bits: quantised_jax(model, bits, head=True), plain)
        sizes = [x.size * (0.5 if x.dtype == "int4" else x.dtype.itemsize) for x in jax.tree.leaves(packed)]
        assert least * told < sum(sizes) < told
    for dtype, bits, kind in (("bfloat16", None, config), ("int8", 8, config), ("int8", 8, latent)):
        cache = jax.eval_shape(lambda bits=bits, kind=kind: Cache.empty(kind, 1, 48, "bfloat16", bits))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) - 4  # less the row's length
        assert held == cache_bytes(kind, 48, dtype)


def test_the_catalogue_tells_sizes(capsys):
    from weights_io import catalog

    catalog.main(catalog.Options())
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "bfloat16  27.75 GB  openbmb" in printed["minicpm-moe-8x2b"]
    assert "unknown    unknown  openbmb" in printed["minicpm-2b-history"]


def test_json_is_for_machines(reference, capsys):
    main(Options(model=str(reference("long_128k")), json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["rope_scaling"]["type"] == "dynamic"
    assert report["parameters"] == inspect(reference("long_128k")).parameters


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    (tmp_path / "config.json").write_text('{"num_experts": 8}')
    for model in (tmp_path, tmp_path / "nowhere"):
        done = typed("weights_io.inspect", "--model", model)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        ("config.json", "eos_token_id", "2", 'config.json: eos_token_id is "2"; it must be a token id'),
        ("config.json", "eos_token_id", -1, "config.json: eos_token_id is -1; it must be a token id"),
        ("config.json", "bos_token_id", [1.5], r"config.json: bos_token_id is \[1.5\]; it must be a token id"),
        ("generation_config.json", None, [], "generation_config.json holds list, not a JSON object"),
        ("generation_config.json", None, {"eos_token_id": "x"}, "generation_config.json: eos_token_id is"),
    ],
)
def test_what_load_refuses_beside_the_weights_is_a_problem(model, file, key, value, message):
    content = {**json.loads((model / "config.json").read_text()), key: value} if key else value
    (model / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_checkpoint(model)
    with pytest.raises(InputError, match=message):
        main(Options(model=str(model)))


def test_a_head_that_is_not_the_tied_embedding_is_a_problem(reference, tmp_path):
    model = shutil.copytree(reference("dense_untied"), tmp_path / "model", copy_function=shutil.copyfile)
    raw = json.loads((model / "config.json").read_text())
    assert raw.pop("tie_word_embeddings") is False and not inspect(model).problems
    (model / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="differs from the embedding"):
        open_checkpoint(model)
    assert any("differs from the embedding" in problem for problem in inspect(model).problems)


def test_several_problems_are_one_sentence_and_each_has_a_remedy(model):
    (model / "generation_config.json").write_text("[]")
    (model / "tokenizer.json").write_text(bpe({"a": 999}))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError) as caught:
        main(Options(model=str(model)))
    text = str(caught.value)
    assert len(inspect(model).problems) == 3 and text.count(". ") == 0 and text.endswith(".")
    assert text.count("download it again") == 2
    assert "has 1000 ids, and the embedding 320 rows; use the tokenizer files that were released" in text


def test_a_terminal_without_unicode_shows_question_marks(model):
    ran = subprocess.run(
        [sys.executable, "-m", "weights_io.inspect", "--model", str(tiny_model.write(model / "tiny"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "MiniCPM's default, <??>{}<AI>" in ran.stdout
