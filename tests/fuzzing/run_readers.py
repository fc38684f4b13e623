"""Readers that compute: the folders of training runs, a server over its socket, the numbers of a comparison."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzzing import archives, arrays, model_readers, raw, texts, trees
from fuzzing.mutant import FREE, SAME, Expect, Mutator, Reader, always
from weights_io.errors import InputError

RUN = Path("run")  # all paths of a run are relative: its settings hold them


def train(backend: str, iters: int, resume: bool = True) -> None:
    """Train an adapter, or go on with it, as ``python -m minicpm_BACKEND.lora`` does in this folder."""
    import tiny_training

    from weights_io import command_line

    # A constant rate: a step is the same however many follow, so that one may go on from any state that is whole.
    steady = {"iters": iters, "lr_schedule": "constant", "save_every": 1, "steps_per_report": 1, "resume": resume}
    with command_line.exit_codes():
        tiny_training.finetune(backend, tiny_training.lora(Path(), RUN, model="model", **steady))


def begun(backend: str) -> Callable[[Path], None]:
    """A model, data, and a run of three steps that has its last two states."""

    def make(folder: Path) -> None:
        import tiny_training

        tiny_training.write_world(folder)
        with contextlib.chdir(folder):
            train(backend, 3, resume=False)

    return make


def resumed(backend: str) -> Callable[[Path], dict[str, Any]]:
    def read(folder: Path) -> dict[str, Any]:
        from weights_io.adapters import read_adapter
        from weights_io.config import ModelConfig

        train(backend, 4)
        config = ModelConfig.from_file(folder / "model" / "config.json")
        found = read_adapter(RUN, config).tensors
        lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
        arrays = {f"{name} {part}": getattr(m, part) for name, m in found.items() for part in ("a", "b")}
        return {**arrays, "last": [lines[-1]["step"], round(lines[-1]["loss"], 4)]}

    return read


def any_file(random: Random, folder: Path) -> tuple[str, Expect]:
    """Bytes of a file of a checkpoint, or another thing in its place."""
    files = sorted(path for path in (folder / RUN / "checkpoints").rglob("*") if path.is_file())
    name = str(random.choice(files).relative_to(folder))
    # What a state does not need (orbax's notes) may be anything, so long as the numbers are the same.
    return random.choice([raw.bytes_of([name], always(SAME)), raw.special([name])])(random, folder)


def folders(random: Random, folder: Path) -> tuple[str, Expect]:
    """The folders of the states: renamed, emptied, or leftovers beside them."""
    states = folder / RUN / "checkpoints"
    last = max((path for path in states.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    kind = random.choice(["empty", "a step of no number", "leftovers", "a later step", "a file for a folder"])
    if kind == "empty":
        for path in sorted(last.rglob("*"), reverse=True):
            if path.is_file():
                path.unlink()
    elif kind == "a step of no number":
        last.rename(states / "x3")
        return f"{last.name}: renamed x3", SAME
    elif kind == "leftovers":
        (states / "9.partial").mkdir()
        (states / "9.partial" / "state.safetensors").write_bytes(b"zq")
        (folder / RUN / "metrics.partial").write_text("zq")
    elif kind == "a later step":
        last.rename(states / str(random.choice([4, 99, 10**12, 10**30])))
    else:
        (states / str(int(last.name) + 1)).write_text("zq")
    return f"checkpoints: {kind}", SAME


METRICS, SETTINGS = "run/metrics.jsonl", "run/settings.json"
RUNS: list[tuple[int, Mutator]] = [
    (6, any_file),
    (2, folders),
    (2, trees.lines_of(METRICS, always(FREE))),
    (1, raw.bytes_of([METRICS], always(FREE))),
    (3, trees.json_of(SETTINGS, trees.json_judge())),
    (1, raw.bytes_of([SETTINGS], trees.json_judge())),
    (1, raw.special([METRICS, SETTINGS])),
]


class NoAnswer(InputError):
    """The request was not whole, and the server waits for the rest."""


@cache
def port() -> int:
    """That of a server with the built-in model, which the process has from now on."""
    from minicpm_serve import openai_api

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        server = openai_api.Options(backend="mlx", port=0)
        threading.Thread(target=openai_api.main, args=(server,), daemon=True).start()
        end = time.monotonic() + 60
        while "127.0.0.1:" not in said.getvalue():
            assert time.monotonic() < end, "the server did not begin"
            time.sleep(0.02)
    return int(said.getvalue().partition("127.0.0.1:")[2].partition("/")[0])


def exchange(data: bytes, patience: float) -> bytes:
    """What the server sends until it closes the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", port()), timeout=patience) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer and close before it has read all
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(65536):
                found += received
    return found


