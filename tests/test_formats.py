"""What a line of training data says is used or refused by name: keys, system messages, weights, thoughts, tokens."""

import json
from pathlib import Path

import pytest
import tiny_tokenizer as tiny

from minicpm_data import load_tokenizer
from minicpm_data.datasets.examples import load_split, make_example, make_pair, show_first
from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.pretraining import pretraining_ids
from minicpm_data.datasets.turns import Turn
from minicpm_data.keys import KeyRules
from weights_io.errors import InputError

ADDED = {"<|im_end|>": True, "<|im_start|>": True, "<think>": False, "</think>": False}
ADDED |= {"<vul_start>": True, "<vul_end>": True, "<|sql|>": False, "<plain_added>": False}
FIRST = tiny.sentencepiece_model().get_piece_size()
ID = {token: FIRST + i for i, token in enumerate(ADDED)}
DECODER = {str(ID[token]): {"content": token, "special": special} for token, special in ADDED.items()}


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    return load_tokenizer(tiny.write(tmp_path_factory.mktemp("minicpm"), added_tokens_decoder=DECODER))


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """The tokenizer with the template of a released model."""

    def make(name):
        template = tiny.CHATML
        if name != "chatml":
            path = Path(__file__).parent / "reference" / "chat" / name / "chat_template.jinja"
            template = path.read_text(encoding="utf-8")
        folder = tmp_path_factory.mktemp(name)
        return load_tokenizer(tiny.write(folder, added_tokens_decoder=DECODER, chat_template=template))

    return make


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def turns(document, **rules):
    """(role, content) of each turn."""
    return [(turn.role, turn.content) for turn in Reader(KeyRules(**rules)).conversation(document).turns]


def trained(tokenizer, document, **options):
    """The trained stretches as text."""
    example = make_example(document, tokenizer, **options)
    found, before = [], False
    for i, target in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if target and not before:
            found.append([])
        if target:
            found[-1].append(i)
        before = target
    return [tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") for ids in found]


SYSTEM = {"system": "Answer in French."}
QUESTION = [("user", "1 + 1 = ?"), ("assistant", "deux")]
FORMS = [
    {"messages": [user("1 + 1 = ?"), answer("deux")]},
    {"prompt": "1 + 1 = ?", "completion": "deux"},
    {"prompt": "1 + 1 = ?", "response": "deux"},
    {"query": "1 + 1 = ?", "response": "deux"},
    {"question": "1 + 1 = ?", "answer": "deux"},
    {"question": "1 + 1 = ?", "response": "deux"},
    {"conversation": [user("1 + 1 = ?"), answer("deux")]},
    {"instruction": "1 + 1 = ?", "output": "deux"},
    {"instruction": "1 + 1 = ?", "input": "", "output": "deux"},
    {"instruction": "1 + 1 = ?", "context": "", "response": "deux", "category": "sums"},
    {"content": "1 + 1 = ?", "summary": "deux"},
    {"input": "1 + 1", "prompt": " = ?", "output": "deux"},
    {"conversations": [{"from": "human", "value": "1 + 1 = ?"}, {"from": "gpt", "value": "deux"}]},
    {"conversations": [user("1 + 1 = ?"), answer("deux")]},
    {"prompt": [user("1 + 1 = ?")], "completion": [answer("deux")]},
    {"prompt": [user("1 + 1 = ?")], "completion": answer("deux")},
    {"prompt": [user("1 + 1 = ?")], "response": [answer("deux")]},
    {"input": "1 + 1 = ?", "output": "deux"},
    {"instruction": "", "input": "1 + 1 = ?", "output": "deux"},
    {"messages": [user([{"type": "text", "text": "1 + 1"}, {"type": "text", "text": " = ?"}]), answer("deux")]},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form))
def test_system_and_history_stand_before_every_form(form):
    assert turns(form) == QUESTION
    assert turns({**form, **SYSTEM}) == [("system", "Answer in French."), *QUESTION]
    assert turns({**form, "system": "", "history": [], "tools": "[]"}) == QUESTION
    earlier = [("user", "q"), ("assistant", "a")]
    for history in ([["q", "a"]], [user("q"), answer("a")]):
        assert turns({**form, **SYSTEM, "history": history}) == [("system", "Answer in French."), *earlier, *QUESTION]


def test_history_stands_behind_a_system_message_of_the_messages():
    for role in ("system", "developer"):
        document = {"messages": [{"role": role, "content": "s"}, user("b")], "history": [["q", "a"]]}
        assert turns(document) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "b")]


