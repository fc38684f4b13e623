"""Reading and writing weights move a bar over all their bytes, on a terminal only."""

import contextlib
import importlib
import sys
import time

import pytest
import tqdm

from minicpm_data.training import processes
from weights_io import progress
from weights_io.checkpoint import open_checkpoint
from weights_io.progress import awaited, doing, progress_bar, waiting
from weights_io.quantization.packed import stored_bytes
from weights_io.write import save_checkpoint


@pytest.fixture
def bars(monkeypatch):
    """The bars that were made: what they were made with, and how far they came."""
    made = []

    class Recorded(tqdm.tqdm):
        def __init__(self, **options):
            self.options, self.moved = options, []
            made.append(self)
            super().__init__(**options)

        def update(self, n=1):
            self.moved.append(n)
            super().update(n)

    monkeypatch.setattr(tqdm, "tqdm", Recorded)
    return made


def check(bars, checkpoint):
    (bar,) = bars
    total = sum(stored_bytes(tensor, tensor.read().size) for tensor in checkpoint.tensors.values())
    assert bar.options["total"] == sum(bar.moved) == total
    assert len(bar.moved) == len(checkpoint.tensors)


@pytest.mark.parametrize("backend, needs", [("minicpm_jax", "jax"), ("minicpm_mlx", "mlx.core")])
@pytest.mark.parametrize("name", ["dense_bf16", "bin", "gguf/model-q4_0.gguf"])
def test_loading(reference, bars, backend, needs, name):
    pytest.importorskip(needs)
    checkpoint = open_checkpoint(reference(name))
    importlib.import_module(f"{backend}.loading").load_weights(checkpoint, "float32")
    check(bars, checkpoint)


def test_writing(reference, tmp_path, bars):
    checkpoint = open_checkpoint(reference("dense_bf16"))
    save_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.tensors)
    check(bars, checkpoint)


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_sees_it(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar("loading", 2_000_000) as bar:
        bar._time = lambda: time.time() + 2  # seconds later
        bar.update(1_000_000)
    said = capsys.readouterr().err
    assert processes.SingleProcess().quiet is None  # so do the bars of training
    assert ("loading:  50%" in said and "1.00M/2.00M" in said) == terminal
    assert terminal or not said


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_long_says_so(monkeypatch, capsys, terminal):
    """A terminal is told the seconds, until a bar takes the line's place; a file gets one plain line for each."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with waiting("compiling"):
        time.sleep(0.1)
        with progress_bar("asking", 3, unit="question") as bar:
            time.sleep(0.1)
            with doing(bar, "evaluating") if terminal else contextlib.nullcontext():
                bar.update(3)
    captured = capsys.readouterr()
    assert captured.out == "" and list(awaited("reading", iter("ab"))) == ["a", "b"] and not list(awaited("x", ()))
    if terminal:
        assert "\rcompiling .. 0 s" in captured.err and "evaluating ..: 100%" in captured.err
    else:
        assert captured.err == "compiling ..\nasking: 3 questions ..\n"
