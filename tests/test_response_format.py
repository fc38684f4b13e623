"""Answers that are held to a format: JSON of a schema, regular expressions, choices, over HTTP in both backends."""

import json
import re

import openai
import pydantic
import pytest
from test_openai_api import ask, listening

from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.response_format import format_of
from weights_io.errors import InputError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=120)


@pytest.fixture(scope="module", params=["jax", "mlx"])
def api(request):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[request.param])
    model, tokenizer = backends.get(request.param).load("pico", decoding=True)
    engine = ServingEngine(request.param, model, tokenizer, 4, 192)
    with listening(engine) as found:
        yield found
    engine.close()


def answer(api, **fields):
    body = {"messages": QUESTION, "max_tokens": 100, "temperature": 0.9, **fields}
    status, found = ask(api.port, "/v1/chat/completions", body)
    assert status == 200, found
    return found["choices"][0]["message"]["content"], found["choices"][0]["finish_reason"]


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_json_of_its_schema(api, seed):
    """Whatever is sampled, also the markers of turns, which end other answers."""
    text, reason = answer(
        api, seed=seed, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    )
    found = json.loads(text)
    assert reason == "stop" and [*found] == ["name", "age", "tags"] and len(found["name"]) <= 8
    assert 0 <= found["age"] <= 120 and {*found["tags"]} <= {"a", "b"} and json.dumps(found, ensure_ascii=False) == text


def test_held_and_free_answers_share_a_batch(api):
    text, _ = answer(api, seed=1, guided_choice=["never", "always"])
    assert text in ("never", "always")
    text, _ = answer(api, seed=2, structured_outputs={"regex": r"\d{3}/[a-c]+\."})
    assert re.fullmatch(r"\d{3}/[a-c]+\.", text)
    assert answer(api, temperature=0, response_format={"type": "text"}) == ("12 + 7 = 19", "stop")
    text, reason = answer(api, seed=3, max_tokens=12, response_format={"type": "json_object"})
    assert text.startswith("{") and reason in ("length", "stop")
    status, found = ask(api.port, "/v1/completions", {"prompt": "Hi", "guided_choice": ["red", "blue"]})
    assert status == 200 and found["choices"][0]["text"] in ("red", "blue")


def test_the_openai_client_parses_an_answer(api):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="none")
    done = client.chat.completions.parse(
        model=client.models.list().data[0].id, messages=QUESTION, response_format=Person, max_tokens=100, seed=5
    )
    assert isinstance(done.choices[0].message.parsed, Person)
    made = client.responses.parse(
        model=client.models.list().data[0].id, input="Who?", text_format=Person, max_output_tokens=100
    )
    assert isinstance(made.output_parsed, Person)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": {"type": "xml"}}, 'response_format has the type "xml"; it must be "text"'),
        ({"response_format": {"type": "json_schema"}}, 'response_format needs "json_schema"'),
        ({"response_format": {"type": "json_object", "size": 3}}, "response_format has the key 'size'"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "response_format and guided_regex both say",
        ),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs must hold one of json, regex, choice"),
        ({"guided_regex": "("}, "guided_regex cannot be held by a grammar"),
        ({"guided_json": "{"}, "guided_json holds a schema that is no JSON"),
        ({"guided_choice": []}, "guided_choice must be a list of 1 to 1000 texts"),
        ({"guided_regex": "a" * 100_001}, "guided_regex has 100,001 characters"),
        (
            {"response_format": {"type": "json_object"}, "tools": [{"type": "function", "function": {"name": "f"}}]},
            "does not go with tools|chat template",
        ),
    ],
)
def test_formats_that_cannot_be_held_are_refused(api, fields, said):
    status, found = ask(api.port, "/v1/chat/completions", {"messages": QUESTION, **fields})
    assert status == 400 and re.search(said, found["error"]["message"]), found


def test_a_format_begins_after_the_thought():
    held = format_of({"type": "json_object"}, None, {})
    assert held is not None
    assert held.grammar(False).startswith("start: held\n") and r"<\/think>" in held.grammar(True)
    with pytest.raises(InputError) as caught:
        format_of(None, None, {"regex": ""})
    assert caught.value.option == "guided_regex"
