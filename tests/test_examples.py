"""Fine-tuning data: what each form becomes, which tokens are trained, and files that are wrong."""

import json
import random

import numpy as np
import pytest
import tiny_tokenizer as tiny

from minicpm_data import load_tokenizer
from minicpm_data.conversation.answer_spans import cut_at_answers
from minicpm_data.datasets.examples import find_split, load_split, make_example, make_pair
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError

TWO_TURNS = [
    {"role": "system", "content": "The fox."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": " 你好 "},
    {"role": "user", "content": "42"},
    {"role": "assistant", "content": "dogs"},
]
ANSWER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fox"}]


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    return load_tokenizer(tiny.write(tmp_path_factory.mktemp("minicpm")))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    n = tiny.sentencepiece_model().get_piece_size()
    added = {str(n): tiny.special("<|im_end|>"), str(n + 1): tiny.special("<|im_start|>")}
    folder = tiny.write(tmp_path_factory.mktemp("chatml"), added_tokens_decoder=added, chat_template=tiny.CHATML)
    return load_tokenizer(folder)


def spans(tokenizer, ids, trained):
    """The text, cut where training begins and ends; trained stretches are lists. The space in front of a text, which
    the fast tokenizer adds, is left out."""
    found = []
    for i, target in zip(ids, trained, strict=True):
        if not found or found[-1][1] != target:
            found.append(([], target))
        found[-1][0].append(int(i))
    texts = [(tokenizer.decode(part, skip_special_tokens=False).replace("<s> ", "<s>"), x) for part, x in found]
    return [[text] if target else text for text, target in texts]


def example_spans(tokenizer, document, **options):
    example = make_example(document, tokenizer, **options)
    assert (
        example.ids.dtype == np.int32 and example.trained.dtype == bool and example.ids.shape == example.trained.shape
    )
    return spans(tokenizer, example.ids, example.trained)


def test_two_turns_of_minicpm(minicpm):
    """MiniCPM's template strips contents and writes no EOS between turns."""
    ids, trained = minicpm.chat_example(TWO_TURNS)
    text = "<s>The fox.<用户>Hello<AI>你好<用户>42<AI>dogs</s>"
    assert ids == minicpm.encode(text)
    assert spans(minicpm, ids, trained) == ["<s>The fox.<用户>Hello<AI>", ["你好"], "<用户>42<AI>", ["dogs</s>"]]


def test_two_turns_of_chatml(chatml):
    ids, trained = chatml.chat_example(TWO_TURNS)
    assert ids == chatml.apply_chat(TWO_TURNS, add_generation_prompt=False)[: len(ids)]
    im_end = chatml.token_to_id("<|im_end|>")
    flags = [target for i, target in zip(ids, trained, strict=True) if i == im_end]
    assert flags == [False, False, True, False, True] and ids[-1] == im_end
    assert ids.count(1) == 1 and 2 not in ids
    answers = [stretch for stretch in spans(chatml, ids, trained) if isinstance(stretch, list)]
    assert [text.replace(" ", "") for [text] in answers] == ["你好<|im_end|>", "dogs<|im_end|>"]


def test_position_by_position(minicpm):
    ids, trained = minicpm.chat_example(ANSWER)
    prompt = minicpm.apply_chat(ANSWER[:1])
    answer = minicpm.encode("<用户>Hello<AI>fox")[len(prompt) :]
    assert ids == [*prompt, *answer, 2]
    assert trained == [False] * len(prompt) + [True] * (len(answer) + 1)


@pytest.mark.parametrize("name", ["minicpm", "chatml"])
def test_prompts_are_those_of_inference(name, request):
    tokenizer = request.getfixturevalue(name)
    words = ["Hello", " world", "你好", "\n", "  ", "<用户>", "<AI>", "</s>", "👍", "<|im_end|>", "<", "s>", "42"]
    rng = random.Random(0)
    for _ in range(200):
        contents = ["".join(rng.choices(words, k=rng.randrange(6))) for _ in range(2 * rng.randrange(1, 4))]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        ids, trained = tokenizer.chat_example(messages, trusted=False)
        first = tokenizer.apply_chat(messages[:1])
        assert ids[: len(first)] == first and not any(trained[: len(first)])
        assert ids[-1] in tokenizer.eos_token_ids and trained[-1] and ids[-2] not in tokenizer.eos_token_ids
        only_last = [i == len(messages) - 1 for i in range(len(messages))]
        last, last_trained = tokenizer.chat_example(messages, only_last, trusted=False)
        assert last == ids
        asked = tokenizer.decode(tokenizer.apply_chat(messages[:-1]))
        assert tokenizer.decode(ids[: last_trained.index(True)]) == asked
        specials = [i for i, target in zip(ids, trained, strict=True) if target and i in tokenizer._markers]
        assert len(specials) == (1 if name == "minicpm" else len(messages) // 2)  # spelled-out ones stay text


def test_what_follows_the_last_answer_is_cut_off(minicpm, chatml):
    for tokenizer in (minicpm, chatml):
        more = [*TWO_TURNS, {"role": "user", "content": "Hello"}]
        assert tokenizer.chat_example(more) == tokenizer.chat_example(TWO_TURNS)


def test_only_the_last_answer(minicpm):
    ids, trained = minicpm.chat_example(TWO_TURNS, [False] * 4 + [True])
    assert spans(minicpm, ids, trained) == ["<s>The fox.<用户>Hello<AI>你好<用户>42<AI>", ["dogs</s>"]]


def test_a_token_across_the_seam(tmp_path):
    """ "t" + "f" is a piece: the prompt keeps its ids, and the answer begins with "f", without a space in front."""
    spec = tiny.as_json()
    vocab = spec["model"]["vocab"]
    vocab["tf"] = len(vocab)
    spec["model"]["merges"].insert(0, ("t", "f"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(tiny.write(tmp_path, {"tokenizer.json": spec}, chat_template=template))
    messages = [{"role": "user", "content": "at"}, {"role": "assistant", "content": "fro"}]
    assert vocab["tf"] in tokenizer.apply_chat(messages)
    ids, trained = tokenizer.chat_example(messages)
    prompt = tokenizer.apply_chat(messages[:1])
    assert ids[: len(prompt)] == prompt and vocab["tf"] not in ids
    assert tokenizer.decode(ids) == "atfro" and trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_two_line_ends_of_a_byte_level_tokenizer_stay_the_prompt(tmp_path):
    """Where spaces before a word are split off one by one, a text's beginning has other ids than the beginning."""
    from test_tokenizer import gguf_gpt2

    from minicpm_data import tokenizer_from_gguf

    metadata = gguf_gpt2("gpt-2")
    metadata["tokenizer.ggml.merges"].append("Ċ Ċ")
    metadata["tokenizer.ggml.tokens"].append("ĊĊ")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content + '\n\n' }}{% endfor %}"
    tokenizer = tokenizer_from_gguf(metadata)
    ids, trained = tokenizer.chat_example(ANSWER)
    prompt = tokenizer.apply_chat(ANSWER[:1])
    assert ids[: len(prompt)] == prompt and tokenizer.token_to_id("ĊĊ") in prompt
    assert tokenizer.apply_chat(ANSWER)[: len(prompt)] != prompt
    assert tokenizer.decode(ids) == "Hello\n\nfox" and trained.index(True) == len(prompt)


def test_eos_once(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}"
    tokenizer = load_tokenizer(tiny.write(tmp_path, chat_template=template + "{% endfor %}"))
    ids, trained = tokenizer.chat_example([*ANSWER, *ANSWER])
    assert spans(tokenizer, ids, trained) == ["<s>Hello", ["fox</s>"], "Hello", ["fox</s>"]]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    ],
)
def test_templates_that_change_answers(tmp_path, template):
    tokenizer = load_tokenizer(tiny.write(tmp_path, chat_template=template))
    messages = [*ANSWER, {"role": "user", "content": "a"}, {"role": "assistant", "content": "x</think>y"}]
    with pytest.raises(InputError, match="leaves out, reorders or rewrites"):
        tokenizer.chat_example(messages)