def test_a_system_message_that_is_there_twice_is_written_once():
    message = {"role": "system", "content": "Kind."}
    wanted = [("system", "Kind."), ("user", "a"), ("assistant", "b")]
    for beside in ({"system": "Kind."}, {"system_prompt": "Kind."}, {"history": [message]}):
        assert turns({**beside, "messages": [message, user("a"), answer("b")]}) == wanted
        assert turns({**beside, "messages": [user("a"), answer("b")]}) == wanted
    same = {"system": "a", "messages": [user("a"), answer("b")]}  # as the question, and no copy of it
    assert turns(same) == [("system", "a"), *wanted[1:]]


def test_what_is_left_out_or_has_no_text_is_counted(tmp_path, minicpm):
    path = tmp_path / "train.jsonl"

    def summary(*documents, **options):
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        return load_split(path, "train", minicpm, 64, **options).summary()

    said = summary({"messages": [user("a"), answer("b"), user("c")]}, {"messages": [user("a"), answer("b")]})
    assert "; 1 with messages after the last answer, which are left out" in said
    said = summary({"instruction": "a", "output": ""}, {"messages": [user("a"), answer(" ")]}, {"text": "a"})
    assert "; 2 with an empty answer, whose end alone is trained" in said
    said = summary({"prompt": "a", "chosen": "b", "rejected": ""}, pairs=True)
    assert "; 1 with an empty answer, whose end alone is trained" in said
    said = summary({"messages": [user("a"), answer("", weight=0), user("c"), answer("d")]})
    assert "empty" not in said and "left out" not in said


def test_an_input_stands_below_its_instruction():
    assert turns({"instruction": "Add.", "input": "1, 2", "output": "3"})[0] == ("user", "Add.\n1, 2")


def test_system_in_the_template(templated, minicpm):
    document = {**SYSTEM, "prompt": "Hello", "completion": "fox", "history": [["a", "b"]]}
    assert minicpm.decode(make_example(document, minicpm).ids) == "Answer in French.<用户>a<AI>b<用户>Hello<AI>fox"
    chatml = templated("chatml")
    messages = [
        {"role": "system", "content": "Answer in French."},
        user("a"),
        answer("b"),
        user("Hello"),
        answer("fox"),
    ]
    assert make_example(document, chatml).ids.tolist() == chatml.chat_example(messages)[0]


@pytest.mark.parametrize(
    "not_trained", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"train": 0}]
)
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_turn_that_is_not_to_be_trained(minicpm, templated, not_trained, form):
    def line(*turns):
        if form == "messages":
            return {"messages": list(turns)}
        names = {"user": "human", "assistant": "gpt"}
        return {
            "conversations": [
                {"from": names[t["role"]], "value": t["content"], **{k: t[k] for k in t.keys() - {"role", "content"}}}
                for t in turns
            ]
        }

    marked = answer("3", **not_trained)
    document = line(user("1 + 1 = ?", weight=0), marked, user("no", weight=None), answer("2", weight=1, train=None))
    assert trained(minicpm, document) == ["2</s>"]
    chatml = templated("chatml")
    assert trained(chatml, document) == ["2<|im_end|>"]
    plain = line(user("1 + 1 = ?"), answer("3"), user("no"), answer("2"))
    assert trained(chatml, plain) == ["3<|im_end|>", "2<|im_end|>"]
    assert make_example(plain, chatml).ids.tolist() == make_example(document, chatml).ids.tolist()
    last = line(user("a"), answer("b"), user("c"), answer("d", **not_trained))
    assert trained(minicpm, last) == ["b"]
    with pytest.raises(InputError, match="no answer to train"):
        make_example(line(user("a"), marked), minicpm)
    without = trained(chatml, line(user("a"), marked, user("b"), answer("2")), mask_prompt=False)
    assert "".join(
        without
    ) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n<|im_start|>user\nb<|im_end|>\n" + (
        "<|im_start|>assistant\n2<|im_end|>"
    )


def test_answers_of_a_prompt_are_not_trained_unless_it_says_so(minicpm):
    prompt = [user("a"), answer("b"), user("c")]
    assert trained(minicpm, {"prompt": prompt, "completion": "d"}) == ["d</s>"]
    weighted = [prompt[0], answer("b", weight=1), prompt[2]]
    assert trained(minicpm, {"prompt": weighted, "completion": "d"}) == ["b", "d</s>"]
    longer = [answer("d"), user("e"), answer("f")]
    assert trained(minicpm, {"prompt": prompt, "completion": longer}) == ["d", "f</s>"]


