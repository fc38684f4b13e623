"""Prompt caches: answers with one equal those without, in both backends and mlx_lm; files that cannot be used."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from minicpm_data.fingerprint import fingerprint
from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.prompt_cache import (
    Prefix,
    dequantized,
    open_prompt_cache,
    quantized,
    same_rotation,
    write_prompt_cache,
)
from minicpm_data.generation.request import GenerationRequest
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, open_with_metadata, write_file

BACKENDS = ["minicpm_jax", "minicpm_mlx"]
PROMPT = [1, *range(3, 60)]
STORED = [*PROMPT[:40], 7, 7]  # the last two are others
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
TEXT = "Tell me about a monkey. "


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 32 numbers, the fewest that MLX quantizes."""
    return tiny_model.write(tmp_path_factory.mktemp("wide"), **WIDE)


def written(package, folder, path, cache_options=CacheOptions()):  # noqa: B008
    backend = importlib.import_module(package)
    decoding = importlib.import_module(f"{package}.backend").Decoding()
    model, _ = backend.load(folder, dtype="float32")
    request = GenerationRequest.of(model, None, [STORED], 1, cache=cache_options)
    found, checkpoint = decoding.cached_prompt(model, request), open_checkpoint(folder)
    write_prompt_cache(path, found, "tiny", fingerprint(checkpoint), "text", STORED)
    return path


def answers(package, folder, path, cache_options=CacheOptions(), **sampling):  # noqa: B008
    """Tokens with the file, without it, and the number of reused tokens."""
    backend = importlib.import_module(package)
    generator = importlib.import_module(f"{package}.backend").generator
    model, _ = backend.load(folder, dtype="float32")
    file = open_prompt_cache(path)
    checkpoint = open_checkpoint(folder)
    file.check_model(checkpoint.config, "tiny", fingerprint(checkpoint))
    request = GenerationRequest.of(model, None, [PROMPT], 24, cache=file.cache_options(cache_options))
    same = file.shared(model.config, request.prompt)
    reusing = dataclasses.replace(request, prefix=Prefix(file, same))
    with_file, without = ([r.token for r in generator.stream(model, None, one)] for one in (reusing, request))
    return with_file, without, same


@pytest.mark.parametrize(("name", "bits"), [("dense", None), ("dense", 8), ("minicpm3", None)])
def test_answers_are_the_same_whoever_wrote_the_file(reference, wide, tmp_path, name, bits):
    folder = wide if name == "dense" else reference("minicpm3")
    options = CacheOptions(kv_bits=bits)
    for writer in BACKENDS:
        path = written(writer, folder, tmp_path / f"{writer}.safetensors", options)
        for reader in BACKENDS:
            with_file, without, same = answers(reader, folder, path, options)
            assert same == 40 and len(without) == 24
            # Where the other backend has quantized, in another way, the keys differ a little.
            assert with_file == without or (bits and reader != writer), (writer, reader)


def test_codes_of_jax_are_those_of_mlx():
    mx = pytest.importorskip("mlx.core")
    codes = np.random.default_rng(0).integers(-127, 128, (1, 2, 5, 64))
    codes[..., 0] = 127
    x = (codes * np.float32(0.037)).astype(np.float32)
    part = quantized(x, 32)
    assert np.array_equal(np.rint(dequantized(part, 8, 32) / np.float32(0.037)), codes)
    theirs = mx.dequantize(*map(mx.array, part), 32, 8)
    np.testing.assert_allclose(np.array(theirs), dequantized(part, 8, 32), rtol=0, atol=1e-5)


def test_mlx_lm_reads_and_writes_the_same_file(wide, tmp_path):
    cache = pytest.importorskip("mlx_lm.models.cache")
    for options, kind in ((CacheOptions(), "KVCache"), (CacheOptions(kv_bits=4, kv_group_size=32), "QuantizedKVCache")):
        path = written("minicpm_mlx", wide, tmp_path / f"{kind}.safetensors", options)
        layers, metadata = cache.load_prompt_cache(str(path), return_metadata=True)
        assert [type(layer).__name__ for layer in layers] == [kind] * 2 and layers[0].offset == len(STORED)
        assert metadata["model"] == "tiny" and json.loads(metadata["tokenizer_config"]) == {}
        theirs = tmp_path / "theirs.safetensors"
        cache.save_prompt_cache(str(theirs), layers, {"model": "tiny", "tokenizer_config": "{}"})
        ours, again = open_prompt_cache(path), open_prompt_cache(theirs)
        assert again.text is None and (again.length, again.bits) == (ours.length, ours.bits)
        for one, other in zip(ours.layer(1, 30), again.layer(1, 30), strict=True):
            np.testing.assert_equal(other, one)


