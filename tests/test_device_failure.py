"""A device that fails: open requests get an error, and the command ends with a sentence and exit code 1."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
from test_openai_api import ask

# The engine's step raises as a lost device does, once a request has two tokens.
LOST = """
import runpy, sys
from minicpm_data.generation.engine import BatchEngine
step = BatchEngine.step
def lost(self):
    if any(len(state.generated) > 1 for state in self.running.values()):
        raise RuntimeError("DATA_LOSS: the chip\\nis gone")
    return step(self)
BatchEngine.step = lost
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def started(module, *arguments):
    command = [sys.executable, "-c", LOST, module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **pipes)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_server_answers_and_ends(backend):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    with started("minicpm_serve.openai_api", "--backend", backend, "--port", 0) as process:
        assert process.stdout is not None and process.stderr is not None
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.append(process.stderr.read()))
        reading.start()
        port = int(re.search(r":(\d+)/v1", process.stdout.readline())[1])
        status, answer = ask(port, "/v1/completions", {"prompt": "Once", "max_tokens": 200})
        assert process.wait(60) == 1
        reading.join()
    assert status == 500 and answer["error"]["type"] == "server_error"
    (line,) = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert line == ("error: the device failed (RuntimeError: DATA_LOSS: the chip is gone); start the command again.")


def test_a_batch_keeps_what_is_answered_and_ends(tmp_path):
    pytest.importorskip("mlx.core")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hello", "max_tokens": 100}) + "\n")
    given = ("--backend", "mlx", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl")
    with started("minicpm_serve.batch", *given) as process:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
    assert "Traceback" not in said and "error: the device failed (RuntimeError: DATA_LOSS: the chip is gone)" in said