PAIR = [user("Hello"), answer("fox")], [user("Hello"), answer("a")]


@pytest.mark.parametrize(
    "document",
    [
        {"chosen": PAIR[0], "rejected": PAIR[1]},
        {"prompt": [user("Hello")], "chosen": [answer("fox")], "rejected": [answer("a", weight=1)]},
        {"instruction": "Hello", "input": "", "chosen": "fox", "rejected": "a"},
        {"question": "Hello", "chosen": "fox", "rejected": "a"},  # Intel's
        {"prompt": "Hello", "chosen": PAIR[0], "rejected": PAIR[1], "rating_chosen": 5, "rejected-model": "m"},
        {
            "prompt": "Hello",
            "prompt_id": "7",
            "chosen": PAIR[0],
            "rejected": PAIR[1],
            "messages": PAIR[0],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        },
    ],
)
@pytest.mark.parametrize("system", ["", "Kind."])
def test_pairs(minicpm, document, system):
    pair = make_pair({**document, "system": system}, minicpm)
    asked = f"{system}<用户>Hello<AI>"
    assert [minicpm.decode(part.ids) for part in pair.parts] == [asked + "fox", asked + "a"]
    assert pair.chosen.trained.sum() == len(minicpm.encode("fox", add_bos=False)) + 1


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"chosen": PAIR[0], "rejected": [user("Hi"), answer("a")]}, "do not begin with the same messages"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, "do not begin with the same messages"),
        ({"prompt": "a", "conversations": [user("a")], "chosen": "b", "rejected": "c"}, "more than one form"),
        ({"prompt": "a", "chosen": "b", "rejected": answer("c", weight=0)}, 'weight of 0 on message 1 of "rejected"'),
        ({"prompt": [answer("a", train=True)], "chosen": "b", "rejected": "c"}, "weight of 1 on message 0"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, 'it has "margin", which is not understood'),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": PAIR[0]}, 'it has "messages", which is not'),
    ],
)
def test_pairs_that_cannot_be_used(minicpm, document, said):
    with pytest.raises(InputError, match=said):
        make_pair(document, minicpm)


CHAT = {"messages": [user("Hello"), answer("fox")]}