@pytest.mark.parametrize("form", [str, str.strip, str.lstrip, str.rstrip])
def test_the_template_strips_as_it_does_without_marks(form):
    prompt = f"A: {form(' x ')} B: {form(' ')}."
    assert cut_at_answers(prompt, ["A: ", " B: ", "."], [{"content": " x "}, {"content": " "}]) == [
        "A: ",
        form(" x "),
        " B: ",
        form(" "),
        ".",
    ]


def test_without_an_answer_or_eos(minicpm):
    with pytest.raises(InputError, match="no assistant turn"):
        minicpm.chat_example(ANSWER[:1])
    bare = Tokenizer(minicpm._fast, bos_token_id=1)
    with pytest.raises(InputError, match="no EOS token"):
        bare.chat_example(ANSWER)
    with pytest.raises(InputError, match="no EOS token"):
        make_example({"text": "Hello"}, bare)


OCNLI = "请判断下边两个句子的关系属于 [entailment, neutral, contradiction]中的哪一种？\n句子1: a\n句子2：b"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"messages": ANSWER}, ["<s><用户>Hello<AI>", ["fox</s>"]]),
        ({"messages": ANSWER, "id": 7, "tools": None}, ["<s><用户>Hello<AI>", ["fox</s>"]]),
        ({"prompt": "Hello", "completion": "fox"}, ["<s><用户>Hello<AI>", ["fox</s>"]]),
        ({"text": "Hello fox"}, ["<s>", ["Hello fox</s>"]]),
        ({"text": "Hello fox</s>"}, ["<s>", ["Hello fox</s>"]]),
        ({"content": "Hello", "summary": "fox"}, ["<s><用户>Hello<AI>", ["fox</s>"]]),
        ({"input": "Hello", "prompt": "/n42", "output": "fox"}, ["<s><用户>Hello/n42<AI>", ["fox</s>"]]),
        (
            {"sentence1": "a", "sentence2": "b", "label": "neutral", "level": "easy"},
            [f"<s><用户>{OCNLI}<AI>", ["neutral</s>"]],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fox"}]},
            ["<s><用户>Hello<AI>", ["fox</s>"]],
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "system": "c"},
            ["<s>c<用户>a<AI>", ["b</s>"]],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "c"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            ["<s>c<用户>a<AI>", ["b"], "<用户>a<AI>", ["b</s>"]],
        ),
    ],
)
def test_forms(minicpm, document, expected):
    assert example_spans(minicpm, document) == expected
    whole = "".join(part if isinstance(part, str) else part[0] for part in expected)
    assert example_spans(minicpm, document, mask_prompt=False) == ["<s>", [whole.removeprefix("<s>")]]


