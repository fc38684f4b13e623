"""The command that checks a conversion, in both backends."""

import importlib
import json
import pickle
import re
import shutil
import struct
import zipfile

import numpy as np
import pytest
from documented_commands import typed

from minicpm_data.diagnostics import parity
from weights_io import command_line
from weights_io.checkpoint import open_checkpoint

PASSES = ["logits", "loss", "left_logits", "left_loss", "right_logits", "right_loss", "hidden_states", "final_norm"]
GREEDY = ["greedy_ids", "greedy_logits", "batch_greedy_ids"]
LONG = ["logits_T16", "logits_T32", "logits_T33", "logits_T80"]
CHUNKED = ["greedy_ids_P20", "greedy_logits_P20", "greedy_ids_P40", "greedy_logits_P40"]


@pytest.fixture(params=["jax", "mlx"])
def backend(request):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[request.param])
    return importlib.import_module(f"minicpm_{request.param}.parity")


@pytest.fixture
def check(backend, monkeypatch, capsys):
    """Run the command in this process: exit code, {case: (worst, verdict)}, last line, error."""

    def run(model, reference, *flags):
        monkeypatch.setattr("sys.argv", ["parity", "--model", str(model), "--reference", str(reference), *flags])
        code = 0
        try:
            command_line.run(backend.main, parity.Options, "parity")
        except SystemExit as stop:
            code = stop.code
        out, error = capsys.readouterr()
        lines = out.splitlines()
        cases = {words[0]: (float(words[1]), words[3]) for words in map(str.split, lines[1:-1])}
        return code, cases, lines[-1] if lines else "", error

    return run


@pytest.fixture
def arrays(reference):
    return dict(np.load(reference("dense_2b") / "reference.npz"))


@pytest.fixture
def saved(tmp_path):
    def save(arrays):
        np.savez(tmp_path / "some.npz", **arrays)
        return tmp_path / "some.npz"

    return save


@pytest.mark.parametrize(
    "name, cases",
    [
        *((name, PASSES + GREEDY) for name in ("dense_2b", "dense_untied", "moe_8x2b", "s_1b")),
        ("long_128k", PASSES + GREEDY + LONG + CHUNKED),
    ],
)
def test_a_reference_holds(check, reference, name, cases):
    code, found, summary, _ = check(reference(name), reference(name) / "reference.npz")
    assert code == 0
    assert sorted(found) == sorted(cases)
    assert {verdict for _, verdict in found.values()} == {"ok"}
    worst = {case: difference for case, (difference, _) in found.items()}
    assert 0 < worst["logits"] < 1e-5 and worst["loss"] < 1e-5 and worst["greedy_ids"] == 0
    assert summary == f"{reference(name)} in float32: all {len(cases)} cases hold"


def test_results_are_those_of_the_dtype(check, reference):
    """dense_bf16 has both runs; its padded losses are of the bfloat16 run alone."""
    folder = reference("dense_bf16")
    code, found, *_ = check(folder, folder / "reference.npz")
    assert code == 0 and not {"left_loss", "right_loss"} & found.keys() and found["logits"][0] < 1e-5
    code, found, *_ = check(folder, folder / "reference.npz", "--dtype", "bfloat16")
    assert code == 0 and {"left_loss", "right_loss"} < found.keys() and 1e-3 < found["logits"][0] < 0.075
    folder = reference("bin_sharded")
    code, found, *_ = check(folder, folder / "reference.npz", "--dtype", "bfloat16")
    assert code == 0 and found.keys() == {"logits"}


def test_float16_holds_and_float32s_tolerance_is_too_tight_for_it(check, reference):
    path = reference("dense_2b") / "reference.npz"
    code, found, *_ = check(reference("dense_2b"), path, "--dtype", "float16")
    assert code == 0 and found["logits"][0] > 1e-3
    code, found, summary, _ = check(reference("dense_2b"), path, "--dtype", "float16", "--tolerance", "1e-4")
    assert code == 1 and found["logits"][1] == "FAIL" and "FAIL: logits" in summary


