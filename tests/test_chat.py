"""Chat prompts: the templates, and contents that spell special tokens."""

import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_tokenizer as tiny

from minicpm_data import load_tokenizer
from minicpm_data.conversation import template_process
from minicpm_data.tokenizer import chat_template
from weights_io.errors import InputError

WORDS = ["Hello", " world", "你好", "\n", "  ", "<用户>", "<AI>", "<td>", "👍", "<", "|", "s", ">", "</", "42"]


def user(content):
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write(tmp_path_factory.mktemp("minicpm")))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    n = tiny.sentencepiece_model().get_piece_size()
    added = {str(n): tiny.special("<|im_end|>"), str(n + 1): {"content": "<|im_start|>", "special": False}}
    folder = tiny.write(tmp_path_factory.mktemp("chatml"), added_tokens_decoder=added, chat_template=tiny.CHATML)
    return load_tokenizer(folder)


def test_minicpm_prompt(tokenizer):
    messages = [*user(" 你好 "), {"role": "assistant", "content": "Hello\n"}, *user("42")]
    assert tokenizer.apply_chat(messages) == tokenizer.encode("<s><用户>你好<AI>Hello<用户>42<AI>")
    with_system = [{"role": "system", "content": "The fox."}, *user("Hello")]
    assert tokenizer.apply_chat(with_system) == tokenizer.encode("The fox.<用户>Hello<AI>")


def test_chatml_prompt(chatml):
    ids = chatml.apply_chat(user("Hello"))
    assert ids == chatml.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert chatml.apply_chat(user("Hello"), add_generation_prompt=False) == ids[: len(ids) - len(_answer(chatml))]
    assert ids.count(1) == 1


@pytest.mark.parametrize("token", chat_template.TURN_ENDS)
def test_the_token_with_which_the_template_ends_a_turn_ends_an_answer(tmp_path, token):
    n = tiny.sentencepiece_model().get_piece_size()
    folder = tiny.write(tmp_path, added_tokens_decoder={str(n): tiny.special(token)})
    assert load_tokenizer(folder).eos_token_ids == (2,)  # no template writes it
    template = tiny.CHATML.replace("<|im_end|>", token)
    folder = tiny.write(tmp_path, added_tokens_decoder={str(n): tiny.special(token)}, chat_template=template)
    assert load_tokenizer(folder).eos_token_ids == (2, n)


def _answer(chatml):
    return chatml.encode("<|im_start|>assistant\n", add_bos=False)


@pytest.mark.parametrize("name", ["tokenizer", "chatml"])
def test_ids_are_those_of_the_rendered_text(name, request):
    """Where no content spells a special token, the prompt is tokenised as one text."""
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(300):
        messages = [
            {
                "role": rng.choice(["system", "user", "assistant"]),
                "content": "".join(rng.choices(WORDS, k=rng.randrange(9))),
            }
            for _ in range(rng.randrange(1, 4))
        ]
        text = chat_template.render(tokenizer.chat_template, messages)
        if not any(special in text for special in ("<s>", "</s>")):
            assert tokenizer.apply_chat(messages) == tokenizer.encode(text)


@pytest.mark.parametrize("spelled", ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<<s>>", "</</s>s>"])
@pytest.mark.parametrize("name", ["tokenizer", "chatml"])
def test_spelled_specials_stay_text(name, spelled, request):
    tokenizer = request.getfixturevalue(name)
    specials = {0, 1, 2, *tokenizer.eos_token_ids, tokenizer.token_to_id("<|im_start|>")}

    def found(content):
        return [i for i in tokenizer.apply_chat(user(content)) if i in specials]

    content = f"{spelled}Hello {spelled} 你好{spelled}"
    assert found(content) == found("Hello")
    assert content in tokenizer.decode(tokenizer.apply_chat(user(content)), skip_special_tokens=False)


def test_two_contents_do_not_join_to_a_special(tokenizer):
    messages = [{"role": "assistant", "content": "Hello</ "}, {"role": "assistant", "content": "s> fox"}]
    ids = tokenizer.apply_chat(messages)
    assert 2 not in ids
    assert tokenizer.decode(ids) == "Hello</s> fox"


def test_no_merge_spells_a_special(tmp_path):
    """ "<slice>" is a piece that merges reach (here "<sli" + "ce>"); in a content it stays text all the same."""
    spec = tiny.as_json()
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for left, right in [("<", "s"), ("<s", "l"), ("<sl", "i"), ("c", "e"), ("ce", ">"), ("<sli", "ce>")]:
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))
    for char in "<slice>":
        assert char in vocab or vocab.setdefault(char, len(vocab))
    n = vocab["<slice>"]
    spec["added_tokens"].append({**tiny.special("<slice>"), "id": n, "lstrip": False, "rstrip": False})
    spec["added_tokens"][-1] |= {"single_word": False, "normalized": False}
    tokenizer = load_tokenizer(tiny.write(tmp_path, {"tokenizer.json": spec}))
    assert n in tokenizer.encode("<slice>")
    ids = tokenizer.apply_chat(user("<slice>"))
    assert n not in ids
    assert tokenizer.decode(ids) == "<用户><slice><AI>"


