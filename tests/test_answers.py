"""Where an answer begins and ends, with a backend that says what it is told to: the calls and their command lines."""

import dataclasses
import importlib
import json
import os
import re
import select
import sys
import termios
import types
from unittest import mock

import numpy as np
import pytest
import tiny_tokenizer as tiny
from documented_commands import ROOT
from tiny_training import BACKENDS

from minicpm_data import corpus, load_tokenizer
from minicpm_data.cli import evaluate, generate, terminal, wrapping
from minicpm_data.generation.api import Backend, Generator, Warming
from minicpm_data.generation.responses import Response
from minicpm_data.sampling_defaults import ChatSampling
from weights_io.built_in import built_in
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError


class Parrot:
    """A backend whose model answers ``says`` whatever it is asked; ``asked`` keeps the prompts."""

    def __init__(self, says, **tokenizer):
        self.says, self.asked, self.loaded = says, [], {}
        self.device = importlib.import_module(f"{tokenizer.pop('backend', BACKENDS[0])}.device")
        self.folder, self.config = tokenizer.pop("folder"), tokenizer
        self.tokenizer = load_tokenizer(tiny.write(self.folder, **tokenizer))
        self.model = types.SimpleNamespace(config=ModelConfig(vocab_size=self.tokenizer.vocab_size), eos_token_ids=(2,))
        self.generator = Generator(self)

    def check(self, model, request):
        pass

    def warming(self, model):
        return Warming()

    def stream_tokens(self, model, request):
        self.asked += map(list, request.prompts)
        self.request = request
        for i in (*self.tokenizer.encode(self.says, add_bos=False), 2):
            yield np.array([i] * len(request.prompts))

    def stream_speculated(self, model, request, speculation):
        self.speculation = speculation
        for ids in self.stream_tokens(model, request):
            yield int(ids[0]), True

    def load(self, path, dtype, **options):
        checkpoint = dataclasses.replace(open_checkpoint(built_in()), dtype="bfloat16")
        self.loaded = {"path": path, "dtype": checkpoint.target(dtype), **options}
        return self.model, self.tokenizer

    def backend(self):
        device = types.SimpleNamespace(
            preferred_dtype=self.device.preferred_dtype,
            compile_seconds=lambda: 0.0,
            peak_memory=lambda: 0,
            warn_idle_axes=lambda model, rows: None,
            description=lambda: "a perch",
            is_first=lambda: True,
        )
        return Backend(self.load, self.generator, device, lambda model: model, lambda model, ids: [])


@pytest.fixture
def parrot(tmp_path):
    return lambda says, **tokenizer: Parrot(says, folder=tmp_path, **tokenizer)


@pytest.fixture
def typed(monkeypatch, capsys):
    """``typed(run_generate, parrot, "--prompt", "Hello")``: exit code, standard output and error."""

    def call(run, parrot, *arguments):
        monkeypatch.setattr("sys.argv", ["prog", *arguments])
        try:
            run(parrot.backend, "prog")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def thinking(name="minicpm5_1b"):
    """A chat template that thinks."""
    return {"chat_template": (ROOT / "tests/reference/chat" / name / "chat_template.jinja").read_text("utf-8")}


def chatml(**more):
    n = tiny.sentencepiece_model().get_piece_size()
    added = {str(n): tiny.special("<|im_end|>"), str(n + 1): tiny.special("<|im_start|>")}
    return {"added_tokens_decoder": added, "chat_template": tiny.CHATML, **more}


@pytest.mark.parametrize("marker", ["<用户>", "<AI>"])
def test_a_reply_ends_where_the_model_begins_another_turn(parrot, marker):
    bird = parrot(f"The fox.\n{marker}And the dog?<用户><AI>")
    reply, history = bird.generator.chat(bird.model, bird.tokenizer, "Hello")
    assert reply == history[-1]["content"] == "The fox."
    reply, _ = bird.generator.chat(bird.model, bird.tokenizer, "Hello", stop="fox")
    assert reply == "The"
    reply, _ = bird.generator.chat(bird.model, bird.tokenizer, "Hello", stop=["sea", "."])
    assert reply == "The fox"


