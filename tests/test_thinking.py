"""Thinking: the budget of a thought, in both backends and their engines, and the sampling defaults of each mode."""

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_model
from tiny_training import BACKENDS

from minicpm_data.generation.guessing import Pace
from minicpm_data.generation.options import Sampling
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.speculation import Speculation
from minicpm_data.generation.thinking import CLOSING, ThinkingBudget, Thought
from minicpm_data.sampling_defaults import CARDS, chat_sampling, family_named
from minicpm_data.tokenizer.chat_template import MINICPM_TEMPLATE
from weights_io import catalog
from weights_io.errors import InputError

TEMPLATES = Path(__file__).parent / "reference" / "chat"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"
THINKING_CHATML = CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
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
    alone = tokens(backend.stream_generate(model, tokenizer, prompts[0], thinking_budget=4, **options))
    rows = backend.batch_generate(model, tokenizer, prompts, thinking_budget=4, **options)
    assert tokens(rows[0]) == alone
    closing = closing_of(tokenizer)
    assert tokens(rows[2])[4 : 4 + len(closing)] == closing
    assert CLOSING not in "".join(r.text for r in rows[1])


@pytest.mark.parametrize("guessing", [False, True])
def test_requests_of_an_engine_have_their_own_budgets(backend, babbler, guessing, monkeypatch):
    monkeypatch.setattr(Pace, "pays", lambda self, running: True)
    sampling = {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.2}
    model, tokenizer = babbler
    engine = importlib.import_module(f"{backend.__name__}.generation.engine").Engine(
        model, slots=3, context=200, speculation=Speculation(model) if guessing else None
    )
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


def test_guesses_change_no_token(backend, babbler):
    model, tokenizer = babbler
    prompt = prompt_of(tokenizer)
    options = {"max_tokens": 30, "thinking_budget": 7, "temperature": 0.8, "seed": 5}
    plain = tokens(backend.stream_generate(model, tokenizer, prompt, **options))
    for source in ({"prompt_lookup": True}, {"draft_model": model}):
        guessed = [*backend.stream_generate(model, tokenizer, prompt, **source, **options)]
        assert tokens(guessed) == plain
        assert not any(response.from_draft for response in guessed[7 : 7 + len(closing_of(tokenizer))])


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
    assert thought_of(tokenizer, 2, "<think>\n</think>x") is None  # a tag that has begun may end
    assert thought_of(tokenizer, 2, "<think>\n</thing>x").startswith("<think>\n</thi")


def template(name):
    return (TEMPLATES / name / "chat_template.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "text", "on", "off"),
    [
        ("minicpm-2b", MINICPM_TEMPLATE, (0.3, 0.8), (0.3, 0.8)),
        ("minicpm-2b-128k", CHATML, (0.3, 0.8), (0.3, 0.8)),
        ("minicpm3-4b", CHATML, (0.8, 0.8), (0.8, 0.8)),
        ("minicpm4-8b", CHATML, (0.8, 0.8), (0.8, 0.8)),
        ("bitcpm4-1b", CHATML, (0.8, 0.8), (0.8, 0.8)),
        ("minicpm4.1-8b", THINKING_CHATML, (0.6, 0.95), (0.7, 0.8)),
        ("minicpm5-1b", "minicpm5_1b", (0.9, 0.95), (0.7, 0.95)),
        ("minicpm5-2b", "minicpm5_2b", (0.9, 0.95), (0.7, 0.95)),
    ],
)
def test_sampling_defaults_are_the_models_own(tmp_path, name, text, on, off):
    entry = catalog.find(name)
    text = template(text) if text.startswith("minicpm5") else text
    config = asdict(entry.model_config())
    for kept in ({}, {"temperature": 0.8, "top_p": 0.8, "do_sample": True}):  # what the files of the family state
        (tmp_path / "generation_config.json").write_text(json.dumps(kept))
        found = chat_sampling(config, text, tmp_path)
        assert CARDS[found.family] is CARDS[family_named(name)]
        for mode, expected in ((None, on), (True, on), (False, off)):
            assert (found.of(mode).temperature, found.of(mode).top_p) == expected, (kept, mode)
    for kept, expected in (
        ({"temperature": 0.55}, (0.55, 1.0)),
        ({"top_p": 0.6}, (1.0, 0.6)),
        ({"do_sample": False, "temperature": 0.5}, (0.0, 1.0)),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(kept))
        usual = chat_sampling(config, text, tmp_path).of()
        assert (usual.temperature, usual.top_p, usual.source) == (*expected, "generation_config.json")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number from 0 on"),
        ({"temperature": "hot"}, "temperature is hot; it must be a number"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0"),
        ({"do_sample": "no"}, "do_sample is no; it must be true or false"),
        ({"temprature": 0.5}, "has temprature, which is no key; write temperature"),
    ],
)
def test_a_generation_config_with_wrong_sampling_is_refused(folder, tmp_path, kept, said):
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "generation_config.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=f"generation_config.json.*({said})"):
        importlib.import_module("minicpm_mlx").load(copied)
