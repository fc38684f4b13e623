"""A small task: the built-in model learns to call a calculator and a timer, and to answer with what they say.

    python -m minicpm_data.tool_exercise --save-path tools

writes ``start``, the built-in model with a chat template that has tools, and the data to fine-tune it on:
``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` of {"messages", "tools"}. The sums and times of valid and
test are in no conversation of train.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from minicpm_data.corpus import CHAT
from minicpm_data.pico_corpus import skills
from weights_io import command_line
from weights_io.built_in import built_in
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.write import check_output, folder_to_fill

LARGEST = 999
# MiniCPM5's form of a call, in the built-in model's form of a turn. Of a tool, its name and its parameters are told.
TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %}{% set f = tool.function if tool.function is defined else tool %}"
    " {{ f.name }}({{ f.parameters.properties | join(', ') }}){% if not loop.last %},{% endif %}{% endfor %}\n"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<用户>{{ message.content | trim }}<AI>"
    "{% elif message.role == 'tool' %}<用户>Result: {{ message.content | trim }}<AI>"
    "{% elif message.role == 'system' %}{{ message.content | trim }}"
    "{% else %}{{ message.content | trim }}{% for call in message.tool_calls or [] %}"
    '{% set f = call.function if call.function is defined else call %}<function name="{{ f.name }}">'
    '{% for key, value in f.arguments | items %}<param name="{{ key }}">{{ value }}</param>{% endfor %}</function>'
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)


def tool(name: str, parameter: str, kind: str, description: str, of_parameter: str) -> dict[str, Any]:
    """The definition of a tool with one parameter, in OpenAI's form."""
    properties = {parameter: {"type": kind, "description": of_parameter}}
    schema = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


CALCULATOR = tool("calculator", "expression", "string", "Computes an expression.", "Such as 12 + 7.")
TIMER = tool("timer", "minutes", "integer", "Starts a timer.", "The minutes until it rings.")
TOOLS = (CALCULATOR, TIMER)
STARTED = "started"  # what the timer says
SYMBOLS = {"plus": "+", "minus": "-", "times": "*"}
QUESTIONS = (
    "What is {a} {s} {b}?",
    "{a} {s} {b} = ?",
    "{a}{s}{b}=?",
    "Calculate {a} {s} {b}.",
    "What is {a} {w} {b}?",
    "How much is {a} {w} {b}?",
    "Please compute {a} {w} {b}.",
    "{a}{s}{b}等于多少？",
)
TIMER_QUESTIONS = (
    "Set a timer for {n} minutes.",
    "Wake me in {n} minutes.",
    "Start a {n} minute timer.",
    "Remind me in {n} minutes.",
    "{n}分钟后提醒我。",
)
CHAT_WITHOUT_SUMS = {turn: share for turn, share in CHAT.items() if turn is not skills.sum_turn}


def compute(expression: str) -> int:
    """The value of a sum, a difference or a product of two whole numbers, as the calculator gives it."""
    a, symbol, b = expression.split()
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[symbol]


@dataclass(frozen=True)
class Options:
    save_path: Path
    """Folder to write."""
    examples: int = 6000
    """Training conversations. The test set has 200, the validation set 100."""
    seed: int = 0
    """Seed of the conversations."""


def tool_exercise(options: Options) -> None:
    """Write a small fine-tuning task: questions that are answered with the help of a calculator and a timer."""
    if not 100 <= options.examples <= 100_000:
        raise InputError(f"is {options.examples}; it must be from 100 to 100000.", option="examples")
    out = check_output(options.save_path)
    splits = {"train": options.examples, "valid": 100, "test": 200}
    with folder_to_fill(out.parent), partial(out, folder=True) as folder:
        shutil.copytree(built_in(), folder / "start")
        settings = folder / "start" / "tokenizer_config.json"
        given = json.loads(settings.read_text("utf-8"))
        settings.write_text(json.dumps(given | {"chat_template": TEMPLATE}, ensure_ascii=False, indent=1), "utf-8")
        for name, number in splits.items():
            random = Random(f"{options.seed} tools {name}")
            lines = [json.dumps(conversation(random, name == "train"), ensure_ascii=False) for _ in range(number)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{options.save_path / name}.jsonl: {number} conversations")


def conversation(random: Random, training: bool) -> dict[str, Any]:
    """A conversation. Half ask for the calculator, a quarter for the timer, the others for neither, half of those
    without tools."""
    kind = random.random()
    if kind < 0.75:
        return asked(random, training, "calculator" if kind < 0.5 else "timer")
    turns, tools = CHAT_WITHOUT_SUMS, list(random.choice(((CALCULATOR,), (TIMER,), TOOLS, TOOLS[::-1])))
    if random.random() < 0.5:
        turns, tools = CHAT, []
    chosen = random.choices(list(turns), list(turns.values()))[0]
    question, answer = chosen(random)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"tools": tools} if tools else {})


def asked(random: Random, training: bool, name: str) -> dict[str, Any]:
    """A question for a tool: the question, the call, what the tool says, and the answer."""
    if name == "calculator":
        question, expression = sum_for_calculator(random, training)
        argument: dict[str, Any] = {"expression": expression}
        said = str(compute(expression))
        answer = f"{expression} = {said}."
    else:
        question, minutes = question_for_timer(random, training)
        argument, said = {"minutes": minutes}, STARTED
        answer = f"The timer is set for {minutes} minutes."
    call = {"id": "call0", "type": "function", "function": {"name": name, "arguments": argument}}
    tools = list(TOOLS) if random.random() < 0.5 else list(TOOLS[::-1])
    if random.random() < 0.2:
        tools = [CALCULATOR if name == "calculator" else TIMER]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call0", "content": said},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": tools}


def sum_for_calculator(random: Random, training: bool) -> tuple[str, str]:
    """A question, and the expression that it asks for."""
    word = random.choice(list(SYMBOLS))
    while True:
        a, b = (random.randint(0, random.choice((9, 99, LARGEST))) for _ in range(2))
        if (skills.bucket(word, a, b) == 0) != training:
            break
    numbers = {"a": a, "b": b, "w": word, "s": SYMBOLS[word]}
    return random.choice(QUESTIONS).format(**numbers), f"{a} {SYMBOLS[word]} {b}"


def question_for_timer(random: Random, training: bool) -> tuple[str, int]:
    """A question, and its minutes."""
    while True:
        minutes = random.randint(2, random.choice((60, LARGEST)))
        if (skills.bucket("timer", minutes) == 0) != training:
            return random.choice(TIMER_QUESTIONS).format(n=minutes), minutes


if __name__ == "__main__":
    command_line.run(tool_exercise, Options, "python -m minicpm_data.tool_exercise")