def test_nothing_predicts_the_first_token(tmp_path):
    tokenizer = load_tokenizer(tiny.write(tmp_path, add_bos_token=False))
    for mask_prompt in (True, False):
        assert not make_example({"text": "Hello"}, tokenizer, mask_prompt).trained[0]
        assert not make_example({"messages": [ANSWER[1]]}, tokenizer, mask_prompt).trained[0]


HELLO = {"from": "human", "value": "Hello"}


@pytest.mark.parametrize(
    "document",
    [
        {
            "conversations": [HELLO],
            "chosen": {"from": "gpt", "value": "fox"},
            "rejected": {"from": "gpt", "value": "a"},
        },
        {"conversations": [HELLO], "chosen": "fox", "rejected": "a"},
        {"conversations": [HELLO], "chosen": ANSWER[1], "rejected": {"role": "assistant", "content": "a"}},
        {"prompt": "Hello", "chosen": "fox", "rejected": "a"},
        {"prompt": ANSWER[:1], "chosen": ANSWER[1:], "rejected": [{"role": "assistant", "content": "a"}]},
        {"prompt": "Hello", "chosen": ANSWER, "rejected": [ANSWER[0], {"role": "assistant", "content": "a"}]},
    ],
)
def test_pairs(minicpm, document):
    pair = make_pair(document, minicpm)
    found = [spans(minicpm, part.ids, part.trained) for part in pair.parts]
    assert found == [["<s><用户>Hello<AI>", ["fox</s>"]], ["<s><用户>Hello<AI>", ["a</s>"]]]


def test_a_pair_trains_its_last_answer_only(minicpm):
    pair = make_pair({"prompt": TWO_TURNS[1:4], "chosen": "fox", "rejected": "dogs"}, minicpm)
    assert spans(minicpm, pair.rejected.ids, pair.rejected.trained)[1:] == [["dogs</s>"]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "it has no keys; give messages, prompt and completion, text"),
        ({"ask": "a", "answer": "b"}, "the keys ask and answer, which are no known form; give messages, prompt and"),
        ({"text": "a", "messages": ANSWER}, "the keys messages and text, which are more than one form"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "these are preference pairs"),
        ({"messages": ANSWER, "tools": [{}]}, "tools holds an item 0 that has no name"),
        ({"text": 5}, '"text" of type int'),
        ({"text": ""}, "text is empty"),
        ({"prompt": None, "completion": "a"}, '"prompt" of type NoneType'),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": []}, "with one or more"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of message 0"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "the role 'robot'"),
        ({"messages": ANSWER[:1]}, "no assistant turn"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "0 is from 'bot'; it must be from human, gpt, system, function_call",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "message 0 is from"),
        ({"conversations": [{"from": "gpt"}]}, '"value" is missing'),
        ({"text": "a\ud83d"}, "lone surrogate"),
    ],
)
def test_documents_that_cannot_be_used(minicpm, document, message):
    with pytest.raises(InputError, match=message) as caught:
        make_example(document, minicpm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"messages": ANSWER}, "the keys messages, which are no known form; give prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": ANSWER, "rejected": "b"}, '"chosen" that is not one answer'),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "with one or more"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, '"prompt" of type int'),
    ],
)
def test_pairs_that_cannot_be_used(minicpm, document, message):
    with pytest.raises(InputError, match=message):
        make_pair(document, minicpm)


