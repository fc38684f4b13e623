"""Tokenizers and chat templates against transformers' own, in both directions.

transformers 5 rebuilds a Llama's ``tokenizer.json`` by rules of its own (leading spaces), so theirs is always a
``PreTrainedTokenizerFast`` here, which takes the file as it stands, as ours does.
"""

import json
import random
from pathlib import Path

import pytest
import tiny_tokenizer as tiny
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minicpm_data import load_tokenizer, tokenizer_from_gguf
from minicpm_data.tokenizer import chat_template
from minicpm_data.tokenizer.gguf_pre_tokenizers import PRE_TOKENIZERS
from minicpm_data.tokenizer.writing import tokenizer_files
from weights_io.checkpoint import open_checkpoint

pytestmark = pytest.mark.interop

TEXTS = [
    *tiny.SENTENCES,
    "Hello world",
    " leading",
    "  two   runs  of spaces ",
    "trailing \n\n",
    "\tdef f(x):\r\n\n    return 42\t# ok\n",
    "I'll say it's 3.14159, isn't it? WE'LL SEE",
    "👍 and 👨‍👩‍👧, é ﬁ e\u0301 \u200b zero width",
    "𠮷\U0010ffff\x00\x07",
    "special <|im_start|>user<|im_end|> and </s> inside",
    "x" * 500,
    "",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(pre: str) -> dict:
    """A byte-level vocabulary trained in a moment, cut as llama.cpp's pre-tokenizer of that name."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(tiny.SENTENCES * 3, trainer)
    made.decoder = tokenizers.decoders.ByteLevel()
    spec = json.loads(made.to_str())
    spec["pre_tokenizer"] = PRE_TOKENIZERS[pre].spec()
    return spec


def with_bos(spec: dict) -> dict:
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.post_processor = template
    return json.loads(made.to_str())


def with_chatml(spec: dict) -> dict:
    """Two special tokens more, and one that is added but not special."""
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return json.loads(made.to_str())


FILES = {
    "sentencepiece": lambda: tiny.as_json(),
    "sentencepiece without prefix": lambda: tiny.as_json(space_prefix=False),
    "sentencepiece with chatml": lambda: with_chatml(tiny.as_json()),
    "gpt2": lambda: byte_level("gpt-2"),
    "smollm": lambda: byte_level("smollm"),
    "minicpm5": lambda: byte_level("minicpm5"),
    "llama 3 with bos": lambda: with_bos(byte_level("llama-bpe")),
}


@pytest.fixture(scope="module", params=FILES)
def pair(request, tmp_path_factory):
    """Ours and theirs, of the same ``tokenizer.json``."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(FILES[request.param]()))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return load_tokenizer(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMES)


def same_ids(ours, theirs, texts=TEXTS) -> None:
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False).input_ids, text


def test_ids(pair):
    ours, theirs = pair
    same_ids(ours, theirs)
    assert ours.vocab_size == len(theirs) and ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids[0] == theirs.eos_token_id


def test_ids_of_random_text(pair):
    ours, theirs = pair
    rng = random.Random(0)
    alphabet = [*"abcdefgh THE 0123 \n\t.,'!你好世界天é👍", "  ", "\u0301", "<|im_end|>", "</s>", "▁", "<0x0A>"]
    same_ids(ours, theirs, ["a" + "".join(rng.choices(alphabet, k=rng.randint(0, 30))) for _ in range(200)])


@pytest.mark.parametrize("skip", [True, False])
def test_text_of_ids(pair, skip):
    """Also ids in an order that no text gives. Where byte tokens form no character the two differ: the library makes
    U+FFFD of each byte of their run, ours only of the wrong ones, since a stream cannot take back what it gave."""
    ours, theirs = pair
    rng = random.Random(0)
    rows = [ours.encode(text) for text in TEXTS]
    rows += [rng.choices(range(ours.vocab_size), k=rng.randint(0, 12)) for _ in range(300)]
    compared = 0
    for ids in rows:
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if "\ufffd" not in expected or theirs.convert_tokens_to_ids("<0x0A>") in (None, ours.unk_token_id):
            assert ours.decode(ids, skip_special_tokens=skip) == expected, ids
            compared += 1
    assert compared > 60