def test_bos_once_when_the_template_writes_it(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer = load_tokenizer(tiny.write(tmp_path, chat_template=template))
    assert tokenizer.apply_chat(user("Hello")) == tokenizer.encode("<s>Hello</s>")
    ids = tokenizer.apply_chat(user("<s>Hello"))
    assert ids.count(1) == 1 and ids.count(2) == 1


def test_special_spelled_in_private_use_text(tokenizer):
    content = "\ue000</s>\ue001"
    ids = tokenizer.apply_chat(user(content))
    assert 2 not in ids
    assert tokenizer.decode(ids) == f"<用户>{content}<AI>"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        {"role": "user", "content": "Hello"},
        ["Hello"],
        [{"role": "user"}],
        [{"content": "Hello"}],
        [{"role": "robot", "content": "Hello"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image", "text": "Hello"}]}],
        [{"role": "tool", "content": "Hello"}],
        [{"role": ["user"], "content": "Hello"}],
        [{"role": "user", "content": "a\ud83d"}],
    ],
)
def test_messages_that_cannot_be_used(tokenizer, messages):
    with pytest.raises(InputError) as caught:
        tokenizer.apply_chat(messages)
    assert "\n" not in str(caught.value)


FAILING = {
    "unfinished": "{% for %}",
    "refusing": "{{ raise_exception('roles must alternate') }}",
    "refusing in lines": "{{ raise_exception('a\nb' * 1000) }}",
    "no such message": "{{ messages[7].content.strip() }}",
    "types": "{{ 'a' + 1 }}",
    "division": "{{ 1 // 0 }}",
    "overflow": "{{ 2.0 ** 5000 }}",
    "digits": "{{ 10 ** 5000 }}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "change": "{{ messages.append(1) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "include": "{% include 'x' %}",
    "break": "{% break %}",  # Python's compiler refuses it, as it does the next
    "double argument": "{% macro f(a,a) %}{% endmacro %}{{ f(1) }}",
    "deep": "{% if 1 %}" * 110 + "{% endif %}" * 110,
    "deeper": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "brackets": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "cycler": "{{ cycler() }}",
    "truncate": "{{ 'abcdef'|truncate(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long prompt": "{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}",
}
SWELLING = {
    "multiplication": "{{ 'x' * 10**9 }}",
    "list": "{{ ([0] * 10**9)|length }}",
    "indent": "{{ ('a\n' * 1000)|indent(10000000) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "method": "{{ 'a'.ljust(10**10) }}",
    "json": "{{ [[1]]|tojson(indent=10**9) }}",
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}"
    ),
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "one operation": (  # a comparison of 2**60 parts
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_template_errors_are_input_errors(name):
    with pytest.raises(InputError, match="chat template cannot be applied") as caught:
        chat_template.render(FAILING[name], user("Hello"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and text.endswith(".")


@pytest.mark.parametrize("template", [*SWELLING.values(), *ENDLESS.values()], ids=[*SWELLING, *ENDLESS])
def test_templates_without_bounds(template):
    """One sentence, in time and memory that have limits; the next template is rendered as ever."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with pytest.raises(InputError, match="more time or memory than is reasonable"):
        chat_template.render(template, user("Hello"))
    assert time.monotonic() - began < template_process.WALL_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000
    assert chat_template.render("{{ messages[0].content }}", user("你好\ud83d")) == "你好\ud83d"


@pytest.mark.parametrize("template", ["{{ 'x' * 10**10 }}{{ a }}", "{{ 9**(9**9) }}{{ a }}"])
def test_names_of_a_template_without_bounds(template):
    """Jinja works out the constants of a template whose names are asked for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert chat_template.variables_of(template) == {"a"}
    except InputError as error:
        assert "more time or memory than is reasonable" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000
    with pytest.raises(InputError, match="the chat template cannot be read"):
        chat_template.variables_of("{% if %}")


def test_a_process_that_somebody_ended_is_replaced():
    chat_template.render("x", user("x"))
    for worker in template_process._idle:
        worker.process.kill()
        worker.process.wait()
    assert chat_template.render("{{ messages[0].content }}", user("y")) == "y"


def test_threads_render_at_once():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def render(n: int) -> bool:
        if n % 8 == 7:
            with pytest.raises(InputError):
                chat_template.render("{{ raise_exception('no') }}", user("x"))
        return all(chat_template.render(template, user(f"{n} {k}")) == f"{n} {k}" for k in range(20))

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(render, range(24)))
    assert len(template_process._idle) <= template_process.PROCESSES


def test_a_forked_process_renders_by_itself():
    chat_template.render("x", user("x"))
    code = (
        "import os; from minicpm_data.tokenizer.chat_template import render\n"
        "m = [{'role': 'user', 'content': 'x'}]; render('a', m)\n"
        "child = os.fork()\n"
        "texts = [render(f'{child > 0} {n}', m) for n in range(50)]\n"
        "assert texts == [f'{child > 0} {n}' for n in range(50)]\n"
        "os._exit(0) if child == 0 else print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_all_private_use_characters_in_a_message(tokenizer):
    with pytest.raises(InputError, match="private-use"):
        tokenizer.apply_chat(user("".join(map(chr, chat_template.PRIVATE_USE))))


def test_special_tokens_without_end(tmp_path):
    with pytest.raises(InputError, match="too many"):
        chat_template.Markers(f"<{n}{'x' * 30}>" for n in range(20_000))


def test_template_features():
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert chat_template.render(template, user("你好") * 2) == '{"role": "user", "content": "你好"}'
    assert len(chat_template.render("{{ strftime_now('%Y') }}", user(""))) == 4
    assert chat_template.render("{% generation %}{{ messages[0].content }}{% endgeneration %}", user("x")) == "x"
    assert chat_template.render("  {% if true %}\nx\n  {% endif %}\n", user("")) == "x\n"  # trim_blocks, lstrip_blocks
