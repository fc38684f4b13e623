"""Checkpoints going out: whole or not at all, and the same numbers when read back."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from weights_io.casting import Rounding, cast
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.files.safetensors import Computed
from weights_io.parameters import parameters, tensor_shapes
from weights_io.write import save_checkpoint, unstack_params

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=4,
)


def random_tensors(config: ModelConfig = CONFIG) -> dict[str, Computed]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensor_shapes(config)}
    return {name: Computed(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["dense_2b", "dense_bf16", "dense_untied", "sharded", "bin", "long_128k"])
def test_what_goes_out_comes_back_bit_for_bit(reference, tmp_path, name):
    source = open_checkpoint(reference(name))
    before = contents(source.path)
    save_checkpoint(
        tmp_path / "out", source.config, source.tensors, raw_config=source.raw_config, copy_from=source.path
    )
    back = open_checkpoint(tmp_path / "out")
    assert back.config == source.config and back.dtype == source.dtype
    assert back.eos_token_ids == source.eos_token_ids == (2,)
    assert back.tensors.keys() == source.tensors.keys()
    for tensor in source.tensors:
        assert back.tensors[tensor].read().tobytes() == source.tensors[tensor].read().tobytes(), tensor
    assert contents(source.path) == before
    assert not list(tmp_path.glob(".*"))


def test_the_safetensors_package_reads_it(tmp_path):
    tensors = random_tensors()
    save_checkpoint(tmp_path / "out", CONFIG, tensors, dtype="bfloat16")
    loaded = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()  # and so no lm_head of a tied model
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, tensors[name].read().astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_head_that_is_tied_is_passed_over(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_checkpoint(tmp_path / "out", CONFIG, tensors)
    assert "lm_head.weight" not in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")


def test_shards_hold_at_most_their_limit_and_the_index_names_them(tmp_path):
    tensors = random_tensors()
    limit = 1000  # bytes; the largest tensor has 384
    files = save_checkpoint(tmp_path / "out", CONFIG, tensors, max_shard_bytes=limit)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    loaded = {shard.name: safetensors.numpy.load_file(shard) for shard in shards}
    assert all(sum(a.nbytes for a in arrays.values()) <= limit for arrays in loaded.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, arrays in loaded.items() for name in arrays}
    assert index["metadata"]["total_size"] == sum(a.nbytes for arrays in loaded.values() for a in arrays.values())
    assert {name for name, _ in tensor_shapes(CONFIG)} == open_checkpoint(tmp_path / "out").tensors.keys()


def test_side_files_and_harmless_keys_go_along_and_code_does_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_minicpm.py", "README.md"):
        (source / name).write_text(name)
    raw = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "auto_map": {"AutoConfig": "x.Y"}, "foo": "x"}
    raw |= {"_name_or_path": "x/y", "temperature": 0.3}
    save_checkpoint(
        tmp_path / "out",
        CONFIG,
        random_tensors(),
        raw_config=raw,
        copy_from=source,
        extra_files={"tokenizer.json": b"ours"},
    )
    assert contents(tmp_path / "out").keys() == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "ours"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
    }
    assert not {"auto_map", "foo", "_name_or_path"} & written.keys() and written["temperature"] == 0.3
    assert ModelConfig.from_dict(written) == CONFIG


def test_stacked_arrays_come_out_layer_by_layer(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {p.name: rng.normal(size=p.shape(CONFIG)).astype(np.float32) for p in parameters(CONFIG)}
    save_checkpoint(tmp_path / "out", CONFIG, unstack_params(CONFIG, arrays))
    loaded = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(loaded["model.norm.weight"], arrays["model.norm.weight"])
    for layer in range(2):
        np.testing.assert_array_equal(
            loaded[f"model.layers.{layer}.mlp.up_proj.weight"], arrays["model.layers.mlp.up_proj.weight"][layer]
        )


def test_refuses_what_exists_and_what_lies_in_the_source(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    for out, message in (
        (full, "is not empty"),
        (tmp_path / "file", "is a file"),
        (source, "is inside the model folder"),
        (source / "deep" / "er", "is inside the model folder"),
    ):
        before = contents(tmp_path)
        with pytest.raises(InputError, match=message):
            save_checkpoint(out, CONFIG, random_tensors(), copy_from=source)
        assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", CONFIG, random_tensors())
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_an_error_half_way_leaves_nothing(tmp_path):
    tensors = random_tensors()

    def fail_with(error: BaseException):
        def make():
            raise error

        last = max(tensors)  # the last to be written
        return tensors | {last: Computed(tensors[last].shape, tensors[last].dtype, make)}

    for error, raised in (
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (PermissionError(errno.EACCES, "Permission denied"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(raised) as caught:
            save_checkpoint(tmp_path / "out", CONFIG, fail_with(error))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            assert "full" in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GB free"):
        save_checkpoint(tmp_path / "out", CONFIG, random_tensors())
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from test_write import CONFIG, random_tensors
from weights_io.files.safetensors import Computed
from weights_io.write import save_checkpoint

def slow(tensor):
    def make():
        print("writing", flush=True)
        time.sleep(0.2)
        return tensor.read()
    return Computed(tensor.shape, tensor.dtype, make)

save_checkpoint(Path({out!r}), CONFIG, {{name: slow(t) for name, t in random_tensors().items()}})
"""