def test_markers_are_text_where_the_template_has_none(parrot):
    bird = parrot("The <AI> fox", **chatml())
    assert bird.generator.chat(bird.model, bird.tokenizer, "Hello")[0] == "The <AI> fox"


def test_the_command_ends_at_a_marker_of_the_template(parrot, typed):
    bird = parrot("The fox.<用户>And the dog?")
    assert typed(generate.run_generate, bird, "--verbose", "False")[:2] == (0, "The fox.\n")
    raw = typed(generate.run_generate, bird, "--verbose", "False", "--ignore-chat-template")
    assert raw[1] == "The fox.<用户>And the dog?\n"


def test_the_command_says_how_many_tokens_were_guessed(parrot, typed):
    bird = parrot("The fox.")
    code, out, error = typed(generate.run_generate, bird, "--draft-model", "pico", "--num-draft-tokens", "5")
    assert (code, out) == (0, "The fox.\n") and re.search(r"\nGuessed: (\d+) of \1 tokens\n", error)
    assert bird.loaded["path"].path == built_in() and bird.speculation.draft_model is bird.model
    assert bird.speculation.num_draft_tokens == 5
    assert typed(generate.run_generate, bird, "--prompt-lookup")[1] == out and bird.speculation.prompt_lookup
    code, out, error = typed(generate.run_generate, bird, "--prompt-lookup", "--num-draft-tokens", "0")
    assert (code, out, error) == (2, "", "error: --num-draft-tokens is 0; it must be a whole number from 1 to 64.\n")


