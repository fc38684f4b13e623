"""Thinking: the budget of a thought, in both backends and their engines."""

import importlib
import shutil
from pathlib import Path

import pytest
import tiny_model
from tiny_training import BACKENDS

from minicpm_data.generation.options import Sampling
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.thinking import CLOSING, Thought, ThinkingBudget
from weights_io.errors import InputError

TEMPLATES = Path(__file__).parent / "reference" / "chat"
ASKED = [{"role": "user", "content": "Hello world"}]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose template thinks; ``<think>`` is plain text of its vocabulary, as in MiniCPM4.1."""
    folder = tiny_model.write(tmp_path_factory.mktemp("thinking"))
    shutil.copy(TEMPLATES / "minicpm5_1b" / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module")
def babbler(backend, folder):
    return backend.load(folder, "float32")


def prompt_of(tokenizer, thinking=True, asked=ASKED):
    return tokenizer.apply_chat(asked, variables={"enable_thinking": thinking})


def closing_of(tokenizer):
    return tokenizer.encode(f"x{CLOSING}", add_bos=False)[1:]  # a first text would begin with a space


def tokens(responses):
    return [response.token for response in responses]


@pytest.mark.parametrize("budget", [0, 3, 40])
def test_an_open_thought_is_closed_after_so_many_tokens(backend, babbler, budget):
    sampling = {"repetition_penalty": 1.3}  # what is forced is what was seen, and not what would have been sampled
    model, tokenizer = babbler
    prompt = prompt_of(tokenizer)
    closing = closing_of(tokenizer)
    free = tokens(backend.stream_generate(model, tokenizer, prompt, budget + 1, **sampling))[:budget]
    closed = [*free, *closing]
    after = tokens(backend.stream_generate(model, tokenizer, [*prompt, *closed], 8, **sampling))
    made = tokens(
        backend.stream_generate(model, tokenizer, prompt, len(closed) + 8, thinking_budget=budget, **sampling)
    )
    assert made == [*closed, *after]
    assert made[: budget + 2] == tokens(
        backend.stream_generate(model, tokenizer, prompt, budget + 2, thinking_budget=budget, **sampling)
    )


def test_each_row_has_its_own_thought(backend, babbler):
    """One row thinks from its prompt on, one does not think, and one is longer."""
    model, tokenizer = babbler
    more = [{"role": "system", "content": "Answer in French, and at length."}, *ASKED]
    prompts = [prompt_of(tokenizer), prompt_of(tokenizer, False), prompt_of(tokenizer, asked=more)]
    options = {"max_tokens": 24, "temperature": 0.8, "seed": 5}
    alone = [
        tokens(backend.stream_generate(model, tokenizer, prompt, thinking_budget=4, **options)) for prompt in prompts[:1]
    ]
    rows = backend.batch_generate(model, tokenizer, prompts, thinking_budget=4, **options)
    assert tokens(rows[0]) == alone[0]
    closing = closing_of(tokenizer)
    assert tokens(rows[2])[4 : 4 + len(closing)] == closing
    assert CLOSING not in "".join(r.text for r in rows[1])


def test_requests_of_an_engine_have_their_own_budgets(backend, babbler):
    sampling = {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.2}
    model, tokenizer = babbler
    engine = importlib.import_module(f"{backend.__name__}.generation.engine").Engine(model, slots=3, context=200)
    asked = [(prompt_of(tokenizer), 0), (prompt_of(tokenizer), 5), (prompt_of(tokenizer), None)]
    requests = [
        GenerationRequest.of(model, tokenizer, [prompt], 20, Sampling(**sampling), thinking_budget=budget)
        for prompt, budget in asked
    ]
    found = {engine.add(request): [] for request in requests}
    while not engine.idle:
        for made in engine.step():
            found[made.number].append(made.token)
    alone = [
        tokens(backend.stream_generate(model, tokenizer, prompt, 20, thinking_budget=budget, **sampling))
        for prompt, budget in asked
    ]
    assert [*found.values()] == alone


def thought_of(tokenizer, budget, text, opened=False):
    """After which of the tokens of a text its thought is closed; None: never."""
    thought = Thought(ThinkingBudget.of(tokenizer, budget, [prompt_of(tokenizer, opened)]), opened)
    ids = tokenizer.encode(text, add_bos=False)
    for count, token in enumerate([None, *ids]):
        if token is not None:
            thought.add(token)
        if thought.forced:
            return tokenizer.decode(ids[:count])
    return None


def test_where_a_thought_opens_and_closes(folder):
    tokenizer = importlib.import_module("minicpm_data").load_tokenizer(folder)
    assert thought_of(tokenizer, 0, "abc", opened=True) == ""
    assert thought_of(tokenizer, 3, "dogfoxsea", opened=True) == tokenizer.decode(
        tokenizer.encode("dogfoxsea", add_bos=False)[:3]
    )
    assert thought_of(tokenizer, 0, "\n<think>\nHello") == "\n<think>"  # the model opens it itself
    assert thought_of(tokenizer, 3, "<think>\n\n</think>\n\nHello world") is None  # and closes it
    assert thought_of(tokenizer, 0, "Hello <think> world") is None  # text
    assert thought_of(tokenizer, 1, "<think>\n</think>x") is None  # a tag that has begun may end
    assert thought_of(tokenizer, 1, "<think>\n</thing>x").startswith("<think>\n</thin")