def test_a_killed_export_leaves_nothing_under_its_name(tmp_path):
    out = tmp_path / "out"
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent)], out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.05)
    assert not out.exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    save_checkpoint(out, CONFIG, random_tensors())  # the leftover is not in its way, and goes
    assert open_checkpoint(out).config == CONFIG
    assert list(tmp_path.iterdir()) == [out]


def test_what_another_process_is_writing_is_left_to_it(tmp_path):
    """Two exports to one place: the second one to end says that it is taken."""
    out = tmp_path / "out"
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent)], out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "writing\n"
        save_checkpoint(out, CONFIG, random_tensors())
        assert len(list(tmp_path.glob(".*.partial"))) == 1
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode and re.search(r"InputError: cannot write \S+/out: .*not empty", error), error
    assert open_checkpoint(out).config == CONFIG and list(tmp_path.iterdir()) == [out]


def test_leftovers_of_other_targets_stay(tmp_path):
    """A target whose name begins alike, and what only looks like a leftover."""
    names = (".out.b.0123abcd.partial", ".out.partial", ".out.0123abcd.mine", ".out.0123abcde.partial")
    for name in (*names, ".out.0123abcd.partial"):
        (tmp_path / name).write_text("")
    with pytest.raises(KeyboardInterrupt), partial(tmp_path / "out") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_missing_and_misshapen_tensors_are_a_defect_of_the_caller(tmp_path):
    tensors = random_tensors()
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = Computed((3, 3), np.dtype(np.float32), lambda: np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight, model\.norm\.weight"):
        save_checkpoint(tmp_path / "out", CONFIG, tensors)


def test_cast_refuses_overflow_and_what_is_not_finite():
    with pytest.raises(InputError, match=r"w has numbers too large for float16"):
        cast("w", np.array([1.0, 70000.0], np.float32), "float16")
    with pytest.raises(InputError, match="too large for float32"):
        cast("w", np.array([3e38], np.float32), "float32", multiply=12.0)
    for number in (np.inf, -np.inf, np.nan):
        for dtype in ("float16", "float32"):
            with pytest.raises(InputError, match=r"w holds NaN or infinite numbers"):
                cast("w", np.array([number, 1.0], np.float32), dtype)


def test_rounding_is_counted():
    rounding = Rounding()
    exact = np.array([1.0, 1 + 2**-8, 0.0, 1e-30, 2.0], np.float32)  # the second is half way between two bfloat16
    cast("w", exact, "bfloat16", rounding=rounding)
    assert rounding.worst == pytest.approx(2**-8 / (1 + 2**-8), rel=1e-5)
    assert rounding.count == 5 and rounding.vanished == 0
    cast("w", exact, "float16", rounding=rounding)
    assert rounding.worst == 1.0 and rounding.vanished == 1
    cast("w", exact.astype(np.float16), "float32", rounding=rounding)  # widening costs nothing
    assert rounding.count == 10