TEMPLATES = {
    "minicpm": chat_template.MINICPM_TEMPLATE,
    "chatml": tiny.CHATML,
    "chatml with a system message of its own": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks on lines of their own": """{{- bos_token }}
{% set ns = namespace(turns=0) %}
{% for message in messages %}
    {%- if message.role == "user" %}
        {%- set ns.turns = ns.turns + 1 %}
<|im_start|>user {{ ns.turns }}
{{ message.content | trim }}<|im_end|>
    {% elif message.role == "assistant" %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {% else %}
        {% continue %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "json": (
        "{% for message in messages %}{{ message | tojson }}{{ message.content | tojson(indent=2) }}{% endfor %}"
        "{% if tools is not none or documents is defined and documents %}tools{% endif %}"
        "{{ strftime_now('%Y') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
}
CHATS = [
    [{"role": "user", "content": "Hello world"}],
    [{"role": "user", "content": "  你好，世界。 \n"}, {"role": "assistant", "content": "In 1998 & <1>"}],
    [
        {"role": "system", "content": "Answer 'briefly'."},
        {"role": "user", "content": "def f(x):\n    return x"},
        {"role": "assistant", "content": " the sea"},
        {"role": "user", "content": "e\u0301 👍?"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_templates(pair, name, prompted):
    ours, theirs = pair
    template = TEMPLATES[name]
    theirs.chat_template = ours.chat_template = template
    for messages in CHATS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert chat_template.render(template, messages, prompted, bos_token="<s>", eos_token="</s>") == text
        # As MiniCPM's own code does: the rendered text is encoded with BOS where the tokenizer adds it, but once.
        ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompted, return_dict=False)
        before = ours.encode("")
        expected = ids if ids[: len(before)] == before else before + ids
        assert ours.apply_chat(messages, add_generation_prompt=prompted) == expected, text


@pytest.mark.parametrize("name", ["minicpm5_1b", "minicpm5_2b"])
def test_training_examples_of_thinking_templates(pair, name):
    """Ids of the rendered conversation as theirs, up to the end of its last answer; the contents spell tokens. Answers
    begin with no space, which would be one token with the prompt's line end in some vocabularies."""
    ours, theirs = pair
    template = (Path(__file__).parents[1] / "reference" / "chat" / name / "chat_template.jinja").read_text("utf-8")
    theirs.chat_template = ours.chat_template = template
    rng = random.Random(0)
    words = ["Hello", " world", "你好", "\n", "  ", "a b", "<|im_end|>", "</s>", "42", "👍"]
    for _ in range(100):
        messages = [{"role": "system", "content": "Be kind."}] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            question, thought, answer = ("".join(rng.choices(words, k=rng.randrange(6))) for _ in range(3))
            thought = f"<think>\n{thought}\n</think>\n\n" * rng.randrange(2)
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": thought + answer.lstrip()},
            ]
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        before = ours.encode("")
        expected = ids if ids[: len(before)] == before else before + ids
        assert ours.apply_chat(messages, add_generation_prompt=False, trusted=True) == expected
        found, trained = ours.chat_example(messages)
        assert found[:-1] == expected[: len(found) - 1] and trained[-1]  # the last is the EOS, of either


@pytest.mark.parametrize("name", ["minicpm", "chatml", "chatml with a system message of its own", "llama 2"])
@pytest.mark.parametrize("begun", ["It is", "In 1998 ", "你好，", "e\u0301"])
def test_the_final_message_goes_on(pair, name, begun):
    ours, theirs = pair
    theirs.chat_template = ours.chat_template = TEMPLATES[name]
    messages = [*CHATS[0], {"role": "assistant", "content": begun}]
    ids = theirs.apply_chat_template(messages, tokenize=True, continue_final_message=True, return_dict=False)
    before = ours.encode("")
    expected = ids if ids[: len(before)] == before else before + ids
    assert ours.apply_chat(messages, continue_final_message=True) == expected


def test_what_transformers_saves(pair, tmp_path):
    """transformers 5 writes another tokenizer_config.json than 4 did, and the template in a file of its own."""
    _, theirs = pair
    theirs.chat_template = TEMPLATES["chatml"]
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    ours = load_tokenizer(tmp_path)
    same_ids(ours, theirs)
    assert ours.chat_template == TEMPLATES["chatml"]
    assert (ours.bos_token_id, ours.eos_token_ids[0]) == (theirs.bos_token_id, theirs.eos_token_id)


def test_what_we_save(pair, tmp_path):
    ours, _ = pair
    ours.chat_template = TEMPLATES["llama 2"]
    written(ours, tmp_path)


def test_the_tokenizer_of_a_gguf_file(reference, tmp_path):
    metadata = open_checkpoint(reference("gguf/model-q4_0.gguf")).metadata
    written(tokenizer_from_gguf(dict(metadata)), tmp_path)


def written(ours, folder: Path) -> None:
    """``ours`` opens as the same tokenizer in transformers, out of the files that a conversion writes."""
    for name, content in tokenizer_files(ours).items():
        (folder / name).write_text(content)
    theirs = AutoTokenizer.from_pretrained(folder)
    same_ids(ours, theirs)
    assert theirs.chat_template == ours.chat_template
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_ids[0])