def test_one_changed_weight_fails(check, reference, tmp_path):
    folder = shutil.copytree(reference("dense_2b"), tmp_path / "model", copy_function=shutil.copyfile)
    tensor = open_checkpoint(folder).tensors["model.layers.1.mlp.down_proj.weight"]
    with open(tensor.source, "r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float32(tensor.read()[0, 0] + 0.1).tobytes())
    code, found, summary, error = check(folder, reference("dense_2b") / "reference.npz")
    assert code == 1 and not error
    failed = [case for case, (_, verdict) in found.items() if verdict == "FAIL"]
    assert {"logits", "left_logits", "right_logits", "hidden_states", "final_norm", "greedy_logits"} <= set(failed)
    assert summary == f"{folder} in float32: {len(failed)} of {len(found)} cases FAIL: {', '.join(failed)}"


def test_a_changed_scale_changes_tokens(check, reference, tmp_path):
    folder = shutil.copytree(reference("dense_2b"), tmp_path / "model", copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scale_depth": 1.0}))
    code, found, *_ = check(folder, reference("dense_2b") / "reference.npz")
    assert code == 1 and {verdict for _, verdict in found.values()} == {"FAIL"}


@pytest.mark.parametrize("key", [*PASSES, "greedy_logits"])
def test_each_result_is_compared(check, reference, arrays, saved, key):
    """One number of one result is off by a little."""
    changed = np.array(arrays[key])
    changed[(0 if key.startswith("right") else -1,) * changed.ndim] += 0.01  # right: the last one is of padding
    code, found, *_ = check(reference("dense_2b"), saved(arrays | {key: changed}))
    assert code == 1
    assert [case for case, (_, verdict) in found.items() if verdict == "FAIL"] == [key]
    assert found[key][0] == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("key, place", [("greedy_ids", 20), ("batch_greedy_ids", (1, 20))])
def test_a_token_that_differs_fails(check, reference, arrays, saved, key, place):
    changed = np.array(arrays[key])
    changed[place] = (changed[place] + 1) % 320
    code, found, *_ = check(reference("dense_2b"), saved(arrays | {key: changed}))
    assert code == 1 and found[key][0] > 0.01
    failed = {case for case, (_, verdict) in found.items() if verdict == "FAIL"}
    assert failed == ({"greedy_ids", "greedy_logits"} if key == "greedy_ids" else {key})


def test_padding_is_not_compared(check, reference, arrays, saved):
    padded = np.where(arrays["left_attention_mask"][..., None] == 0, 1e3, arrays["left_logits"])
    code, *_ = check(reference("dense_2b"), saved(arrays | {"left_logits": padded.astype(np.float32)}))
    assert (padded != arrays["left_logits"]).any() and code == 0


def test_without_greedy_logits_the_tokens_are_compared(check, reference, arrays, saved):
    few = {key: arrays[key] for key in ("prompt_ids", "greedy_ids")}
    assert list(check(reference("dense_2b"), saved(few))[1]) == ["greedy_ids"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": np.full((2, 12), 320)}, "input_ids in .* holds the id 320, and the model's are 0 to 319"),
        ({"input_ids": np.full((2, 12), -1)}, "holds the id -1"),
        ({"greedy_ids": np.full(32, 999)}, "greedy_ids in .* holds the id 999"),
        ({"labels": np.full((2, 12), 400)}, "labels in .* holds the id 400"),
        ({"labels": np.full((2, 12), -100)}, "labels in .* is to label tokens"),
        ({"input_ids": np.zeros((2, 12))}, "input_ids in .* holds float64, and whole numbers"),
        ({"input_ids": np.zeros(12, int)}, r"input_ids in .* has the shape \[12\]"),
        ({"input_ids": np.zeros((0, 12), int)}, r"input_ids in .* has the shape \[0, 12\]"),
        (
            {"logits": np.zeros((2, 12, 448), np.float32)},
            r"logits in .* has the shape \[2, 12, 448\], and the model gives \[2, 12, 320\]",
        ),
        ({"hidden_states": np.zeros((5, 12, 96), np.float32)}, r"hidden_states in .* the model gives \[4, 12, 96\]"),
        ({"final_norm": np.zeros((12, 64), np.float32)}, r"final_norm in .* the model gives \[12, 96\]"),
        ({"loss": np.zeros(2, np.float32)}, r"loss in .* has the shape \[2\]"),
        ({"logits": np.full((2, 12, 320), np.nan, np.float32)}, "logits in .* does not hold finite"),
        ({"logits": np.zeros((2, 12, 320), int)}, "logits in .* does not hold finite floating"),
        ({"left_attention_mask": None}, "left_attention_mask in .* is missing"),
        ({"left_attention_mask": np.zeros((2, 12), int)}, "left_attention_mask in .* is not 1 for tokens"),
        ({"right_attention_mask": np.full((2, 12), 2)}, "right_attention_mask in .* is not 1 for tokens"),
        ({"prompt_ids": np.zeros((1, 8), int)}, "greedy_ids in .* does not continue prompt_ids"),
        ({"prompt_ids": np.zeros((2, 8), int)}, "greedy_ids in .* does not continue prompt_ids"),
        ({"greedy_logits": np.zeros((23, 320), np.float32)}, r"greedy_logits in .* the model gives \[24, 320\]"),
    ],
)
def test_what_does_not_fit_is_refused(check, reference, arrays, saved, change, message):
    kept = {key: array for key, array in (arrays | change).items() if array is not None}
    code, found, _, error = check(reference("dense_2b"), saved(kept))
    assert code == 2 and not found
    refused(error, message)


def test_files_that_are_no_reference_are_refused(check, reference, saved, tmp_path):
    model, path = reference("dense_2b"), tmp_path / "file.npz"

    def bad(message, file=path, *flags):
        code, found, _, error = check(model, file, *flags)
        assert code == 2 and not found
        refused(error, message)

    bad("file.npz does not exist")
    bad("it is a folder, not a file", tmp_path)
    bad("some.npz has no numbers to compare in float32; it needs input_ids with logits", saved({"other": np.ones(3)}))
    bad("has no numbers to compare", saved({"input_ids": np.ones((1, 3), int)}))
    for data in (b"", b"PK\x03\x04 damaged", b"plain text", pickle.dumps({"logits": 1})):
        path.write_bytes(data)
        bad("file.npz (cannot be read as|is no) .npz")
    whole = saved({"input_ids": np.ones((1, 3), int), "logits": np.ones((1, 3, 320), np.float32)}).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    bad("file.npz (cannot be read as|is no) .npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids", "text")
    bad("input_ids in .* is no array")
    for header, message in (
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 12,", "cannot be read as .npz"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", "does not fit its 118 bytes"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "does not fit its 118 bytes|cannot be read"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("logits.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 108) + header.ljust(107) + b"\n")
        bad(message)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("logits.npy", "w") as entry:
        for _ in range(80):
            entry.write(bytes(2**20))
    bad("unpacks to 83886080 bytes, which no numbers do")
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("logits.npy", b"")
    bad("has two entries logits.npy")
    np.save(tmp_path / "one.npy", np.ones(3))
    bad("holds a single array", tmp_path / "one.npy")
    bad("--tolerance is -1.0; it must be", saved({"other": np.ones(3)}), "--tolerance", "-1")
    bad("--tolerance is nan", saved({"other": np.ones(3)}), "--tolerance", "nan")


class Trap:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('unpickled').touch()",)


def test_objects_are_not_unpickled(check, reference, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved({"input_ids": np.array([Trap()], dtype=object)})
    code, _, _, error = check(reference("dense_2b"), path)
    assert code == 2 and not (tmp_path / "unpickled").exists()
    refused(error, "is no .npz file of plain arrays")
    np.load(path, allow_pickle=True)["input_ids"]
    assert (tmp_path / "unpickled").exists()  # the trap works


def refused(error, message):
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.slow
def test_as_a_command(backend, reference, tmp_path):
    command = backend.__name__
    arguments = ["--model", str(reference("dense_2b")), "--reference", str(reference("dense_2b") / "reference.npz")]
    done = typed(command, *arguments)
    assert done.returncode == 0 and done.stdout.endswith("all 11 cases hold\n")
    done = typed(command, *arguments, "--tolerance", "1e-9")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "cases FAIL" in done.stdout
    arguments[1] = str(tmp_path)
    done = typed(command, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
