"""`pico-tools`, the built-in model that was taught to call: on questions that are in none of its training data."""

import json
import re
from random import Random

import openai
import pytest
from documented_commands import blocks, typed
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from test_openai_api import listening

from benchmarks import tool_calls
from minicpm_data import load_tokenizer
from minicpm_data.tool_exercise import TEMPLATE, TOOLS, asked, compute
from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from weights_io.built_in import built_in

PAGE_URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module", params=["jax", "mlx"])
def api(request):
    model, tokenizer = backends.get(request.param).load("pico-tools")
    engine = ServingEngine(request.param, model, tokenizer, 4)
    with listening(engine) as found:
        yield found
    engine.close()


def test_it_is_part_of_the_package():
    assert sum(path.stat().st_size for path in built_in("pico-tools").iterdir()) < 6_000_000
    assert load_tokenizer(built_in("pico-tools")).chat_template == TEMPLATE


def test_nine_of_ten_questions_are_answered_by_the_right_call(api, capsys):
    """The loop of the openai client. `python -m benchmarks.tool_calls` asks more: 200 of 200 calls were right."""
    tool_calls.print_shares(api.port, tool_calls.Options(model="pico-tools", questions=12))
    shares = re.findall(r"\(([\d.]+)%\)", capsys.readouterr().out)
    assert len(shares) == 3 and all(float(share) >= 90 for share in shares)


def test_langchain_streams_calls_of_two_tools(api):
    llm = ChatOpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="-", model="tiny", temperature=0)
    bound, right = llm.bind_tools(list(TOOLS)), 0
    for number in range(4):
        example = asked(Random(f"langchain {number}"), False, ("calculator", "timer")[number % 2])["messages"]
        messages = [HumanMessage(example[0]["content"])]
        chunks = [*bound.stream(messages)]
        message = sum(chunks[1:], chunks[0])
        expected = example[1]["tool_calls"][0]["function"]
        if [(call["name"], call["args"]) for call in message.tool_calls] != [(expected["name"], expected["arguments"])]:
            continue
        messages += [message, ToolMessage(example[2]["content"], tool_call_id=message.tool_calls[0]["id"])]
        text = "".join(chunk.content for chunk in bound.stream(messages))
        right += text == example[3]["content"]
    assert right == 4


def test_the_loop_of_the_page(api, capsys):
    (block,) = [block for block in blocks("docs/serve.md", "python") if "TOOLS" in block]
    exec(block.replace(PAGE_URL, f"http://127.0.0.1:{api.port}"), {})
    assert capsys.readouterr().out == "417 * 36 = 15012.\n"


def test_required_and_named_calls_hold_here_too(api):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="-")
    question = [{"role": "user", "content": "What is 12 plus 7?"}]
    for choice in ("required", {"type": "function", "function": {"name": "calculator"}}):
        made = client.chat.completions.create(
            model="tiny", messages=question, tools=list(TOOLS), tool_choice=choice, temperature=0
        )
        (call,) = made.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("calculator", {"expression": "12 + 7"})


def test_the_data(tmp_path):
    ran = typed("minicpm_data.tool_exercise", "--save-path", tmp_path / "tools", "--examples", 300)
    assert ran.returncode == 0, ran.stderr
    lines = {
        name: [json.loads(line) for line in (tmp_path / "tools" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "valid", "test")
    }
    assert {name: len(found) for name, found in lines.items()} == {"train": 300, "valid": 100, "test": 200}
    calls = [m["messages"] for found in lines.values() for m in found if len(m["messages"]) == 4]
    for question, call, result, answer in calls:
        function = call["tool_calls"][0]["function"]
        if function["name"] == "calculator":
            assert result["content"] == str(compute(function["arguments"]["expression"]))
            assert result["content"] in answer["content"]
        else:
            assert str(function["arguments"]["minutes"]) in question["content"] and "timer is set" in answer["content"]
    seen = {m["messages"][0]["content"] for m in lines["train"] if "tool_calls" in m["messages"][1]}
    new = {m["messages"][0]["content"] for m in lines["test"] if "tool_calls" in m["messages"][1]}
    assert not seen & new
    ran = typed("minicpm_data.tool_exercise", "--save-path", tmp_path / "x", "--examples", 3)
    assert ran.returncode == 2 and "--examples is 3" in ran.stderr