def chat_with(**more):
    """`CHAT` with more keys in its answer."""
    return {"messages": [user("Hello"), answer("fox", **more)]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({**CHAT, "weight": 0.5}, 'it has "weight", which is not understood; remove it, or .* --ignore-keys weight.'),
        ({**CHAT, "train": False}, 'it has "train"'),
        (
            {**CHAT, "zz": 1, "y": 2, "x": 3, "w": 4, "v": 5},
            'it has "zz", "y", "x" and 2 more, which are not .* zz y x ...',
        ),
        ({**CHAT, "x" * 10_000: 1}, 'it has "xxxxx'),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools holds an item 0 that has no name; give"),
        ({**CHAT, "tools": '[{"type": "function"}]'}, "tools holds an item 0 that has no name; give"),
        ({**CHAT, "tools": "[{"}, 'its "tools" is not JSON'),
        ({**CHAT, "tools": [{"name": "f"}]}, "tools cannot be used: the model's chat template has no place for them"),
        ({**CHAT, "functions": [{"name": "f"}]}, 'it has "functions", which is an older form; write it as "tools"'),
        ({**CHAT, "images": ["a.png"]}, 'it has "images", which cannot be trained; only text is'),
        ({**CHAT, "prompt": "another"}, 'it has "prompt", which is not understood'),
        ({"text": "a", **SYSTEM}, 'it has "system", which is not understood'),
        ({"text": "a", "history": [["a", "b"]]}, 'it has "history"'),
        ({"prompt": "a", "completion": "b", "input": "c"}, 'it has "input"'),
        ({**CHAT, "system": ["a"]}, '"system" of type list'),
        ({**SYSTEM, "messages": [{"role": "system", "content": "b"}, user("a")]}, '"system" and a system message'),
        ({**SYSTEM, "system_prompt": "b", **CHAT}, '"system" and "system_prompt", which differ'),
        ({**SYSTEM, "history": [{"role": "system", "content": "b"}], **CHAT}, 'and a system message in "history"'),
        ({**CHAT, "custom_instruction": "Be brief."}, 'it has "custom_instruction"'),
        ({"instruction": "a", "output": "b", "text": "c"}, "more than one form"),
        ({}, "it has no keys; give messages"),
        ({**CHAT, "history": [["a"]]}, '"history" whose item 0 is no pair'),
        ({**CHAT, "history": [["a", None]]}, '"history" whose item 0 is no pair'),
        ({**CHAT, "history": "a"}, "must be a list"),
        (chat_with(loss_weight=0), 'message 1 has "loss_weight", which is not understood'),
        (chat_with(trainable=False), 'message 1 has "trainable"'),
        (chat_with(mask=1), 'message 1 has "mask"'),
        (chat_with(name="Ann"), 'message 1 has "name"'),
        (chat_with(weight=0.5), r'message 1 has "weight": 0.5; a message is trained \(1, true\) or not \(0, false\)'),
        (chat_with(weight="0"), 'message 1 has "weight": "0"; a message'),
        (chat_with(loss=2), 'message 1 has "loss": 2'),
        (chat_with(weight=float("nan")), 'message 1 has "weight": NaN'),
        (chat_with(weight=1, train=False), 'message 1 has "weight" and "train", which say different things'),
        (chat_with(reasoning_content="r"), "1 has a thought beside its content, .* no place for it; write it into the"),
        (chat_with(thought="r", thinking="s"), 'message 1 has "thought" and "thinking", which differ'),
        (chat_with(tool_calls=[{"id": "a"}]), 'call 0 of message 1 has no "name"'),
        (chat_with(tool_calls=[{"name": "f", "arguments": "[]"}]), r"the arguments of call 0 of message 1 are \[...\]"),
        (chat_with(tool_calls=[{"name": "f"}]), "message 1 has tool_calls, for which the model's chat template has no"),
        ({"messages": [user("a", reasoning="b"), answer("c")]}, 'message 0 has "reasoning", which only an answer can'),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "0 is the result of a tool, and the message before it has no",
        ),
        ({"messages": [{"role": "function", "content": "a"}]}, "message 0 has the role 'function'"),
        ({"messages": [{"role": "x" * 9999, "content": "a"}]}, "message 0 has the role 'xxxx"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "message 0 is the result of a tool, and the"),
        ({"conversations": [{"from": "gpt", "value": "a", "role": "user"}]}, 'message 0 has "role"'),
        ({"messages": [user("a", weight=1), answer("b")]}, 'message 0 has "weight": 1, and is no answer'),
        ({"messages": [user([{"type": "image_url", "image_url": "a"}]), answer("b")]}, "a part of type 'image_url'"),
        (
            {"messages": [user([{"type": "text", "text": "a", "cache": 1}]), answer("b")]},
            'a part of message 0 has "cache"',
        ),
        ({"messages": [user([{"type": "text"}]), answer("b")]}, '"text" is no string'),
        ({"messages": [user(["a"]), answer("b")]}, "a part of type 'a'"),
        ({"messages": ["a"]}, 'message 0 must have a "role"'),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_its_name(minicpm, document, said):
    with pytest.raises(InputError, match=said) as caught:
        make_example(document, minicpm)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "document",
    [
        {**CHAT, "id": 7, "source": "web", "metadata": {"a": 1}, "level": "easy"},
        {**CHAT, "tools": None, "images": [], "anything": {}, "unknown": ""},
        {**CHAT, "tools": " [] ", "functions": "null", "text": None},
        {**CHAT, "tools": "[ ]", "functions": " { }"},
        {**CHAT, "prompt": "Hello ", "prompt_id": "a"},  # UltraChat's
        {**CHAT, "problem": "Hello", "solution": "fox"},  # NuminaMath's
        {"instruction": "Hello", "input": "", "output": "fox", "text": "### Instruction:\nHello\n### Response:\nfox"},
        {"instruction": "Hello", "input": "a", "output": "fox", "prompt": "### Hello\na\n### fox"},
        {
            "conversations": [{"from": "human", "value": "Hello"}, {"from": "chatgpt", "value": "fox"}],
            "custom_instruction": False,
            "skip_prompt_formatting": True,
            "title": "a",
            "model_name": "b",
            "system_prompt": None,
            "views": 1,
        },  # OpenHermes'
        {"query": "Hello", "response": "fox", "type": "a", "original_question": "b"},  # MetaMathQA's
        chat_with(id=3, name=None, tool_calls=[], reasoning_content=None, weight=None),
    ],
)
def test_what_says_nothing_and_notes_are_no_error(minicpm, document):
    assert trained(minicpm, document) == ["fox</s>"]


