"""What is parsed out of the answers of models: thoughts, text and calls, however the text is cut."""

import json
import random
from pathlib import Path

import pytest

from minicpm_data.conversation.answers import AnswerParser, Content, Piece, Reasoning, ToolCall

REFERENCE = json.loads((Path(__file__).parent / "reference/chat/tool_calls.json").read_text())
CASES = [*REFERENCE["cases"], *REFERENCE["streaming"]]


def parsed(parser: AnswerParser, chunks) -> list[Piece]:
    """The pieces of an answer that comes in these chunks, neighbors of a kind joined."""
    joined: list[Piece] = []
    for piece in [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish():
        if joined and type(joined[-1]) is type(piece) and not isinstance(piece, ToolCall):
            joined[-1] = type(piece)(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def typed(value):
    """A JSON value in which true differs from 1."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return list(map(typed, value)) if isinstance(value, list) else (isinstance(value, bool), value)


def message(pieces: list[Piece], finish_reason: str) -> dict:
    """The pieces in the form of the reference."""

    def text(kind) -> str:
        return " ".join("".join(piece.text for piece in pieces if isinstance(piece, kind)).split())

    calls = [(piece.name, typed(json.loads(piece.arguments))) for piece in pieces if isinstance(piece, ToolCall)]
    reason = "tool_calls" if calls and finish_reason == "stop" else finish_reason
    return {"content": text(Content), "thought": text(Reasoning), "calls": calls, "finish_reason": reason}


def expected(wanted: dict) -> dict:
    content, thought = (" ".join((wanted[key] or "").split()) for key in ("content", "reasoning_content"))
    calls = [(call["name"], typed(call["arguments"])) for call in wanted["tool_calls"]]
    return {"content": content, "thought": thought, "calls": calls, "finish_reason": wanted["finish_reason"]}


def cuttings(text: str):
    """All cuts in two, equal chunks, random ones."""
    rng = random.Random(len(text))
    yield from ([text[:i], text[i:]] for i in range(1, len(text)))
    yield from ([text[i : i + n] for i in range(0, len(text), n)] for n in range(1, 12))
    for _ in range(10):
        at = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(rng.randrange(1, 12)))})
        yield [text[i:j] for i, j in zip(at, at[1:], strict=False)]


@pytest.mark.parametrize("case", CASES, ids=[f"{case['form']}: {case['name']}" for case in CASES])
def test_the_parse_of_the_reference_however_the_text_is_cut(case):
    def parser() -> AnswerParser:
        tools = case.get("tools", REFERENCE[f"tools_{case['form']}"])
        return AnswerParser(tools, case["form"], case["starts_in_reasoning"])

    text = case.get("output") or "".join(case["chunks"])
    whole = parsed(parser(), [text])
    assert message(whole, case["finish_reason"]) == expected(case["expected"])
    for chunks in cuttings(text):
        assert parsed(parser(), chunks) == whole


SHOP = {
    "name": "shop",
    "parameters": {
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "s": {"type": ["string", "integer"]},
            "level": {"enum": [1, "high", None]},
            "item": {"$ref": "#/$defs/Item"},
            "maybe": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Item"}, {"type": "null"}]},
            "t": {"type": "string"},
        },
        "$defs": {"Item": {"properties": {"a": {}, "next": {"$ref": "#/$defs/Item"}}}},
    },
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "3.0", 3),
        ("n", " 7\n", 7),
        ("n", "+7", 7),
        ("n", "true", "true"),
        ("n", "3.5", "3.5"),
        ("n", "1" * 5000, "1" * 5000),
        ("x", "1e999", "1e999"),
        ("x", "-Infinity", "-Infinity"),
        ("s", "5", 5),
        ("s", "five", "five"),
        ("level", "1", 1),
        ("level", "None", None),
        ("level", "high", "high"),
        ("item", "{'a': (1, None), 'b': \"it's\"}", {"a": [1, None], "b": "it's"}),
        ("item", '{"a": "\\ud83d\\ude00 \\ud83d"}', {"a": "😀 \ufffd"}),
        ("item", '{"a": "&quot;&#39;"}', {"a": "&quot;&#39;"}),
        ("item", "{&quot;a&quot;: 1}", {"a": 1}),
        ("item", "[" * 90 + "]" * 90, "[" * 90 + "]" * 90),
        ("item", '{"a":' * 200 + "1" + "}" * 200, '{"a":' * 200 + "1" + "}" * 200),
        ("maybe", "null", None),
        ("maybe", '{"a": 1}', {"a": 1}),
        ("maybe", "[1]", "[1]"),
        ("t", "&#0;&#xD800;&#x1F642;&#9999999;&amp;lt;", "&#0;&#xD800;🙂&#9999999;&lt;"),
        ("t", "\n<![CDATA[&amp;]]>\n", "&amp;"),
        ("t", "&lt;<![CDATA[&lt;]]>", "<&lt;"),
        ("t", "</params></functional>", "</params></functional>"),
        ("t", "<![CDATA[a]]]]></param x]]>", "a]]]]></param x"),
        ("other", "[1]", [1]),
        ("other", "[1", "[1"),
    ],
)
def test_a_text_becomes_the_value_that_the_schema_means(name, text, value):
    call = f'<function name="shop"><param name="{name}">{text}</param></function>'
    (found,) = parsed(AnswerParser([{"function": SHOP}], "xml"), [call])
    assert typed(json.loads(found.arguments)) == typed({name: value})
    assert "\ufffd" not in found.arguments or "\ufffd" in repr(value)


NOW = ToolCall("now", "{}")


@pytest.mark.parametrize(
    ("form", "text", "pieces"),
    [
        # Text that only mentions a tag, or a broken block, does not take a later call with it.
        ("xml", 'Use `<function name="now">` so:\n<function name="now"></function>', None),
        ("xml", '<function name="now"><param>x</param><function name="now"></function>', None),
        ("xml", '<function name="now"><param>x</param></function> <function name="now"></function>', None),
        ("xml", '<function <functions <function name="now"></function>', None),
        ("xml", '<function name="now" name="other"></function>', []),
        ("xml", "<function name=now></function>", []),
        # A call that is quoted in a broken block is none.
        ("xml", '<function name="now"><param><![CDATA[<function name="now"></function>]]></param></function>', []),
        ("xml", 'so <function name="no', ["so"]),
        ("xml", 'so <function name="other', []),
        ("xml", 'so <function name="other" ', []),
        ("xml", "so <function", ["so"]),
        ("xml", 'so <function name="now"><', ["so"]),
        ("xml", 'so <function name="now"></function', ["so"]),
        ("xml", '<function name="now"></function>\n<func', [NOW]),
        ("xml", '<function name="now"></function> <b', [NOW, "<b"]),
        ("xml", "<|thought_start|>no<|thought_end|>", []),
        (
            None,
            '<think>\na\n</think>\n\n <function name="now"></function>',
            [Reasoning("a"), ' <function name="now"></function>'],
        ),
        (None, " \n<think", []),
        (None, " a \n", []),
        (None, "a <think>b</think>", []),
        ("python", "<|tool_call_start|>now(); now()<|tool_call_end|>", [NOW, NOW]),
        ("python", "<|tool_call_start|>\n# it's\nnow( # x\n)\n<|tool_call_end|>", [NOW]),
        ("python", "<|tool_call_start|>now() now()<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(1)<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>x = now()<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(x=nan)<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(x=1, x=2)<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(x=__import__('os'))<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(x=f'a')<|tool_call_end|>", []),
        ("python", "<|tool_call_start|>now(x=1+1)<|tool_call_end|>", []),
        ("python", "<|tool_call_start|><|tool_call_end|>", []),
        ("python", "<|tool_call_start|>it's<|tool_call_end|>\n<|tool_call_start|>now()<|tool_call_end|>", None),
        (
            "python",
            "<|tool_call_start|>now(x='a' \"<|tool_call_end|>\", y=r'\\d', z=0x10, w=-1_0e1)<|tool_call_end|>",
            [ToolCall("now", '{"x": "a<|tool_call_end|>", "y": "\\\\d", "z": 16, "w": -100.0}')],
        ),
        ("python", "<think>a</think>\n<|tool_call_start|>now()<|tool_call_end|>", [Reasoning("a"), NOW]),
    ],
)
def test_what_is_no_whole_call_is_text(form, text, pieces):
    """``pieces`` of []: all is text; None: all before the last call is."""
    if pieces is None:
        pieces = [text[: text.rindex("<function" if form == "xml" else "<|tool_call_start|>")].rstrip(), NOW]
    wanted = [Content(piece) if isinstance(piece, str) else piece for piece in pieces or [text]]
    tools = [{"type": "function", "function": {"name": "now"}}]
    for chunks in ([text], text):
        assert parsed(AnswerParser(tools, form), chunks) == wanted


@pytest.mark.parametrize("form", ["xml", "python"])
def test_without_parallel_calls_the_answer_ends_after_the_first(form):
    call = {"xml": '<function name="now"></function>', "python": "<|tool_call_start|>now()\nnow()<|tool_call_end|>"}[
        form
    ]
    parser = AnswerParser([{"function": {"name": "now"}}], form, parallel=False)
    assert not parser.done
    assert parsed(parser, ["a\n" + call + "b" + call]) == [Content("a"), NOW]
    assert parser.done


@pytest.mark.parametrize("part", ["[", "(", "{", '{"a":', "-", '"', "1", "\\", "&#", "]]></param", "'''", " ", "\n"])
@pytest.mark.parametrize("form", ["xml", "python"])
def test_a_hostile_answer_takes_linear_time(form, part):
    many = part * (100_000 // len(part))  # quadratic time would be minutes
    xml = f'<function name="now"><param name="x">{many}</param></function>'
    text = xml if form == "xml" else f"<|tool_call_start|>now(x={many})<|tool_call_end|>"
    (found,) = parsed(AnswerParser([{"function": {"name": "now"}}], form), [text])
    assert found == Content(text) or json.loads(found.arguments) == {"x": many} or part in " \n"
