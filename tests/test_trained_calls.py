"""Fine-tuning on thoughts and tool calls: what is trained, for each template, and lines that would lose something."""

import functools
import json
from pathlib import Path

import pytest
import tiny_tokenizer as tiny

from minicpm_data import load_tokenizer
from minicpm_data.datasets.examples import load_split, make_example, make_pair
from minicpm_data.datasets.pretraining import pretraining_ids
from weights_io.errors import InputError

FOLDER = Path(__file__).parent / "reference" / "chat"
ADDED = ("<|im_start|>", "<|im_end|>", "<function", "</function>", "<tool_response>", "</tool_response>")
FIRST = tiny.sentencepiece_model().get_piece_size()
DECODER = {str(FIRST + i): tiny.special(token) for i, token in enumerate(ADDED)}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    def make(name):
        folder, template = tmp_path_factory.mktemp(name), (FOLDER / name / "chat_template.jinja").read_text("utf-8")
        return load_tokenizer(tiny.write(folder, added_tokens_decoder=DECODER, chat_template=template))

    return functools.cache(make)


def call(city, arguments=None):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments or {"city": city}}}


def answer(content="", *calls, **more):
    return {"role": "assistant", "content": content, **({"tool_calls": [*calls]} if calls else {}), **more}


QUESTION, RESULT = {"role": "user", "content": "q"}, {"role": "tool", "content": "25"}
LOOP = [
    QUESTION,
    answer("Hm.", call("a"), call("b", '{"city": "b"}'), reasoning_content="r1"),
    {**RESULT, "content": "26"},
    RESULT,
    answer("warm", reasoning_content="r2"),
]
EARLIER = [QUESTION, answer("no", reasoning_content="r0")]


