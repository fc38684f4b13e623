"""mypy follows a call across the border between what both backends share and a backend."""

import pytest
from documented_commands import ROOT

RIGHT = """
from minicpm_data.generation.api import Generator
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.speculation import Speculation
from minicpm_BACKEND.backend import Decoding, backend
from minicpm_BACKEND.model import Model

def ask(model: Model, request: GenerationRequest) -> None:
    generator = backend().generator
    generator.decoding.stream_tokens(model, request)
    generator.decoding.stream_speculated(model, request, Speculation(model))
    generator.decoding.engine(model, slots=2).add(request)
    generator.stream(model, None, request, stop="end")

class Shorter(Decoding): ...

GenerationRequest((PromptIds([1], 9),))
Generator(Shorter())
"""
WRONG = {  # in place of what
    "stream_tokens(model, request)": "stream_tokens(model, request.prompts)",
    "stream_speculated(model, request, ": "stream_speculated(model, ",
    "slots=2": "slots='2'",
    "add(request)": "add(request.prompt)",
    "None, request,": "None, 'Hello',",
    "class Shorter(Decoding): ...": "class Shorter:\n    def stream_tokens(self, model: Model) -> None: ...",
    "PromptIds([1], 9)": "[1]",
}


@pytest.mark.slow  # where mypy has kept nothing of an earlier run
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_wrong_call_is_refused(backend, tmp_path):
    mypy = pytest.importorskip("mypy.api")
    right = RIGHT.replace("BACKEND", backend)
    wrong = right
    for given, other in WRONG.items():
        assert given in right
        wrong = wrong.replace(given, other)
    for name, text in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.py").write_text(text)
    files = [str(tmp_path / f"{name}.py") for name in ("right", "wrong")]
    said, error, _ = mypy.run(["--config-file", str(ROOT / "pyproject.toml"), *files])
    found = [line for line in said.splitlines() if ": error: " in line]
    assert not error and len(found) == len(WRONG) and all("wrong.py" in line for line in found), said