def served(folder: Path) -> Any:
    """The answer to a request; a refusal is an `InputError`, and whatever came, the server must go on."""
    request = (folder / texts.REQUEST).read_bytes()
    try:
        answer = exchange(request, patience=3)
    except TimeoutError:
        answer = b""
    try:
        health = exchange(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", patience=120)
    except TimeoutError:
        raise RuntimeError("the server does not answer any more") from None
    if b" 200 " not in health[:20]:
        raise RuntimeError(f"the server is not well: {health[:200]!r}")
    if not answer:
        raise NoAnswer("no answer.")
    status, content = parsed(answer)
    if status >= 500 and status != 503:
        raise RuntimeError(f"status {status}: {content[:300]!r}")
    if status >= 400:
        raise InputError(_message(content))
    return {"status": status, "text": [_text(choice) for choice in _choices(content)]}


def parsed(answer: bytes) -> tuple[int, bytes]:
    """Status and content of the first answer in what was received."""

    class Received:
        def makefile(self, *_: Any) -> io.BytesIO:
            return io.BytesIO(answer)

    response = http.client.HTTPResponse(Received())  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return content.decode(errors="replace") or "no body."


def _choices(content: bytes) -> list[Any]:
    try:
        return json.loads(content).get("choices", [])
    except (ValueError, AttributeError):
        return []


def _text(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


BODY = {"max_tokens": 8, "temperature": 0, "top_p": 0.9, "seed": 1, "n": 1, "stop": ["zq"], "stream": False}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "12 + 7 = ?"}], **BODY},
    "/v1/completions": {"prompt": "Once upon a time", **BODY},
}


def asked(path: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / texts.REQUEST).write_bytes(texts.request(path, BODIES[path]))

    return make


REQUESTS: list[tuple[int, Mutator]] = [(9, texts.request_of()), (1, texts.flipped_requests())]


def compared(folder: Path) -> list[str]:
    """The cases that ``python -m minicpm_mlx.parity`` prints, and whether they hold."""
    from minicpm_mlx import parity
    from weights_io import command_line

    said = io.StringIO()
    options = parity.parity.Options(str(model_readers.REFERENCE / "dense_2b"), folder / "reference.npz")
    with contextlib.redirect_stdout(said):
        try:
            with command_line.exit_codes():
                parity.main(options)
        except SystemExit as end:
            if end.code != 1:  # 1: some of the cases do not hold
                raise
    return [" ".join(line.split()[::3]) for line in said.getvalue().splitlines()[1:-1]]


def numbers(folder: Path) -> None:
    with np.load(model_readers.REFERENCE / "dense_2b" / "reference.npz") as known:
        kept = {key: known[key] for key in ("input_ids", "logits", "labels", "loss", "prompt_ids", "greedy_ids")}
    np.savez(folder / "reference.npz", **kept)


NPZ: list[tuple[int, Mutator]] = [
    (6, arrays.npz_of("reference.npz")),
    (3, archives.zip_of("reference.npz", renaming=FREE)),
    (2, raw.bytes_of(["reference.npz"], always(SAME))),
    (1, raw.special(["reference.npz"])),
]
READERS = [
    Reader("http-chat", 8, asked("/v1/chat/completions"), served, REQUESTS, loopback=True),
    Reader("http-text", 4, asked("/v1/completions"), served, REQUESTS, loopback=True),
    Reader("npz", 6, numbers, compared, NPZ),
    Reader("run-mlx", 3, begun("minicpm_mlx"), resumed("minicpm_mlx"), RUNS, seconds=60),
    Reader("run-jax", 2, begun("minicpm_jax"), resumed("minicpm_jax"), RUNS, seconds=120, needs=("jax",)),
]