def test_the_terminal_chat_ends_at_a_marker_and_remembers_what_it_showed(parrot, typed, monkeypatch):
    bird = parrot("The fox.<用户>And the dog?")
    lines = iter(["Hello", "world"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    assert typed(generate.run_chat, bird)[:2] == (0, "The fox.\nThe fox.\n")
    assert bird.tokenizer.decode(bird.asked[1]) == "<用户>Hello<AI>The fox.<用户>world<AI>"


@pytest.mark.parametrize("wrong", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "a\ud83d"])
@pytest.mark.parametrize("person", [True, False])
def test_a_question_that_is_no_text(parrot, typed, monkeypatch, person, wrong):
    """A person can type another; a file is refused."""
    bird = parrot("The fox.")
    lines = iter([wrong, "Hello"])

    def read():
        line = next(lines, "/quit")
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr(terminal, "asker", lambda: read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: person, raising=False)
    code, out, error = typed(generate.run_chat, bird)
    assert (code, out) == ((0, "The fox.\n") if person else (2, ""))
    assert error.startswith("error: ") and error.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_keeps_what_was_shown(parrot, typed, monkeypatch):
    bird = parrot("The fox and the dog")
    says, lines = bird.stream_tokens, iter(["Hello", "world", "The sea"])

    def interrupted(*arguments):
        """After two tokens of the first answer, before the first of the second."""
        left = {0: 2, 1: 0}.get(len(bird.asked), 99)
        for token in says(*arguments):
            if not left:
                raise KeyboardInterrupt
            left -= 1
            yield token

    bird.stream_tokens = interrupted
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    code, out, _ = typed(generate.run_chat, bird)
    assert code == 0
    first, second, third, _ = out.split("\n")
    assert "The fox and the dog".startswith(first) and second == "" and third == "The fox and the dog"
    assert bird.tokenizer.decode(bird.asked[-1]) == f"<用户>Hello<AI>{first}<用户>The sea<AI>"


def test_what_begins_with_a_slash(parrot, typed, monkeypatch, tmp_path):
    bird, kept = parrot("The fox."), tmp_path / "kept.jsonl"
    lines = iter([f"/save {kept}", "/system The sea.", "Hello", f"/save {kept}", "/reset", "world", "/system", "Hello"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, out, error = typed(generate.run_chat, bird)
    assert code == 0 and "(3 messages added to" in out and "no answer to save yet" in error
    asked = [bird.tokenizer.decode(ids) for ids in bird.asked]
    assert asked == ["The sea.<用户>Hello<AI>", "The sea.<用户>world<AI>", "<用户>Hello<AI>"]
    roles = [message["role"] for message in json.loads(kept.read_text(encoding="utf-8"))["messages"]]
    assert roles == ["system", "user", "assistant"]
    said = ["(begun anew with this system message)", "(the conversation is forgotten)", "(begun anew with no system"]
    assert all(line in out for line in said)


@pytest.mark.parametrize(("answer", "person"), [("y", True), ("n", True), ("Hello", True), (None, False)])
def test_a_file_of_somebody_else_is_added_to_only_if_the_user_says_so(
    parrot, typed, monkeypatch, tmp_path, answer, person
):
    """Asked once a file; what is in it stays, and its last line gets its end. Nobody can be asked through a pipe."""
    bird, kept = parrot("The fox."), tmp_path / "kept.jsonl"
    kept.write_text('{"mine": 1}')
    again = [] if answer == "y" else [answer]
    lines = iter(["Hello", f"/save {kept}", answer, f"/save {kept}", *again, f"/save {tmp_path / 'new.jsonl'}"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: person, raising=False)
    code, out, error = typed(generate.run_chat, bird)
    found = kept.read_text(encoding="utf-8").splitlines()
    if not person:
        assert code == 2 and "kept.jsonl is there already, and this conversation did not write it; choose" in error
    else:
        assert code == 0 and out.count("kept.jsonl is there already") == (1 if answer == "y" else 2)
        assert "2 messages added to" in out and (tmp_path / "new.jsonl").exists()
    assert found[0] == '{"mine": 1}' and len(found) == (3 if answer == "y" else 1)
    assert all(json.loads(line)["messages"] for line in found[1:])


def test_no_conversation_goes_into_what_is_no_file(tmp_path):
    conversation = terminal.Conversation(None)
    conversation.messages = [{"role": "assistant", "content": "Hello"}]
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "is no file"), (".", "is no file"), ("none/kept.jsonl", "cannot be written")):
        with pytest.raises(InputError, match=said):
            conversation.save(tmp_path / name)
    for name in ("~nobody-of-this-name/kept.jsonl", "a\0b"):
        with pytest.raises(InputError, match="cannot be written .*; choose another file"):
            conversation.command(f"/save {name}")
    (tmp_path / "empty").touch()
    assert "1 messages added" in conversation.save(tmp_path / "empty")


def test_a_file_that_was_replaced_is_somebody_elses(tmp_path):
    conversation = terminal.Conversation(None)
    conversation.messages = [{"role": "assistant", "content": "Hello"}]
    path = tmp_path / "kept.jsonl"
    for _ in range(2):
        conversation.save(path)
    for content in (path.read_text() + "mine\n", "mine\n"):
        path.write_text(content)
        with pytest.raises(InputError, match="this conversation did not write it; choose another file"):
            conversation.save(path)
        assert path.read_text() == content


def test_a_terminal_sees_no_control_characters(monkeypatch, capsys):
    """Of an answer, which is kept as it is; the help fits a narrow terminal."""
    answer = [Response("a\x1b[2J\tb", 1), Response("\x07\x9b\u202e\n中", 2)]
    assert terminal.printed(answer) == "a\x1b[2J\tb\x07\x9b\u202e\n中"
    assert capsys.readouterr().out == "a\x1b[2J\tb\x07\x9b\u202e\n中\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.printed(answer)
    assert capsys.readouterr().out == "a\ufffd[2J\tb\ufffd\ufffd\ufffd\n中\n"
    assert max(map(len, terminal.HELP.splitlines())) <= 60


def test_a_second_ctrl_c_does_not_end_the_program(parrot, typed, monkeypatch):
    """One that comes when the answer has ended, before the next question."""
    bird, lines = parrot("The fox."), iter(["Hello", "world"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    notes = iter([KeyboardInterrupt])

    def note(*_):
        if (pressed := next(notes, None)) is not None:
            raise pressed

    monkeypatch.setattr(generate, "note_context", note)
    assert typed(generate.run_chat, bird)[:2] == (0, "The fox.\n\nThe fox.\n")
    assert bird.tokenizer.decode(bird.asked[1]) == "<用户>Hello<AI>The fox.<用户>world<AI>"


def test_a_question_without_an_answer_is_forgotten(parrot, typed, monkeypatch):
    bird = parrot("")
    lines = iter(["Hello", "world"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    assert typed(generate.run_chat, bird)[0] == 0
    assert bird.tokenizer.decode(bird.asked[1]) == "<用户>world<AI>"


@pytest.mark.parametrize(
    "flags",
    [("--stop", "sea", "--stop", "dog"), ("--stop", "dog", "--stop", "sea"), ("--stop", "sea", "dog"), ("--stop=dog",)],
)
def test_every_stop_counts(parrot, typed, flags):
    bird = parrot("The fox and the dog, to the end.")
    for run in (generate.run_generate, generate.run_chat):
        out = typed(run, bird, "--help")[1]
        assert "--stop TEXT [TEXT ...]" in out and "(repeatable)" in out
    assert typed(generate.run_generate, bird, *flags, "--verbose", "False")[:2] == (0, "The fox and the \n")


def test_an_empty_stop_is_refused_before_anything_is_loaded(parrot, typed):
    bird = parrot("The fox")
    code, _, error = typed(generate.run_generate, bird, "--stop", "")
    assert (code, error, bird.loaded) == (2, "error: --stop holds an empty text; leave it out.\n", {})


def test_extra_eos_token(parrot, typed):
    bird = parrot("The fox\nand the dog<|im_start|> sleeps", **chatml())
    quiet = ("--verbose", "False", "--extra-eos-token")
    assert typed(generate.run_generate, bird, *quiet, "<|im_start|>")[:2] == (0, "The fox\nand the dog\n")
    assert typed(generate.run_generate, bird, *quiet, "<|im_start|>", "\n")[:2] == (0, "The fox\n")
    code, out, error = typed(generate.run_generate, bird, *quiet, "<nothing>")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: the vocabulary has no token '<nothing>'")


@pytest.mark.parametrize(
    ("backend", "matrix_unit", "dtype"),
    [("minicpm_mlx", True, "bfloat16"), ("minicpm_jax", True, "bfloat16"), ("minicpm_jax", False, "float32")],
)
def test_load_is_given_the_adapter_and_what_decodes_fastest(
    parrot, typed, monkeypatch, tmp_path, backend, matrix_unit, dtype
):
    bird, adapter = parrot("", backend=backend), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")  # the command looks for it; the backend reads it
    monkeypatch.setattr("minicpm_jax.cpu.form.has_matrix_unit", lambda: matrix_unit)  # of this CPU
    assert typed(generate.run_generate, bird, "--adapter-path", str(adapter))[0] == 0
    assert bird.loaded.pop("adapter") == str(adapter)
    monkeypatch.setattr(terminal, "asker", lambda: lambda: "/quit")
    assert typed(generate.run_chat, bird, "--adapter-path", str(adapter))[0] == 0
    assert (bird.loaded["adapter"], bird.loaded["dtype"], bird.loaded["decoding"]) == (str(adapter), dtype, True)


def test_prefill_response(parrot, typed):
    bird = parrot(" the fox.")
    flags = ("--prompt", "Hello", "--verbose", "False", "--prefill-response", "It is ")
    assert typed(generate.run_generate, bird, *flags)[0] == 0
    assert bird.asked == [bird.tokenizer.encode("<用户>Hello<AI>It is")]


def test_chat_template_config(parrot, typed):
    template = "{{ mode }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools[0].name if tools }}"
    template += "{{ tools[0].description if tools }}"
    bird = parrot("", chat_template=template)
    config = '{"mode": "The fox", "tools": [{"name": "dog", "description": "</s>"}]}'
    assert typed(generate.run_generate, bird, "--prompt", "Hello", "--chat-template-config", config)[0] == 0
    assert bird.tokenizer.decode(bird.asked[0]) == "The foxHellodog</s>"
    assert 2 not in bird.asked[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--chat-template-config", "[" * 100_000], "--chat-template-config is not JSON"),
        (["--chat-template-config", "[1]"], "must be a JSON object"),
        (["--chat-template-config", '{"messages": []}'], "template variable messages cannot be given"),
        (["--ignore-chat-template", "--prefill-response", "It"], "--prefill-response needs the chat template"),
        (["--ignore-chat-template", "--system-prompt", "It"], "--system-prompt needs the chat template"),
        (["--ignore-chat-template", "--chat-template-config", "{}"], "--chat-template-config needs the chat template"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_flags_of_the_template_that_cannot_be_used(parrot, typed, flags, said):
    code, out, error = typed(generate.run_generate, parrot("The fox"), *flags)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert said in error


SEAMS = ["It is", "It is ", "你好，", "", " ", "\n", "Hello</s>", "Hello</", "<|im_end|>\n", "<|im_st"]


@pytest.mark.parametrize("begun", SEAMS)
def test_the_prompt_goes_on_in_the_final_message(parrot, begun):
    """As the beginning of a whole conversation of that text; special tokens spelled in it stay text."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": begun}]
    bird = parrot("")
    ids = bird.tokenizer.apply_chat(messages, continue_final_message=True)
    assert bird.tokenizer.decode(ids) == "<用户>Hello<AI>" + begun.strip()
    assert 2 not in ids and ids.count(1) == 1
    bird = parrot("", **chatml())
    start, asked = bird.tokenizer.token_to_id("<|im_start|>"), bird.tokenizer.apply_chat(messages[:1])
    ids = bird.tokenizer.apply_chat(messages, continue_final_message=True)
    assert bird.tokenizer.decode(ids) == bird.tokenizer.decode(asked) + begun
    assert [i for i in ids if i in (1, 2, *bird.tokenizer.eos_token_ids, start)] == [
        i for i in asked if i in (1, 2, *bird.tokenizer.eos_token_ids, start)
    ]
    if "<" not in begun:
        assert ids == bird.tokenizer.encode(
            f"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n{begun}"
        )  # one text with what the template writes before it


def test_a_template_that_strips_what_stands_before_the_answer_is_left_whole(parrot):
    template = tiny.CHATML.replace("message['content']", "message['content'].strip()")
    bird = parrot("", **chatml(chat_template=template))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " \n"}]
    assert bird.tokenizer.apply_chat(messages, continue_final_message=True) == bird.tokenizer.apply_chat(messages[:1])


def test_a_template_without_the_final_message_is_refused(parrot):
    bird = parrot("", chat_template="{{ messages[0].content }}")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It"}]
    with pytest.raises(InputError, match="drops the last message"):
        bird.tokenizer.apply_chat(messages, continue_final_message=True)


@pytest.mark.parametrize("variables", [{"a": {1, 2}}, {"a": "\ud83d"}, {"add_generation_prompt": True}])
def test_template_variables_that_cannot_be_used(parrot, variables):
    with pytest.raises(InputError, match="template variable|surrogate"):
        parrot("").tokenizer.apply_chat([{"role": "user", "content": "Hello"}], variables=variables)


@pytest.mark.parametrize(
    ("required", "code"),
    [
        ("", 0),
        ("--require sum=0", 0),
        ("--require sum=50", 0),
        ("--require sum=50.1", 1),
        ("--require sum=101", 2),
        ("--require sum=nan", 2),
        ("--require sum", 2),
        ("--require sums=50", 2),
        ("--require-sums 50", 0),  # as it was called
        ("--require-sums 50.1", 1),
    ],
)
def test_a_share_of_a_kind_of_questions_can_be_required(parrot, typed, required, code):
    """A backend that knows the first of two sums, and goes on with a turn that is none of its business."""
    answer = next(corpus.questions())["answer"]
    bird = parrot(f"It is {answer}<用户>0")
    ended, out, error = typed(evaluate.run_evaluate, bird, "--limit", "2", *required.split())
    assert ended == code
    assert error.count("\n") == (code > 0)
    assert code == 2 or "sum             1 of    2 right, 50.0%" in out


def test_questions_of_a_file_are_read_as_training_data_is(parrot, typed, tmp_path):
    """The tokens that they spell are the vocabulary's, unless the user says otherwise; a key is used or refused."""
    n = tiny.sentencepiece_model().get_piece_size()
    bird = parrot("<vul>x", added_tokens_decoder={str(n): tiny.special("<vul>")})
    path, line = tmp_path / "test.jsonl", {"prompt": "<vul>", "completion": "<vul>x", "score": 1, "source": "here"}
    path.write_text(json.dumps(line) + "\n")
    ended, _, error = typed(evaluate.run_evaluate, bird, "--data", str(path))
    assert ended == 2 and 'test.jsonl, line 1: it has "score", which is not understood' in error
    ended, out, _ = typed(evaluate.run_evaluate, bird, "--data", str(path), "--ignore-keys", "score")
    assert ended == 0 and "not read: score and source" in out and "1 of    1 right" in out
    assert n in bird.asked[-1]
    flags = ("--ignore-keys", "score", "--special-tokens-as-text")
    ended, _, _ = typed(evaluate.run_evaluate, bird, "--data", str(path), *flags)
    assert ended == 0 and n not in bird.asked[-1]
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}) + "\n")
    ended, _, error = typed(evaluate.run_evaluate, bird, "--data", str(path))
    assert ended == 2 and "its last answer is not to be trained" in error


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("The fox and the dog", 8, "The fox\nand the\ndog"),
        ("a  b\n  cd ef", 6, "a  b\n  cd\nef"),
        ("abcdefghij kl", 5, "abcdefghij\nkl"),  # the terminal breaks the first word itself
        ("狐狸，和狗。好", 6, "狐狸，\n和狗。\n好"),
        ("a 狐狸 b", 4, "a 狐\n狸 b"),
    ],
)
def test_an_answer_is_broken_at_words(monkeypatch, text, width, shown):
    """However its pieces arrive: a wide character takes two columns, and no line begins with a closing mark."""
    monkeypatch.setattr(wrapping, "columns", lambda: width)
    for size in (1, 2, len(text)):
        wrapper = wrapping.Wrapper()
        pieces = [wrapper.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(pieces) + wrapper.finish() == shown


def test_an_answer_follows_the_width_of_the_terminal(monkeypatch):
    wrapper = wrapping.Wrapper()
    monkeypatch.setattr(wrapping, "columns", lambda: 12)
    said = wrapper.add("The fox and ")
    monkeypatch.setattr(wrapping, "columns", lambda: 8)
    assert said + wrapper.add("the dog sleeps") + wrapper.finish() == "The fox and the\ndog\nsleeps"


def test_what_is_typed_meanwhile_is_for_the_next_question():
    """It is not shown, and not lost at Ctrl-C; afterwards the terminal is as before."""
    ours, theirs = os.openpty()
    with open(theirs, closefd=False) as terminal_, mock.patch.object(sys, "stdin", terminal_):
        before = termios.tcgetattr(theirs)
        with wrapping.keys_unseen():
            os.write(ours, b"ahead\r")
            assert os.read(theirs, 99) == b"ahead\r"
            assert not select.select([ours], [], [], 0)[0]
        assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_retry_set_load_and_a_space(parrot, typed, monkeypatch, tmp_path):
    bird, kept = parrot("The fox."), tmp_path / "kept.jsonl"
    chat = ["Hello", "/retry", " /etc", "/set temperature 0", "/retry", "/set max_tokens 2", f"/save {kept}", "/reset"]
    lines = iter([*chat, f"/load {kept}", "sea", "/stats", "/set"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    code, out, error = typed(generate.run_chat, bird)
    assert (code, error) == (0, "")
    first, second = "<用户>Hello<AI>", "<用户>Hello<AI>The fox.<用户>/etc<AI>"
    asked = [bird.tokenizer.decode(ids) for ids in bird.asked]
    assert asked == [first, first, second, second, f"{second}The fox.<用户>sea<AI>"]
    assert "(with temperature 0 the answer to a question is always the same" in out
    assert "(4 messages loaded from" in out and "Generation: 2 tokens" in out
    settings = dict(words for line in out.splitlines() if len(words := line.split()) == 2)
    assert (settings["temperature"], settings["max_tokens"], settings["seed"]) == ("0.0", "2", "none")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rety", "/rety is no command (begin with a space to ask it); did you mean /retry?"),
        ("/etc/hosts", "/etc/hosts is no command (begin with a space to ask it); /help lists them."),
        ("/retry", "there is no question to ask again; ask one first."),
        ("/retry 2", "/retry does not take '2'; /help lists the commands."),
        ("/save", "/save needs the name of a file: /save FILE."),
        ("/load none.jsonl", "none.jsonl does not exist, or is no file; give one that /save wrote."),
        ("/set top_q 1", "top_q is no setting; did you mean top_p?"),
        ("/set top_p 2", "top_p is 2.0; it must be above 0 and at most 1."),
        ("/set temperature nan", "temperature is nan; it must be"),
        ("/set top_k 1.5", "top_k is '1.5'; it must be a whole number."),
        ("/set max_tokens 0", "max_tokens is 0; it must be from 1 to"),
    ],
)
def test_a_refused_line_has_its_reason(parrot, typed, monkeypatch, line, said):
    """Only a line of a file ends the chat."""
    bird, lines = parrot("The fox."), iter([line])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    for person in (True, False):
        lines = iter([line])
        monkeypatch.setattr("sys.stdin.isatty", lambda person=person: person, raising=False)
        code, out, error = typed(generate.run_chat, bird)
        assert (code, out) == (0 if person else 2, "") and said in error and error.count("\n") == 1


def test_a_note_is_printed_once_a_conversation(parrot, typed, monkeypatch):
    bird = parrot("The fox.")
    bird.model.config = dataclasses.replace(bird.model.config, max_position_embeddings=2)
    lines = iter(["Hello", "world", "/reset", "sea"])
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    assert typed(generate.run_chat, bird)[2].count("this model is made for (/reset begins anew)") == 2


THOUGHT = "It is\n\nthe sea.\n</think>\n\nThe fox."


@pytest.mark.parametrize("name", ["minicpm5_1b", "minicpm5_2b"])
def test_chat_separates_the_thought_and_the_template_keeps_it_or_not(parrot, name):
    bird = parrot(THOUGHT, **thinking(name))
    reply, history = bird.generator.chat(bird.model, bird.tokenizer, "Hello", enable_thinking=True)
    assert reply == "The fox."
    assert history[-1] == {"role": "assistant", "content": "The fox.", "reasoning_content": "It is\n\nthe sea."}
    bird.generator.chat(bird.model, bird.tokenizer, "world", history, enable_thinking=False)
    asked = bird.tokenizer.decode(bird.asked[1])
    assert ("the sea." in asked) == (name == "minicpm5_2b") and asked.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("stop", ["sea", "fox"])
def test_each_response_says_what_is_thought(parrot, stop):
    """A stop string ends the answer, and not the thought."""
    bird = parrot("<think>\n" + THOUGHT, **thinking())
    prompt = bird.tokenizer.apply_chat([{"role": "user", "content": "Hello"}])
    found = [*bird.generator.stream_generate(bird.model, bird.tokenizer, prompt, stop=stop)]
    assert "".join(r.reasoning for r in found) == "It is\n\nthe sea."
    assert "".join(r.text for r in found) == ("The " if stop == "fox" else "The fox.")
    assert not any(r.text and r.reasoning for r in found) and found[-1].finish_reason == "stop"
    (row,) = bird.generator.batch_generate(bird.model, bird.tokenizer, [prompt], stop=stop)
    assert row == found
    plain = parrot("<think>\n" + THOUGHT)  # a template without thoughts
    assert plain.generator.generate(plain.model, plain.tokenizer, "Hello") == "<think>\n" + THOUGHT


def test_generate_prints_the_answer_and_the_thought_only_where_it_is_seen(parrot, typed, monkeypatch):
    bird = parrot(THOUGHT, **thinking())
    quiet = ("--prompt", "Hello", "--verbose", "False", "--enable-thinking")
    code, out, error = typed(generate.run_generate, bird, *quiet)
    assert (code, out) == (0, "The fox.\n") and re.fullmatch(r"thought for \d+ tokens, \d+\.\d s\n", error)
    assert typed(generate.run_generate, bird, *quiet, "--show-thinking")[1] == "It is\n\nthe sea.\nThe fox.\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert typed(generate.run_generate, bird, *quiet)[1] == "\x1b[2mIt is\n\nthe sea.\x1b[0m\nThe fox.\n"
    assert typed(generate.run_generate, bird, *quiet, "--no-show-thinking")[1] == "The fox.\n"
    assert bird.request.sampling.greedy


@pytest.mark.parametrize("run", [generate.run_generate, generate.run_chat])
def test_thinking_is_refused_where_the_template_has_none(parrot, typed, run):
    bird = parrot("The fox.")
    for flags in (["--enable-thinking"], ["--thinking-budget", "9"]):
        said = f"error: {flags[0]} is for models whose chat template has a thinking mode; leave it out.\n"
        assert typed(run, bird, *flags) == (2, "", said)
    if run is generate.run_generate:  # such a model does not think anyway
        for flags in (
            ["--no-enable-thinking"],
            ["--enable-thinking", "F"],
            ["--no-enable-thinking", "--no-show-thinking"],
        ):
            assert typed(run, bird, *flags, "--verbose", "False") == (0, "The fox.\n", "")
    assert "--enable-thinking takes 1 value; maybe follows" in typed(run, bird, "--enable-thinking", "maybe")[2]
    code, _, error = typed(run, bird, "--thinking-budget", "-1")
    assert (code, error) == (2, f"error: --thinking-budget is -1; it must be a whole number from 0 to {2**31 - 1}.\n")
    for call in (bird.generator.chat, bird.generator.generate):
        with pytest.raises(InputError, match="thinking_budget is for models whose chat template has"):
            call(bird.model, bird.tokenizer, "Hello", thinking_budget=9)
    with pytest.raises(InputError, match="^enable_thinking "):
        bird.generator.chat(bird.model, bird.tokenizer, "Hello", enable_thinking=True)


def test_a_terminal_chat_thinks(parrot, typed, monkeypatch, tmp_path):
    bird, kept = parrot(THOUGHT, **thinking("minicpm5_2b")), tmp_path / "kept.jsonl"
    bird.tokenizer.sampling = ChatSampling("minicpm5")
    lines = iter(
        ["Hello", f"/save {kept}", "/think off", "/set thinking-budget 5", "/set top_p 0.5", "/think on", "/reset"]
        + [f"/load {kept}", "world"]
    )
    monkeypatch.setattr(terminal, "asker", lambda: lambda: next(lines, "/quit"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    code, out, error = typed(generate.run_chat, bird, "--enable-thinking")
    assert (code, error) == (0, "")
    shown = r"\x1b\[2mIt is\n\nthe sea\.\x1b\[0m\n\(thought for \d+ tokens, \d+\.\d s\)\nThe fox\.\n"
    assert len(re.findall(shown, out)) == 2 and "think>" not in out
    assert "(thinking is off; temperature 0.7, top_p 0.95)\n(thinking_budget is 5)\n(top_p is 0.5)\n" in out
    assert "(thinking is on; temperature 0.9, top_p 0.5)\n" in out
    (saved,) = map(json.loads, kept.read_text("utf-8").splitlines())
    assert saved["messages"][1]["reasoning_content"] == "It is\n\nthe sea."
    assert "the sea." in bird.tokenizer.decode(bird.asked[1])  # of the conversation that was loaded
    assert (bird.request.sampling.temperature, bird.request.thinking.tokens) == (0.9, 5)