def lines(*documents):
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


FOX, DOG = {"text": "The quick brown fox"}, {"prompt": "Hello", "completion": "dog"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", lines(FOX, DOG)),
        ("train.jsonl", "\ufeff" + lines(FOX) + "\n  \n" + lines(DOG)),
        ("train.json", lines(FOX, DOG)),
        ("train.json", json.dumps([FOX, DOG], indent=4)),
        ("train.json", "\ufeff\n " + json.dumps([FOX, DOG])),
        ("train.jsonl", json.dumps([FOX, DOG], indent=4)),
        ("train.jsonl", json.dumps([FOX, DOG]) + "\n\n"),
    ],
)
def test_files(tmp_path, minicpm, name, content):
    (tmp_path / name).write_text(content, "utf-8")
    split = load_split(tmp_path, "train", minicpm, 64)
    assert split.path == tmp_path / name and (split.dropped, split.cut) == (0, 0)
    assert [example.ids.tolist() for example in split.examples] == [
        make_example(document, minicpm).ids.tolist() for document in (FOX, DOG)
    ]
    assert load_split(tmp_path / name, "train", minicpm, 64).examples[1].length == split.examples[1].length
    assert load_split(tmp_path / name, "valid", minicpm, 64, required=False) is None


def test_which_file(tmp_path):
    def found(split, **options):
        path = find_split(tmp_path, split, **options)
        return path and path.name

    with pytest.raises(InputError, match=r"holds no train.jsonl or train.json\."):
        found("train")
    assert found("valid", required=False) is None
    for name in ("train.json", "dev.json", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [found(split) for split in ("train", "valid", "test")] == ["train.json", "dev.json", "test.jsonl"]
    (tmp_path / "valid.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"both valid.jsonl and dev.json; keep one"):
        found("valid")
    with pytest.raises(InputError, match=r"is one file.*valid.jsonl, valid.json, dev.jsonl or dev.json"):
        find_split(tmp_path / "train.json", "valid")
    with pytest.raises(InputError, match=r"nowhere does not exist; it should hold train.jsonl or train.json\."):
        find_split(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.jsonl",
            lines(FOX) + "{\n" + lines(FOX, {"a": 1}),
            r"line 2 ends before its JSON does; put .* \(1 more line is wrong: 4\)\.$",
        ),
        (
            "train.jsonl",
            lines(FOX, {"a": 1}),
            r"train.jsonl, line 2: it has the keys a, which .*mac.md\)\.$",
        ),
        (
            "train.jsonl",
            lines(*[{"a": 1}] * 14),
            r"line 1: .*\(13 more .*wrong: 2, 3, 4, \.\.\.\)",
        ),
        ("train.jsonl", "[1]\n[2]\n", "line 1 is not an object"),
        ("train.jsonl", "[1]\n", "item 1 is not an object"),
        ("train.json", json.dumps({"data": [FOX]}, indent=1), "line 1 ends before its JSON does; put one whole object"),
        ("train.jsonl", lines(FOX) + lines(FOX)[:-2], "line 2 ends before its JSON does"),
        ("train.jsonl", '{"text": 1' + "0" * 5000 + "}", r"line 1 is not JSON \(Exceeds[^;]*\); correct or delete it"),
        ("train.jsonl", b"\xff\n", "line 1 is not UTF-8"),
        ("train.jsonl", lines(FOX).encode("utf-16"), "line 1 is UTF-16 text; convert the file to UTF-8 first"),
        ("train.jsonl", lines(FOX).encode("utf-16-le"), "line 1 is UTF-16 text; convert the file to UTF-8 first"),
        ("train.jsonl", "a,b\nc,d\n", r"line 1 is not JSON .*\(1 more line is wrong: 2\)"),
        ("train.json", json.dumps([FOX, 1, FOX, {"a": 1}]), r"item 2 is not an object .*\(1 more items? .*: 4\)\.$"),
        ("train.json", json.dumps([FOX, {"messages": ANSWER[:1]}]), "item 2: the messages have no assistant turn"),
        ("train.json", "[{}", "train.json ends before its JSON does"),
        (
            "train.jsonl",
            lines(FOX) + '{"text": "a", "text": "b"}',
            r'line 2 has the key "text" twice; keep one of them\.$',
        ),
        ("train.json", '[{"messages": [{"role": "user", "role": "a"}]}]', r'train.json has the key "role" twice'),
        ("train.jsonl", "{}\n" + "[" * 100_000, r"2\)\.$"),
        ("train.jsonl", "[" * 100_000, r"train.jsonl is not JSON \(it is nested too deeply\)"),
        ("train.json", "[" * 100_000, r"train.json is not JSON \(it is nested too deeply\)"),
        ("train.json", b'["\xff"]', "not UTF-8"),
        ("train.json", "[]", "is empty"),
        ("train.json", "", "is empty"),
        ("train.jsonl", "\n\n", "is empty"),
    ],
)
def test_files_that_are_wrong(tmp_path, minicpm, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_split(tmp_path, "train", minicpm, 64)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"a,b\nc,d\n"), ("a.parquet", b"PAR1\xff"), ("a.gz", b"\x1f")])
def test_a_file_of_another_kind_is_told_as_one(tmp_path, minicpm, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} holds no JSON; convert it to a .jsonl file, with one JSON object a"):
        load_split(tmp_path / name, "train", minicpm, 64)
    (tmp_path / name).write_text(lines(FOX))
    assert load_split(tmp_path / name, "train", minicpm, 64).summary().startswith(f"{name}: 1 example, ")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_line_without_end_is_refused(tmp_path, minicpm, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(20 << 30)  # holes alone
    with pytest.raises(InputError, match=f"{name}, line 1 is longer than 67108864 bytes; split it"):
        load_split(tmp_path, "train", minicpm, 64)


def test_an_array_is_bounded(tmp_path, minicpm):
    with open(tmp_path / "train.json", "wb") as file:
        file.write(b"[")
        file.truncate(20 << 30)
    with pytest.raises(InputError, match="train.json is one array of 21474836480 bytes"):
        load_split(tmp_path, "train", minicpm, 64)


def test_window(tmp_path, minicpm):
    prompt = len(minicpm.apply_chat(ANSWER[:1]))
    documents = [
        {"prompt": "Hello", "completion": "fox"},
        {"prompt": "Hello", "completion": "fox " * 50},
        {"prompt": "Hello " * 30, "completion": "fox"},
    ]
    (tmp_path / "train.jsonl").write_text(lines(*documents))
    short, long = (make_example(document, minicpm) for document in documents[:2])
    split = load_split(tmp_path, "train", minicpm, short.length)
    assert (len(split.examples), split.cut, split.dropped) == (2, 1, 1)
    assert split.examples[0].ids.tolist() == short.ids.tolist()
    assert split.examples[1].ids.tolist() == long.ids[: short.length].tolist()
    trained = short.trained.sum() + long.trained[: short.length].sum()
    assert split.summary() == (
        f"train.jsonl: 2 examples, {2 * short.length} tokens, {trained} of them trained; 1 cut at the window's end; "
        "1 dropped, nothing trained in the window"
    )
    longest = max(long.length, make_example(documents[2], minicpm).length)
    with pytest.raises(InputError, match=f"--max-seq-length {short.length} would .* the shortest.* {longest} all"):
        load_split(tmp_path, "train", minicpm, prompt)
    assert len(load_split(tmp_path, "train", minicpm, prompt, mask_prompt=False).examples) == 3


def test_window_of_pairs(tmp_path, minicpm):
    documents = [{"prompt": "Hello", "chosen": "fox " * 50, "rejected": "a"}, {"prompt": "a " * 60, "chosen": "b"}]
    (tmp_path / "dev.json").write_text(json.dumps([documents[0], {**documents[1], "rejected": "c"}]))
    split = load_split(tmp_path, "valid", minicpm, 40, pairs=True)
    assert (len(split.examples), split.cut, split.dropped) == (1, 1, 1)
    assert split.examples[0].length == 40 and split.summary().startswith("dev.json: 1 pair, ")
