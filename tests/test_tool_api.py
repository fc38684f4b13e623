"""Thinking and tools over the API: what is asked of the template, what is parsed, and calls that a grammar holds."""

import json
import shutil
from pathlib import Path

import jsonschema
import openai
import pytest
import tiny_model
import tiny_tokenizer
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from test_openai_api import ask, events, listening

from minicpm_data.conversation.answers import AnswerParser, Content, Reasoning, ToolCall
from minicpm_data.conversation.call_grammar import call_grammar
from minicpm_data.generation.constraint import Constraint, unpacked
from minicpm_data.generation.responses import stream_text
from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from weights_io.errors import InputError

TEMPLATES = Path(__file__).parent / "reference" / "chat"
TYPES = {"a": {"type": "integer"}, "unit": {"enum": ["m", "<&>", None]}}
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": TYPES, "required": ["a"]}}
NOW = {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": function} for function in (ADD, NOW)]
NAMED = {"type": "function", "function": {"name": "add"}}
ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
CHAT = "/v1/chat/completions"
FORMS = {"jax": ("minicpm5_1b", "xml"), "mlx": ("minicpm3_tools", "python")}


@pytest.fixture(scope="module", params=["jax", "mlx"])
def api(request, tmp_path_factory):
    """A tiny model of random weights, in one backend with MiniCPM5's template, in the other with MiniCPM3's."""
    folder = tiny_model.write(tmp_path_factory.mktemp("tools"), max_position_embeddings=2048)
    name, form = FORMS[request.param]
    shutil.copy(TEMPLATES / name / "chat_template.jinja", folder)
    model, tokenizer = backends.get(request.param).load(folder, "float32")
    engine = ServingEngine(request.param, model, tokenizer, 3, 1800)
    with listening(engine) as found:
        found.form = form
        yield found
    engine.close()


def asked(api, **body):
    body = {"messages": ASKED, "tools": TOOLS, "max_tokens": 200, "temperature": 1.0, "seed": 3, **body}
    status, answer = ask(api.port, CHAT, body)
    assert status == 200, answer
    return answer["choices"][0]


def test_a_call_that_is_required_is_held_by_its_schema(api):
    choice = asked(api, tool_choice=NAMED)
    message = choice["message"]
    (call,) = message["tool_calls"]
    assert message.keys() == {"role", "content", "tool_calls"} and message["content"] is None
    assert call["id"].startswith("call_") and len(call["id"]) == 29
    assert (call["type"], call["function"]["name"], choice["finish_reason"]) == ("function", "add", "stop")
    jsonschema.validate(json.loads(call["function"]["arguments"]), ADD["parameters"])
    choice = asked(api, tool_choice="required", parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"


def test_a_thinking_budget_lets_the_answer_begin(api):
    """Without one, the random model would think to the end."""
    body = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 4, "tool_choice": NAMED}
    if api.form != "xml":
        status, answer = ask(api.port, CHAT, {"messages": ASKED, "thinking_budget": 4})
        assert (status, answer["error"]["param"]) == (400, "thinking_budget")
        return
    message = asked(api, **body)["message"]
    assert message["reasoning_content"] and message["tool_calls"][0]["function"]["name"] == "add"
    assert "reasoning_content" not in asked(api, **{**body, "thinking_budget": 0})["message"]


def test_a_stream_says_the_same(api):
    body = {"messages": ASKED, "tools": TOOLS, "max_tokens": 200, "temperature": 1.0, "seed": 3, "tool_choice": NAMED}
    *chunks, done = events(api.port, CHAT, body)
    choices = [chunk["choices"][0] for chunk in chunks]
    first, begun, arguments, last = (choice["delta"] for choice in choices)
    (call,) = asked(api, tool_choice=NAMED)["message"]["tool_calls"]
    assert (first["role"], last, done) == ("assistant", {}, "[DONE]")
    (begun,), (arguments,) = begun["tool_calls"], arguments["tool_calls"]
    assert (begun["index"], begun["function"]) == (0, {"name": "add", "arguments": ""})
    assert arguments == {"index": 0, "function": {"arguments": call["function"]["arguments"]}}
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_tools_of_responses(api):
    """The call is an item of the output, which the next input repeats with its result."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="-")
    tools = [{"type": "function", "strict": True, **function} for function in (ADD, NOW)]
    choice = {"type": "function", "name": "add"}
    options = {"model": "tiny", "tools": tools, "max_output_tokens": 200, "temperature": 1.0, "extra_body": {"seed": 3}}
    made = client.responses.create(input="What is 2 + 2?", tool_choice=choice, **options)
    (call,) = made.output
    assert (call.type, call.name, made.status) == ("function_call", "add", "completed")
    jsonschema.validate(json.loads(call.arguments), ADD["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    items = [*ASKED, *(item.model_dump(exclude_none=True) for item in made.output), result]
    if api.form == "xml":  # one that thinks
        items.insert(1, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Two."}]})
    called = [{"id": call.call_id, "type": "function", "function": {"name": "add", "arguments": call.arguments}}]
    answer = {"role": "assistant", "content": None, "tool_calls": called}
    answer |= {"reasoning_content": "Two."} if api.form == "xml" else {}
    messages = [*ASKED, answer, {"role": "tool", "tool_call_id": call.call_id, "content": "4"}]
    chat = {"messages": messages, "tools": TOOLS, "max_tokens": 12, "temperature": 0}
    status, expected = ask(api.port, CHAT, chat)
    assert status == 200, expected
    options |= {"max_output_tokens": 12, "temperature": 0}
    found = client.responses.create(input=items, **options)
    thoughts = [item.content[0].text for item in found.output if item.type == "reasoning"]
    message = expected["choices"][0]["message"]
    assert found.output_text == (message["content"] or "")
    assert "".join(thoughts) == message.get("reasoning_content", "")
    assert found.usage.input_tokens == expected["usage"]["prompt_tokens"]
    streamed = client.responses.create(input="What is 2 + 2?", tool_choice=choice, stream=True, **options)
    kinds = [event.type for event in streamed]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in (
        "response.incomplete",
        "response.completed",
    )


def test_held_and_free_answers_share_a_batch(api):
    """A free answer is the same alone and beside one that a grammar holds."""
    free = {"messages": ASKED, "max_tokens": 40, "temperature": 0}
    alone = ask(api.port, CHAT, free)[1]["choices"][0]["message"]
    beside = events(api.port, CHAT, {**free, "max_tokens": 600})
    next(beside)
    asked(api, tool_choice="required")
    assert ask(api.port, CHAT, free)[1]["choices"][0]["message"] == alone
    deltas = [event["choices"][0]["delta"] for event in beside if event != "[DONE]"]
    text = "".join(delta.get("content", "") + delta.get("reasoning_content", "") for delta in deltas)
    assert text.startswith(alone["content"] or alone["reasoning_content"])


def test_the_loop_of_the_openai_client(api):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="-")
    messages = list(ASKED)
    options = {"model": "tiny", "tools": TOOLS, "max_tokens": 200, "seed": 1, "parallel_tool_calls": False}
    made = client.chat.completions.create(messages=messages, tool_choice="required", temperature=1.0, **options)
    message = made.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    (call,) = message.tool_calls
    messages.append(
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(json.loads(call.function.arguments))}
    )
    chunks = client.chat.completions.create(messages=messages, stream=True, **options | {"max_tokens": 8})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) and not any(delta.tool_calls for delta in deltas)


def test_the_loop_of_langchain(api):
    llm = ChatOpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="-", model="tiny", max_tokens=200, seed=1)
    messages = [HumanMessage("What is 2 + 2?")]
    held = llm.bind_tools(TOOLS, tool_choice="add", parallel_tool_calls=False)
    chunks = [*held.stream(messages)]
    message = sum(chunks[1:], chunks[0])
    (call,) = message.tool_calls
    assert call["name"] == "add" and isinstance(call["args"]["a"], int) and not message.invalid_tool_calls
    messages += [message, ToolMessage("4", tool_call_id=call["id"])]
    assert held.invoke(messages).tool_calls[0]["name"] == "add"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice names 'sub', which is none"),
        ({"tool_choice": "must"}, 'tool_choice is "must"; it must be "none", "auto", "required" or'),
        ({"tool_choice": {"type": "custom"}}, "tool_choice is"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice asks for a call, and there are no tools"),
        ({"tools": [{"type": "function"}]}, "tools holds an item 0 that has no name"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "1", "content": "4"}]}, "has no tool_calls"),
        (
            {
                "messages": [
                    *ASKED,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]},
                ]
            },
            "arguments of call 0 of message 1",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tool_choice cannot be held to the tool 'f'",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "the template variable tools cannot be given"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
    ],
)
def test_what_is_refused(api, body, said):
    status, answer = ask(api.port, CHAT, {"messages": ASKED, "tools": TOOLS, **body})
    assert status == 400 and said in answer["error"]["message"], answer


def test_without_a_choice_no_tool_is_told_of_and_no_answer_parsed(api):
    told, untold = (
        ask(api.port, CHAT, {"messages": ASKED, "tools": TOOLS, "max_tokens": 2, "tool_choice": choice})[1]["usage"]
        for choice in ("auto", "none")
    )
    assert told["prompt_tokens"] > untold["prompt_tokens"] + 50


class Words:
    """A vocabulary in which each token is a text."""

    def __init__(self, texts):
        self.texts = texts

    def detokenizer(self, tags):
        assert tags
        return self

    def add(self, token):
        return self.texts[token]

    def finish(self):
        return ""


def test_stop_strings_end_the_visible_answer_alone():
    texts = [
        "a END",
        "</think>",
        "\n\nb",
        '<function name="now"><param name="x">',
        "END</param></function>",
        "E",
        "ND",
        "c",
    ]
    parser = AnswerParser([{"function": {"name": "now"}}], "xml", in_thought=True)
    made = [*stream_text(range(8), Words(texts), stop="END", max_tokens=8, parser=parser)]
    assert "".join(response.reasoning for response in made) == "a END"
    assert "".join(response.text for response in made) == "b"
    assert [call for response in made for call in response.tool_calls] == [ToolCall("now", '{"x": "END"}')]
    assert (made[-1].finish_reason, len(made)) == ("stop", 7)


def test_special_tokens_of_calls_are_kept_and_others_dropped(tmp_path):
    from minicpm_data.tokenizer.folder import load_tokenizer

    spec = tiny_tokenizer.as_json(space_prefix=False)
    first = 1 + max(spec["model"]["vocab"].values())
    added = ["<function", "</function>", "<param", "</param>", "<tool_response>"]
    for i, text in enumerate(added, first):
        flags = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word"], False)
        spec["added_tokens"].append({"id": i, "content": text, "special": True, **flags})
    template = (TEMPLATES / "minicpm5_1b" / "chat_template.jinja").read_text()
    folder = tiny_tokenizer.write(tmp_path, {"tokenizer.json": spec, "chat_template.jinja": template})
    tokenizer = load_tokenizer(folder)
    text = '<tool_response><function name="now"></function>'
    ids = tokenizer.encode(text, add_bos=False)
    assert {first, first + 1, first + 4} <= {*ids}
    kept = tokenizer.detokenizer(tags=True)
    assert "".join(map(kept.add, ids)) + kept.finish() == text.removeprefix("<tool_response>")
    assert tokenizer.decode(ids) == ' name="now">'
    # The grammar takes them for text too, and prefers them as the tokenizer does.
    vocabulary = first + len(added)
    grammar = call_grammar(TOOLS[1:], "xml", False, False)
    held = Constraint.of(grammar, tokenizer, vocabulary, frozenset(tokenizer.eos_token_ids), "tool_choice").begin()
    assert unpacked(held.allowed(), vocabulary).nonzero()[0].tolist() == [first]


def test_a_template_without_tools_refuses_them(tmp_path):
    from minicpm_data.tokenizer.folder import load_tokenizer

    with pytest.raises(InputError, match="has no place for them"):
        load_tokenizer(tiny_model.write(tmp_path)).apply_chat(ASKED, tools=TOOLS)


BIG = {
    "a": {"type": "string", "pattern": "^[a-c]{2,4}/x$"},
    "b": {"type": "string", "minLength": 2, "maxLength": 5},
    "n": {"type": "integer", "minimum": 3, "maximum": 500},
    "e": {"enum": ["x<y", 1, None, True, "a&b\n", "plain"]},
    "e2": {"type": ["string", "null"], "enum": ["p", "q", None]},
    "u": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/I"}]},
    "arr": {"type": "array", "items": {"type": "string", "pattern": "^a+$"}, "maxItems": 3},
    "free": {"type": "object"},
    "any": {},
    "on": {"type": "boolean"},
}
ITEM = {
    "properties": {"x": {"type": "number"}, "s": {"type": "string"}},
    "required": ["x"],
    "additionalProperties": False,
}
BIG_SCHEMA = {
    "type": "object",
    "properties": BIG,
    "required": ["a", "n", "e", "u"],
    "$defs": {"I": {"type": "object", **ITEM}},
}


@pytest.mark.parametrize("form", ["xml", "python"])
def test_every_text_of_the_grammar_is_a_call_that_its_schema_admits(form):
    """Random texts, in which the characters of tags, strings and numbers are frequent."""
    import random

    import numpy as np
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
        tokens = [*(bytes([i]) for i in range(256)), b"\xff</s>", b"<function", b"</function>"]

        def __call__(self, text):
            return [*text]

    vocabulary = LLTokenizer(TokenizerWrapper(Bytes()))
    tools = [*TOOLS, {"type": "function", "function": {"name": "big", "parameters": BIG_SCHEMA}}]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    rng, whole = random.Random(form), 0
    for number in range(16):
        thinks = number % 3 == 0
        matcher = LLMatcher(vocabulary, call_grammar(tools, form, thinks, number % 2 == 0))
        assert not matcher.is_error(), matcher.get_error()
        made: list[int] = []
        while not matcher.is_stopped() and len(made) < 500:
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
            often = [30 if i >= 256 or i in b'<>")]}&;$.,:\n' else 1 for i in allowed]
            made += rng.choices(allowed.tolist(), often)
            assert matcher.consume_token(made[-1])
        if not matcher.is_stopped():
            continue
        whole += 1
        text = b"".join(Bytes.tokens[i] for i in made if i != 256).decode()
        parser = AnswerParser(tools, form, in_thought=thinks)
        pieces = [*parser.feed(text), *parser.finish()]
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        assert calls and not any(isinstance(piece, Content) for piece in pieces), text
        assert thinks or not any(isinstance(piece, Reasoning) for piece in pieces)
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert whole > 3