def test_keys_that_the_user_has_passed_over(tmp_path, minicpm, capsys):
    line = {**chat_with(name="Ann", weight=0), "text": "other", "score": 3, "id": 1}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(
        InputError, match=r"train.jsonl, line 1: it has the keys messages and text, which are more than one form"
    ):
        load_split(path, "train", minicpm, 64)
    with pytest.raises(InputError, match=r'train.jsonl, line 1: message 1 has "name"'):
        load_split(path, "train", minicpm, 64, ignore_keys=["text", "score"])
    split = load_split(path, "train", minicpm, 64, ignore_keys=["text", "score", "name", "weight", "content"])
    assert "not read: text, score, id and 2 more" in split.summary()
    assert split.examples[0].trained.sum() == 2


def test_tokens_of_the_vocabulary_are_real_ids_in_the_users_own_data(minicpm, templated):
    for tokenizer in (minicpm, templated("chatml")):
        for token in ("<vul_start>", "<|sql|>", "<plain_added>", "</s>", "<|im_end|>"):
            lines = [
                {"prompt": "find it", "completion": f"a{token}b"},
                {"messages": [user(f"a{token}b"), answer("c")]},
                {"prompt": "a", "completion": "b", "system": token},
                {"text": f"a{token}b"},
            ]
            i = tokenizer.token_to_id(token)
            for line in lines:
                found, as_text = (make_example(line, tokenizer, trusted=trusted) for trusted in (True, False))
                more = found.ids.tolist().count(i) - as_text.ids.tolist().count(i)
                assert more == (0 if token == "<plain_added>" else 1), (token, line)  # which is text to no tokenizer
                assert i in found.ids
                whole = [tokenizer.decode(e.ids, skip_special_tokens=False).replace(" ", "") for e in (found, as_text)]
                assert whole[0] == whole[1]
            asked = [user(token)]
            assert tokenizer.apply_chat(asked, trusted=True) != tokenizer.apply_chat(asked) or token == "<plain_added>"
            pair = make_pair({"prompt": "a", "chosen": token, "rejected": "b"}, tokenizer)
            assert i in pair.chosen.ids[pair.chosen.trained]


def test_an_end_that_the_answer_spells_is_not_written_twice(minicpm):
    assert trained(minicpm, {"prompt": "a", "completion": "b</s>"}) == ["b</s>"]
    assert trained(minicpm, {"prompt": "a</s>", "completion": ""}) == ["</s>"]


THOUGHT = "<think>\nr1\n</think>\n\na1"


@pytest.mark.parametrize("name", ["minicpm5_1b", "minicpm5_2b", "chatml"])
@pytest.mark.parametrize("content", [THOUGHT, "<think>r1</think>a1", "<think>\n\nr1</think>\na1", "r1</think>a1"])
def test_a_thought_is_trained_with_its_answer(templated, name, content):
    tokenizer = templated(name)
    example = make_example({"messages": [user("q1"), answer(content)]}, tokenizer)
    written = content if name == "chatml" else THOUGHT
    before = "<s>" * (name != "chatml") + "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert example.ids.tolist() == tokenizer.encode(f"{before}{written}<|im_end|>")
    prompt = tokenizer.apply_chat([user("q1")])
    assert example.ids.tolist()[: len(prompt)] == prompt
    assert example.trained.tolist() == [False] * len(prompt) + [True] * (len(example.ids) - len(prompt))
    assert ("<think>" not in written) or ID["<think>"] in example.ids[example.trained]


def test_an_earlier_thought_is_as_the_template_has_it(templated):
    document = {"messages": [user("q1"), answer(THOUGHT), user("q2"), answer("<think>\nr2\n</think>\n\na2 ")]}
    last = "<think>\nr2\n</think>\n\na2<|im_end|>"
    assert trained(templated("minicpm5_1b"), document) == ["a1<|im_end|>", last]
    assert trained(templated("minicpm5_2b"), document) == [THOUGHT + "<|im_end|>", last]
    document["messages"][1]["weight"] = 0
    for name in ("minicpm5_1b", "minicpm5_2b"):
        assert trained(templated(name), document) == [last]