def spans(tokenizer, document, **options):
    """The trained stretches, and the whole text."""
    example = make_example(document, tokenizer, **options)
    found = [[]]
    for i, target in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        found[-1].append(i) if target else found.append([])
    texts = [tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") for ids in found if ids]
    return texts, tokenizer.decode(example.ids, skip_special_tokens=False).replace(" ", "")


XML = '<functionname="weather"><paramname="city">{}</param></function>'
XMLS = f"{XML.format('a')}\n{XML.format('b')}<|im_end|>"
PYTHON = '<|tool_call_start|>\n```python\nweather(city="a")\nweather(city="b")\n```\n<|tool_call_end|>\n'
TRAINED = {
    "minicpm5_1b": [
        "no<|im_end|>",  # the template leaves out the thoughts of earlier turns
        f"<think>\nr1\n</think>\n\nHm.\n{XMLS}",
        "<think>\nr2\n</think>\n\nwarm<|im_end|>",
    ],
    "minicpm5_2b": [
        "<think>\nr0\n</think>\n\nno<|im_end|>",
        f"<think>\nr1\n</think>\n\nHm.\n{XMLS}",
        "<think>\nr2\n</think>\n\nwarm<|im_end|>",
    ],
    "minicpm3_tools": [
        "<|thought_start|>\nr0\n<|thought_end|>\nno<|im_end|>",
        f"<|thought_start|>\nr1\n<|thought_end|>\n{PYTHON}Hm.<|im_end|>",
        "<|thought_start|>\nr2\n<|thought_end|>\nwarm<|im_end|>",
    ],
}


@pytest.mark.parametrize("name", TRAINED)
def test_thoughts_and_calls_are_trained_and_results_are_not(of, name):
    tokenizer = of(name)
    document = {"messages": [*EARLIER, *LOOP], "tools": TOOLS}
    trained, whole = spans(tokenizer, document)
    assert trained == TRAINED[name]
    rendered = tokenizer.render_chat(document["messages"], TOOLS, add_generation_prompt=False)
    assert whole.removeprefix("<s>") == rendered.replace(" ", "").rstrip("\n").removeprefix("<s>")
    assert "ofacity" in whole and "26" in whole
    assert spans(tokenizer, {**document, "tools": json.dumps(TOOLS)}) == (trained, whole)
    document["messages"][1] = {**document["messages"][1], "weight": 0}
    assert spans(tokenizer, document)[0] == trained[1:]
    assert spans(tokenizer, {"messages": LOOP[:2], "tools": TOOLS})[0] == trained[1:2]
    # Without a thought, the empty one that a template may write is not trained.
    plain = [QUESTION, answer("", call("a"), call("b"))]
    assert spans(tokenizer, {"messages": plain})[0] == [PYTHON + "<|im_end|>" if "3" in name else XMLS]
    ids = make_example({"messages": LOOP[:2], "tools": TOOLS}, tokenizer).ids.tolist()
    prompt = tokenizer.apply_chat(LOOP[:1], TOOLS)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", TRAINED)
def test_other_forms_of_the_same_lines(of, name):
    """Results are sorted to their calls, and ShareGPT's turns of calls and results are read."""
    tokenizer = of(name)
    ids = [{**call("a"), "id": "x"}, {**call("b"), "id": "y"}]
    results = [{"role": "tool", "content": "27", "tool_call_id": "y"}, {**RESULT, "tool_call_id": "x"}]
    wanted = spans(tokenizer, {"messages": [QUESTION, answer("", *ids), *results[::-1], answer("warm")]})
    assert spans(tokenizer, {"messages": [QUESTION, answer("", *ids), *results, answer("warm")]}) == wanted
    said = [{"name": "weather", "arguments": {"city": city}} for city in "ab"]
    turns = [
        ("human", "q"),
        ("function_call", json.dumps(said)),
        ("observation", "25"),
        ("tool", "27"),
        ("gpt", "warm"),
    ]
    assert spans(tokenizer, {"conversations": [{"from": who, "value": text} for who, text in turns]}) == wanted
    prompt = [QUESTION, answer("", *ids), *results]
    assert spans(tokenizer, {"prompt": prompt, "completion": "warm"})[0] == wanted[0][1:]
    pair = make_pair(
        {"prompt": prompt, "chosen": "warm", "rejected": [answer("", call("c"))], "tools": TOOLS}, tokenizer
    )
    found = tokenizer.decode(pair.rejected.ids[pair.rejected.trained], skip_special_tokens=False)
    assert "weather" in found and found.endswith("<|im_end|>") and "25" not in found
    tokenizer_ids = pretraining_ids(tokenizer, {"messages": LOOP, "tools": TOOLS})
    assert "r2" in tokenizer.decode(tokenizer_ids) and "r1" in tokenizer.decode(tokenizer_ids)


@pytest.mark.parametrize(
    ("name", "document", "said"),
    [
        (
            "minicpm4_1",
            {"messages": EARLIER},
            "message 1 has a thought beside its content, and the model's chat template",
        ),
        (
            "minicpm4_1",
            {"messages": LOOP[:1] + [answer("", call("a"))]},
            "message 1 has tool_calls, for which the model's",
        ),
        (
            "minicpm_2b",
            {"messages": [QUESTION, answer("a")], "tools": TOOLS},
            "tools cannot be used: the model's chat template has no",
        ),
        ("minicpm5_1b", {"messages": [QUESTION, RESULT, answer("a")]}, "message 1 is the result of a tool, and the"),
        (
            "minicpm5_1b",
            {"messages": [QUESTION, answer("a<tool_sep>b", call("a"))]},
            "leaves out, reorders or rewrites",
        ),
        (
            "minicpm3_tools",
            {"messages": [QUESTION, answer("<|tool_call_start|>x", call("a"))]},
            "leaves out, reorders or rewrites",
        ),
        (
            "minicpm5_1b",
            {"conversations": [{"from": "function_call", "value": "x"}]},
            "the call of message 0 is not JSON",
        ),
        (
            "minicpm5_1b",
            {"conversations": [{"from": "function_call", "value": "[1]"}]},
            "call 0 of message 0 is no call",
        ),
        ("minicpm5_1b", {"messages": EARLIER, "tools": [{"name": 3}]}, "tools holds an item 0 that has no name; give"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_lines_that_would_lose_something(of, name, document, said):
    with pytest.raises(InputError, match=said) as caught:
        make_example(document, of(name))
    assert "\n" not in str(caught.value)
    if "leaves out" not in said:  # nothing is cut out of a text that is trained whole
        with pytest.raises(InputError, match=said):
            pretraining_ids(of(name), document)


def test_an_answer_of_calls_or_thoughts_is_not_empty(of, tmp_path):
    lines = [{"messages": [QUESTION, answer(None, call("a"))]}, {"messages": [QUESTION, answer("", reasoning="r")]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "empty" not in load_split(tmp_path, "train", of("minicpm5_2b"), 512).summary()
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [QUESTION, answer(None)]}) + "\n")
    assert "; 1 with an empty answer" in load_split(tmp_path, "train", of("minicpm5_2b"), 512).summary()


def test_a_result_after_the_last_answer_is_left_out(of, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": LOOP[:4]}) + "\n")
    split = load_split(tmp_path, "train", of("minicpm5_1b"), 512)
    assert "; 1 with messages after the last answer, which are left out" in split.summary()


def test_an_answer_that_repeats_what_follows_it(of):
    """The end of an answer is found where the text after it begins, and not within the answer's parts."""
    tokenizer = of("minicpm5_2b")
    after = "<|im_end|>\n<|im_start|>user\n<tool_response>\n25\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    messages = [QUESTION, answer(f"a{after}b", call("a")), RESULT, answer("c")]
    trained, _ = spans(tokenizer, {"messages": messages})
    assert [text.count("<function") for text in trained] == [1, 0] and trained[1] == "c<|im_end|>"
