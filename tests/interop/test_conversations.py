"""Conversations with tools, calls, results and thoughts against transformers' own rendering, and what training makes
of them."""

import json
import random
from pathlib import Path

import pytest
import tiny_tokenizer as tiny
import tokenizers
from transformers import PreTrainedTokenizerFast

from minicpm_data import load_tokenizer
from minicpm_data.datasets.examples import make_example

pytestmark = pytest.mark.interop

FOLDER = Path(__file__).parents[1] / "reference" / "chat"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]
SPECIALS += ["<function", "</function>", "<param", "</param>", "/no_think", "<think>", "</think>"]
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
TEMPLATES = ["minicpm5_1b", "minicpm5_2b", "minicpm3_tools"]
CITY = {"type": "string", "description": "of <param> & more", "enum": ["a", "<tools>"]}
SCHEMA = {
    "type": "object",
    "properties": {"city": CITY, "when": {"type": "object", "properties": {"h": {"type": "integer"}}}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "天气", "parameters": {**SCHEMA, "required": ["city"]}},
    },
    {"type": "function", "function": {"name": "now", "description": ""}},
]
WORDS = ["Hello", " world", "你好", "\n", "  ", "<", "&", '"', "'", "42", "👍", "\\", *SPECIALS]


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request, tmp_path_factory):
    """Ours and theirs, with a template and the special tokens of MiniCPM5."""
    made = tokenizers.Tokenizer.from_str(json.dumps(tiny.as_json(space_prefix=False)))
    made.add_special_tokens(SPECIALS)
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES))
    template = (FOLDER / request.param / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").write_text(template)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMES)
    theirs.chat_template = template
    return load_tokenizer(folder), theirs, request.param


def conversation(rng: random.Random, key: str, words: list[str]) -> list[dict]:
    """Some turns, with calls and their results."""

    def text(most=6):
        return "".join(rng.choices(words, k=rng.randrange(most)))

    def value(depth=0):
        kinds = [text, lambda: rng.choice([1, -2.5, 1e21, True, None])]
        kinds += [lambda: [value(1), value(1)], lambda: {text(): value(1)}] * (not depth)
        return rng.choice(kinds)()

    def answer(**more):
        thought = {key: text() + "why"} if rng.random() < 0.5 else {}
        return {"role": "assistant", "content": text().lstrip(), **thought, **more}

    messages = [{"role": "system", "content": text()}] * rng.randrange(2)
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": text()})
        for _ in range(rng.randrange(3)):
            calls = [
                {"id": f"c{i}", "type": "function", "function": {"name": rng.choice(["weather", "now"])}}
                for i in range(rng.randrange(1, 4))
            ]
            for call in calls:
                call["function"]["arguments"] = {text() + "k": value() for _ in range(rng.randrange(3))}
            messages.append(answer(tool_calls=calls))
            messages += [{"role": "tool", "content": text(), "tool_call_id": call["id"]} for call in calls]
        messages.append(answer())
    return messages


def test_prompts(pair):
    """The text is theirs for any contents, and so are the ids where the contents are trusted."""
    ours, theirs, name = pair
    rng = random.Random(name)
    key = "thought" if name == "minicpm3_tools" else "reasoning_content"
    for _ in range(150):
        messages = conversation(rng, key, WORDS)
        tools = rng.choice([None, TOOLS])
        thinking = None if name == "minicpm3_tools" else rng.choice([None, True, False])
        given = {} if thinking is None else {"enable_thinking": thinking}
        prompted = rng.random() < 0.5
        text = theirs.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompted, **given
        )
        assert ours.render_chat(messages, tools, thinking, add_generation_prompt=prompted) == text
        ids = theirs(text, add_special_tokens=False).input_ids
        before = ours.encode("")
        expected = ids if ids[: len(before)] == before else before + ids
        assert ours.apply_chat(messages, tools, thinking, prompted, trusted=True) == expected


def test_training_examples(pair):
    """Their ids up to the end of the last answer; the trained ones are those of answers: no token of a result is."""
    ours, theirs, name = pair
    rng = random.Random(name)
    key = "thought" if name == "minicpm3_tools" else "reasoning_content"
    words = [word for word in WORDS if "think" not in word]  # a template may lose what stands between two of them
    for _ in range(100):
        messages = conversation(rng, key, words)
        for message in messages:
            if message["role"] == "tool":
                message["content"] = "\u6d77"  # one token, and in no other text
        tools = rng.choice([None, TOOLS])
        example = make_example({"messages": messages, "tools": tools}, ours)
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False).rstrip("\n")
        ids = theirs(text, add_special_tokens=False).input_ids
        expected = ids if ids[:1] == [ours.bos_token_id] else [ours.bos_token_id, *ids]
        assert ours.decode(example.ids, skip_special_tokens=False) == ours.decode(expected, skip_special_tokens=False)
        assert ours.token_to_id("\u6d77") not in example.ids[example.trained]
        ends = (example.ids == ours.eos_token_ids[0]) & example.trained
        assert ends.sum() >= sum(message["role"] == "assistant" for message in messages)
        calls = sum(len(message.get("tool_calls", ())) for message in messages)
        named = ours.decode(example.ids[example.trained], skip_special_tokens=False)
        assert named.count("weather") + named.count("now") >= calls