def test_an_answer_without_a_thought(templated):
    """The empty one that a template writes stands in the prompt of a model that is not to think: it is not trained."""
    document = {"messages": [user("q1"), answer(THOUGHT), user("q2"), answer("\na2")]}
    assert trained(templated("minicpm5_1b"), document)[1] == "\na2<|im_end|>"
    tokenizer = templated("minicpm5_2b")
    assert trained(tokenizer, document) == [THOUGHT + "<|im_end|>", "a2<|im_end|>"]
    ids = make_example(document, tokenizer).ids.tolist()
    prompt = tokenizer.apply_chat(document["messages"][:3], variables={"enable_thinking": False})
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("content", ["a</think>b</think>c", "lost <think>r</think>a"])
@pytest.mark.parametrize("name", ["minicpm5_1b", "minicpm5_2b"])
def test_a_template_that_loses_part_of_an_answer(templated, name, content):
    for messages in ([user("q"), answer(content)], [user("q"), answer(content), user("q"), answer("a")]):
        with pytest.raises(InputError, match="leaves out, reorders or rewrites"):
            make_example({"messages": messages}, templated(name))


def test_a_last_thought_that_the_template_leaves_out(tmp_path):
    """As DeepSeek's does."""
    template = "{% for m in messages %}{{ m.role + m.content.split('</think>')[-1] }}{% endfor %}"
    tokenizer = load_tokenizer(tiny.write(tmp_path, chat_template=template))
    with pytest.raises(InputError, match="leaves out, reorders or rewrites"):
        make_example({"messages": [user("q1"), answer(THOUGHT)]}, tokenizer)


def test_pretraining_reads_the_same_lines(minicpm, templated):
    assert minicpm.decode(pretraining_ids(minicpm, {**SYSTEM, "prompt": "a", "completion": "b"})) == (
        "Answer in French.<用户>a<AI>b"
    )
    ids = pretraining_ids(templated("minicpm5_2b"), {"messages": [user("q1"), answer(THOUGHT)]})
    assert ID["<think>"] in ids
    assert ID["<|sql|>"] in pretraining_ids(minicpm, {"text": "<|sql|>"})
    assert ID["<|sql|>"] not in pretraining_ids(minicpm, {"text": "<|sql|>"}, trusted=False)


def first_shown(tmp_path, tokenizer, capsys, line, **options):
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    show_first(load_split(tmp_path, "train", tokenizer, 4096, **options), tokenizer)
    return capsys.readouterr().out.splitlines()


def test_the_first_example_is_shown_with_what_is_trained(tmp_path, templated, capsys):
    document = {"messages": [user("q\x1b[31m1"), answer("a1", weight=0), user("q2"), answer("a2\nb<|sql|>")]}
    assert first_shown(tmp_path, templated("chatml"), capsys, document) == [
        'the first example of train.jsonl as the model sees it ("+" is trained):',
        "    <s><|im_start|> user\\n",
        "    q\ufffd[31m1<|im_end|> \\n",
        "    <|im_start|> assistant\\n",
        "    a1<|im_end|> \\n",
        "    <|im_start|> user\\n",
        "    q2<|im_end|> \\n",
        "    <|im_start|> assistant\\n",
        "  + a2\\n",
        "  + b<|sql|><|im_end|>",
        f"    (57 tokens, 6 trained; added tokens: <s> = 1, <|im_start|> = {ID['<|im_start|>']}, <|im_end|> = "
        f"{ID['<|im_end|>']}, <|sql|> = {ID['<|sql|>']})",
    ]


def test_what_is_shown_is_bounded(tmp_path, minicpm, capsys):
    document = {"prompt": "fox " * 600, "completion": "dog\n" * 600}
    lines = first_shown(tmp_path, minicpm, capsys, document)
    assert len(lines) <= 64 and sum(map(len, lines)) < 3000
    assert "characters more)" in lines[1] and "lines more)" in "".join(lines)
    many = {"messages": [user("Hello"), answer("fox")] * 100}
    assert len(first_shown(tmp_path, minicpm, capsys, many)) <= 64


def test_both_answers_of_the_first_pair_are_shown(tmp_path, minicpm, capsys):
    lines = first_shown(tmp_path, minicpm, capsys, {"prompt": "q", "chosen": "a", "rejected": "b"}, pairs=True)
    assert lines[0].startswith("the first chosen answer of train.jsonl") and lines[2] == "  + a</s>"
    assert lines[4].startswith("the first rejected answer") and lines[6] == "  + b</s>"


def test_a_turn_says_whether_it_is_trained():
    assert [Turn(role, "a").trained() for role in ("system", "user", "assistant")] == [False, False, True]
    assert [Turn(role, "a").trained(mask_prompt=False) for role in ("system", "user", "assistant")] == [True] * 3
    assert not Turn("assistant", "a", asked=True).trained() and not Turn("assistant", "a", weight=False).trained(False)
