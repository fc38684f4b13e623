"""Chat prompts: the templates, and contents that spell special tokens."""

import random

import pytest
import tiny_tokenizer as tiny

from minicpm_data import chat, load_tokenizer
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


def _answer(chatml):
    return chatml.encode("<|im_start|>assistant\n", add_bos=False)


@pytest.mark.parametrize("name", ["tokenizer", "chatml"])
def test_ids_are_those_of_the_rendered_text(name, request):
    """Where no content spells a special token, the prompt is tokenised as one text."""
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(300):
        messages = [
            {"role": rng.choice(chat.ROLES), "content": "".join(rng.choices(WORDS, k=rng.randrange(9)))}
            for _ in range(rng.randrange(1, 4))
        ]
        text = chat.render(tokenizer.chat_template, messages)
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
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": ["user"], "content": "Hello"}],
        [{"role": "user", "content": "a\ud83d"}],
    ],
)
def test_messages_that_cannot_be_used(tokenizer, messages):
    with pytest.raises(InputError) as caught:
        tokenizer.apply_chat(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.strip() }}",
        "{{ 'a' + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include 'x' %}",
    ],
)
def test_template_errors_are_input_errors(template):
    with pytest.raises(InputError, match="chat template"):
        chat.render(template, user("Hello"))


def test_template_features():
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert chat.render(template, user("你好") * 2) == '{"role": "user", "content": "你好"}'
    assert len(chat.render("{{ strftime_now('%Y') }}", user(""))) == 4
    assert chat.render("{% generation %}{{ messages[0].content }}{% endgeneration %}", user("x")) == "x"
    assert chat.render("  {% if true %}\nx\n  {% endif %}\n", user("")) == "x\n"  # trim_blocks, lstrip_blocks
