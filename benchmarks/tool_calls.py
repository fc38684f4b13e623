"""How often a model calls the right tool, and answers rightly with the result: the loop of the openai client.

    python -m benchmarks.tool_calls --model runs/pico-tools/model --backend jax

The model is one that was taught by the data of `minicpm_data.tool_exercise`. The questions are of numbers
that occur in none of it.
"""

import json
import threading
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

from minicpm_data import tool_exercise
from minicpm_data.tool_exercise import TOOLS, asked, compute
from minicpm_serve import backends, openai_api
from minicpm_serve.engine import ServingEngine
from weights_io import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str
    """Model folder."""
    backend: backends.BackendName = "jax"
    """Backend that runs the model."""
    questions: int = 200
    """Number of questions."""
    seed: int = 1
    """Seed of the questions."""


def main(options: Options) -> None:
    """Ask the questions over HTTP and print the shares of right calls and right answers."""
    model, tokenizer = backends.get(options.backend).load(options.model)
    engine = ServingEngine(options.backend, model, tokenizer)
    server = openai_api.server(engine, "taught")
    with openai_api.bound("127.0.0.1", 0) as at:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            print_shares(at.getsockname()[1], options)
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


def print_shares(port: int, options: Options) -> None:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    random, right, count = Random(f"{options.seed} asked"), Counter[str](), Counter[str]()
    for number in range(options.questions):
        kind = ("calculator", "timer", "neither")[number % 3]
        count[kind] += 1
        if kind == "neither":
            question, _ = random.choice(list(tool_exercise.CHAT_WITHOUT_SUMS))(random)
            called, answer = loop(client, question, "")
            right[kind] += not called and bool(answer)
            continue
        example = asked(random, False, kind)["messages"]
        called, answer = loop(client, example[0]["content"], example[2]["content"])
        expected = example[1]["tool_calls"][0]["function"]
        good = [(call["name"], call["arguments"]) for call in called] == [(kind, expected["arguments"])]
        right[kind] += good
        right[f"{kind}, answered"] += good and answer == example[3]["content"]
    for kind, asked_of in count.items():
        words = f"{right[kind]} of {asked_of} {'right calls' if kind != 'neither' else 'answered without a call'}"
        more = "" if kind == "neither" else f", {right[f'{kind}, answered']} right answers"
        print(f"{kind:10} {words}{more} ({right[kind] / asked_of:.1%})")


def loop(client: Any, question: str, result: str) -> tuple[list[dict[str, Any]], str]:
    """Ask, run the calls, and ask again: the calls and the last answer. The calculator computes; the timer says
    ``result``."""
    messages: list[Any] = [{"role": "user", "content": question}]
    options = {"model": client.models.list().data[0].id, "tools": list(TOOLS), "temperature": 0}
    message = client.chat.completions.create(messages=messages, **options).choices[0].message
    calls = message.tool_calls or []
    if not calls:
        return [], message.content or ""
    found = [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls]
    messages.append(message.model_dump(exclude_none=True))
    for call, given in zip(calls, found, strict=True):
        try:
            said = str(compute(given["arguments"]["expression"])) if given["name"] == "calculator" else result
        except (KeyError, ValueError):
            said = "error"
        messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return found, client.chat.completions.create(messages=messages, **options).choices[0].message.content or ""


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.tool_calls")
