"""The corpus of pico: the same every time, right in what it says, and silent about what is held out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented_commands import typed

from minicpm_data import corpus, load_tokenizer, vocabulary
from minicpm_data.pico_corpus import facts
from minicpm_data.pico_corpus.skills import held_out, reversed_row
from minicpm_data.tokenizer.chat_template import MINICPM_TEMPLATE
from weights_io.errors import InputError

N = r"(\d+)"
# Every way in which the corpus can name a sum: pattern, operation, whether the second number comes first.
SPOKEN = [
    (rf"{N} ?\+ ?{N}", "+", False),
    (rf"{N} ?- ?{N}", "-", False),
    (rf"{N} plus {N}", "+", False),
    (rf"{N} (?:minus|take away) {N}", "-", False),
    (rf"(?:Add|sum of) {N} and {N}", "+", False),
    (rf"difference between {N} and {N}", "-", False),
    (rf"Subtract {N} from {N}", "-", True),
    (rf"{N}加上?{N}", "+", False),
    (rf"{N}减去?{N}", "-", False),
    (rf"has {N} apples\. He gets {N}", "+", False),
    (rf"has {N} books and Ben has {N}", "+", False),
    (rf"有{N}个苹果，妈妈又给他{N}", "+", False),
    (rf"has {N} apples\. He gives away {N}", "-", False),
    (rf"are {N} birds in a tree\. {N}", "-", False),
    (rf"有{N}个苹果，吃了{N}", "-", False),
]


def pairs_in(text: str) -> list[tuple[str, int, int]]:
    found = []
    for pattern, op, swapped in SPOKEN:
        for match in re.finditer(pattern, text):
            a, b = map(int, match.groups())
            found.append((op, b, a) if swapped else (op, a, b))
    return found


def text_of(document: dict) -> str:
    if "text" in document:
        return document["text"]
    return "\n".join(message["content"] for message in document["messages"])


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return [corpus.document(i, 0, stage) for stage in corpus.STAGES for i in range(4000)]


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return [text_of(document) for document in documents]


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return list(corpus.questions())


def test_a_document_depends_on_nothing_but_its_place(documents):
    assert corpus.document(3000) == documents[3000]
    assert corpus.document(3000, seed=1) != documents[3000] != corpus.document(3000, split="valid")
    assert all("text" in document for document in documents[:4000])
    chats = sum("messages" in document for document in documents[4000:])
    assert 2600 < chats < 3000


def test_another_process_writes_the_same():
    code = "from minicpm_data import corpus; print([corpus.document(i, 0, 'decay') for i in range(50)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([corpus.document(i, 0, "decay") for i in range(50)])


def test_no_held_out_sum_is_in_any_document(texts):
    pairs = [pair for text in texts for pair in pairs_in(text)]
    assert len(set(pairs)) > 8000
    assert not [pair for pair in pairs if held_out(*pair)]


def test_a_tenth_is_held_out_with_its_exchange():
    every = [("+", a, b) for a in range(100) for b in range(100)]
    share = sum(held_out(*pair) for pair in every) / len(every)
    assert 0.08 < share < 0.12
    assert all(held_out("+", a, b) == held_out("+", b, a) for _, a, b in every)


def test_every_equation_is_right(texts):
    seen = 0
    for text in texts:
        for a, op, b, c in re.findall(r"(\d+) ?([+-]) ?(\d+) ?= ?(\d+)", text):
            seen += 1
            assert int(c) == (int(a) + int(b) if op == "+" else int(a) - int(b))
        for a, word, b, c in re.findall(r"(\d+) ?(plus|minus|take away|加|减) ?(\d+)(?: is |等于)(\d+)", text):
            assert int(c) == (int(a) + int(b) if word in ("plus", "加") else int(a) - int(b))
    assert seen > 5000


def test_every_reply_to_a_sum_restates_it(documents):
    asked = 0
    for document in documents[4000:]:
        messages = document.get("messages", [])
        for question, reply in zip(messages[::2], messages[1::2], strict=True):
            for op, a, b in pairs_in(question["content"]):
                asked += 1
                assert reply["content"] == f"{a} {op} {b} = {a + b if op == '+' else a - b}"
            if row := re.search(r"(?:Reverse|backwards|Reverse the order|倒过来)[:：] ?(.+)", question["content"]):
                assert reply["content"] == reversed_row(row[1])
                assert not held_out("reverse", row[1], "")
    assert asked > 500


def test_held_out_counting_is_in_no_document(texts):
    ways = {"Count from": "up", "Count up from": "up", "count from": "up", "Count down from": "down"}
    pattern = r"(Count from|Count up from|count from|Count down from) (\d+) to (\d+)\.\s(.*)"
    spans = [match for text in texts for match in re.findall(pattern, text)]
    assert len(spans) > 300
    for way, a, b, numbers in spans:
        a, b = int(a), int(b)
        assert not held_out(ways[way], a, b)
        assert numbers == ", ".join(map(str, range(a, b + 1) if a < b else range(a, b - 1, -1)))


def test_questions_are_new_and_have_one_answer(questions, texts):
    kinds = [question["kind"] for question in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == corpus.QUESTIONS
    lines = {line for text in texts for line in text.split("\n")}
    for question in questions:
        assert question["prompt"] not in lines
        if question["kind"] == "sum":
            [(op, a, b)] = pairs_in(question["prompt"])
            assert held_out(op, a, b) and question["answer"] == str(a + b if op == "+" else a - b)


def test_no_question_form_has_two_answers():
    answers = {}
    for fact in [*(fact for family in facts.families() for fact in family), *facts.translations()]:
        for asked in fact.questions:
            assert answers.setdefault(asked, fact.answer) == fact.answer, asked
        assert fact.statement.rstrip(".。").lower().endswith(fact.answer.lower())


@pytest.mark.parametrize(
    ("kind", "answer", "reply", "right"),
    [
        ("sum", "19", "12 + 7 = 19", True),
        ("sum", "19", "12 + 7 = 19.", True),
        ("sum", "19", "12 + 7 = 191", False),
        ("sum", "19", "19 = 12 + 7", False),
        ("sum", "5", "12 - 7 = -5", False),
        ("sum", "5", "It is 2.5", False),
        ("sum", "19", "I do not know.", False),
        ("fact", "Paris", "The capital of France is Paris.", True),
        ("fact", "Paris", "the capital is  paris", True),
        ("fact", "Paris", "The capital is not Paris but Lyon.", False),
        ("fact", "green", "Grass is evergreen.", False),
        ("fact", "巴黎", "法国的首都是巴黎。", True),
        ("fact", "巴黎", "巴黎在欧洲。", False),
        ("translation", "猫", "猫", True),
        ("translation", "猫", "熊猫", False),
        ("count", "3, 4, 5", "3, 4, 5", True),
        ("count", "3, 4, 5", "3, 4, 5, 6", False),
        ("reverse", "t a c", "t a c ", True),
        ("reverse", "t a c", "c a t", False),
    ],
)
def test_is_right(kind, answer, reply, right):
    assert corpus.is_right({"prompt": "", "answer": answer, "kind": kind}, reply) is right


def command(module: str, *arguments: object) -> subprocess.CompletedProcess:
    return typed(f"minicpm_data.{module}", *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "data"
    written = command("corpus", "--save-path", out, "--documents", 1500)
    assert written.returncode == 0, written.stderr
    return out


def test_the_command_writes_the_splits(data):
    files = sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file())
    splits = [f"{stage}/{split}.jsonl" for stage in ("decay", "stable") for split in ("train", "valid")]
    assert files == sorted(["questions.jsonl", *splits])
    first = json.loads((data / "stable/train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == corpus.document(0)


def test_the_command_refuses_what_it_cannot_do(data, tmp_path):
    for arguments in (
        ["--save-path", data],
        ["--save-path", tmp_path / "new", "--documents", 0],
        ["--documents", 5],
        ["--what"],
    ):
        refused = command("corpus", *arguments)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "new").exists()


def test_the_vocabulary_is_of_minicpm_kind(data, tmp_path, texts):
    import sentencepiece

    made = command("vocabulary", "--data", data, "--save-path", tmp_path, "--vocab-size", 1600)
    assert made.returncode == 0, made.stderr
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "\n", "<0x00>"]
    assert pieces.get_piece_size() == 1600
    assert pieces.encode("12+7", out_type=str) == ["1", "2", "+", "7"]
    assert pieces.encode("猫<AI>c", out_type=str) == ["猫", "<", "AI", ">", "c"]
    for text in texts[:300]:
        assert pieces.decode(pieces.encode(text)) == text
    from_model = tmp_path / "only_model"
    from_model.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (from_model / name).write_bytes((tmp_path / name).read_bytes())
    tokenizer, same = load_tokenizer(tmp_path), load_tokenizer(from_model)
    for text in texts[::20]:
        ids = tokenizer.encode(text)
        assert ids == same.encode(text) == [1, *pieces.encode(" " + text)]
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat([{"role": "user", "content": "Hi!"}])
    assert chat[0] == 1 and pieces.decode(chat[1:]) == " <用户>Hi!<AI>"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["chat_template"] == MINICPM_TEMPLATE


def test_the_vocabulary_refuses_a_wrong_size_and_a_missing_corpus(data, tmp_path):
    for arguments in (
        ["--data", data, "--vocab-size", 300],
        ["--data", tmp_path],
        ["--data", data, "--vocab-size", 90_000],
        ["--data", data, "--documents", 0],
    ):
        refused = command("vocabulary", *arguments, "--save-path", tmp_path / "out")
        assert refused.returncode == 2 and "error: " in refused.stderr, refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "holds no text"),
        (b'{"text": " "}', "holds no text"),
        (b'{"text": "' + b"a" * 5000 + b'"}', "SentencePiece cannot train"),  # which leaves out such long lines
        (b"{", "line 2 ends before its JSON does"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        ('{"text": "é"}'.encode("latin-1"), "line 2 is not UTF-8 text"),
        (b"[]", "line 2 is not an object"),
        (b'{"text": 5}', 'line 2: it has a "text" of type int'),
        (b"{}", "line 2: it has no keys; give messages"),
        (b'{"text": "a", "weight": 2}', 'line 2: it has "weight", which is not understood'),
        (b'{"text": "a", "text": "b"}', 'line 2 has the key "text" twice'),
        (b'{"text": "\\ud83d"}', "line 2 has a lone surrogate"),
        (b'{"messages": []}', "line 2: messages must be a list"),
        (b'{"messages": [{"role": "user"}]}', "line 2: message 0 must have"),
        (b'{"messages": [{"role": "robot", "content": "Hi!"}]}', "line 2: message 0 has the role 'robot'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_vocabulary_refuses_a_corpus_that_is_empty_or_wrong(tmp_path, line, said):
    for stage in corpus.STAGES:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "train.jsonl").write_bytes(b"\n" + line + b"\n")
    with pytest.raises(InputError, match=said) as caught:
        vocabulary.main(vocabulary.Options(tmp_path, tmp_path / "out", vocab_size=300))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_system_message_has_no_marker():
    chat = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}]}
    assert vocabulary.parts_of(chat) == [" Be kind.", "<用户>", "Hi!"]


def test_a_chat_is_cut_at_its_markers():
    chat = {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}
    assert vocabulary.parts_of(chat) == [" <用户>", "Hi!", "<AI>", "Hello!"]