def test_a_long_prompt_of_another_rope_is_computed(reference, wide, tmp_path):
    config = open_checkpoint(wide).config
    assert same_rotation(config, 10, 10**6)
    dynamic = type(config).from_dict({**config.to_dict(), "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    context = config.max_position_embeddings
    assert same_rotation(dynamic, 10, context) and not same_rotation(dynamic, 10, context + 1)
    long = open_checkpoint(reference("minicpm4_scaled")).config
    original = long.rope_scaling.original_max_position_embeddings
    assert same_rotation(long, 1, original) and same_rotation(long, 10**6, 10**6 + 1)
    assert same_rotation(long, 1, 10**6) == long.rope_scaling.always_long(long.max_position_embeddings)


@pytest.mark.parametrize("package", BACKENDS)
def test_the_commands(package, wide, tmp_path):
    path = tmp_path / "c.safetensors"
    made = typed(f"{package}.cache_prompt", "--model", wide, "--prompt", TEXT, "--prompt-cache-file", path)
    assert made.returncode == 0 and made.stdout.startswith("Processed "), made.stderr
    plain = ["--model", wide, "-m", 6, "--prompt"]
    whole = typed(f"{package}.generate", *plain, TEXT + "What does it eat?")
    short = typed(f"{package}.generate", *plain, "What does it eat?", "--prompt-cache-file", path)
    assert short.returncode == 0 and short.stdout == whole.stdout
    assert "note" not in short.stderr
    if package == "minicpm_jax":  # chat is the same code, and other programs
        return
    talk = ["--model", wide, "-m", 6, "--temp", 0]
    whole = typed(f"{package}.chat", *talk, stdin=f"{TEXT}What does it eat?\nAnd then?\n")
    short = typed(f"{package}.chat", *talk, "--prompt-cache-file", path, stdin="What does it eat?\nAnd then?\n")
    assert short.returncode == 0 and short.stdout == whole.stdout


def test_a_file_of_another_model_or_state_is_refused_by_name(wide, tmp_path):
    path = tmp_path / "c.safetensors"
    given = ["--prompt", TEXT, "--prompt-cache-file", path]
    assert typed("minicpm_mlx.cache_prompt", "--model", wide, *given).returncode == 0
    other = tiny_model.write(tmp_path / "other", seed=1, **WIDE)
    for changed, said in (
        (["--model", other], "other weights of the same architecture"),
        (["--model", "pico"], "another model (its config.json differs)"),
        (["--model", wide, "--quantize", 8], "another --quantize"),
        (["--model", wide, "--rope-scaling", '{"type": "linear", "factor": 2}'], "another RoPE scaling"),
    ):
        ran = typed("minicpm_mlx.generate", *given, *changed)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and said in ran.stderr, ran.stderr
    ran = typed("minicpm_mlx.generate", "--model", wide, *given, "--system-prompt", "Be brief.", "-m", 2)
    assert ran.returncode == 0 and "reused" in ran.stderr
    (tmp_path / "d.safetensors").write_bytes(b"something else")
    for wrong in ("d.safetensors", "no/c.safetensors", "c.bin"):
        ran = typed("minicpm_jax.cache_prompt", "--model", wide, *given[:3], tmp_path / wrong)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and ran.stderr.startswith("error: ")


def test_damaged_files(wide, tmp_path):
    """Cut anywhere, with flipped bits, or with other arrays: one sentence with the remedy."""
    path = written("minicpm_mlx", wide, tmp_path / "c.safetensors")
    whole, config = path.read_bytes(), open_checkpoint(wide)
    mark = fingerprint(config)

    def read(file):
        found = open_prompt_cache(file)
        found.check_model(config.config, "tiny", mark)
        return [found.layer(layer, 5) for layer in range(found.layers)]

    read(path)
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(InputError, match="make it again with cache_prompt"):
            read(bad)
    random = np.random.default_rng(0)
    for place in (*random.integers(8, len(whole), 60), len(whole) - 2):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        bad.write_bytes(flipped)
        try:  # a bit of the text or a note may be flipped unnoticed: never a number
            found = read(bad)
        except InputError as error:
            assert "cache_prompt" in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_equal(found, read(path))
    tensors, metadata = open_with_metadata(path)
    arrays = {name: Computed.of(np.asarray(tensor.read())) for name, tensor in tensors.items()}
    for name, array in (
        ("0.2", np.array(10**9, np.int32)),
        ("0.2", np.zeros((1, 1), np.int32)),
        ("0.0", np.zeros((1, 2, 42, 31), np.float32)),
        ("0.0", np.zeros((1, 2, 42, 32), np.int8)),
        ("9.9", np.zeros(3, np.float32)),
    ):
        write_file(bad, {**arrays, name: Computed.of(array)}, metadata)
        with pytest.raises(InputError, match="make it again with cache_prompt"):
            read(bad)
    for key, value in (
        ("1.0", "MambaCache"),
        ("0.minicpm", "[]"),
        ("0.minicpm", json.dumps({**json.loads(metadata["0.minicpm"]), "ids": [2**60] * len(STORED)})),
        ("0.tokenizer_config", '{"eos_token": 3}'),
    ):
        write_file(bad, arrays, {**metadata, key: value})
        with pytest.raises(InputError, match="make it again with cache_prompt"):
            read(bad)
    assert not list(Path(tmp_path).glob(".*"))


def test_a_rotated_cache_is_refused(wide, tmp_path):
    cache = pytest.importorskip("mlx_lm.models.cache")
    import mlx.core as mx

    path = str(tmp_path / "r.safetensors")
    layers = [cache.RotatingKVCache(16, 4) for _ in range(2)]
    for count in (10, 10):
        for layer in layers:
            layer.update_and_fetch(*mx.ones((2, 1, 2, count, 32)))
        cache.save_prompt_cache(path, layers, {"model": "tiny", "tokenizer_config": "{}"})
        if count == layers[0].offset:
            assert open_prompt_cache(Path(path)).cache_options(CacheOptions()).max_kv_size == 16
    with pytest.raises(InputError, match="rotated"):
        open_prompt_cache(Path(path))
    ran = typed(
        *("minicpm_mlx.cache_prompt", "--model", wide, "--prompt", TEXT * 3, "--max-kv-size", 8),
        *("--prompt-cache-file", tmp_path / "n.safetensors"),
    )
    assert ran.returncode == 2 and "--max-kv-size is 8, less than" in ran.stderr
