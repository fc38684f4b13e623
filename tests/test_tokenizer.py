"""Tokenizer files to ids: the conversion of tokenizer.model, what the config files say, and files that are broken."""

import json
import random

import pytest
import tiny_tokenizer as tiny

from minicpm_data import check_vocab, has_tokenizer, load_tokenizer, tokenizer_from_gguf
from minicpm_data.tokenizer.detokenizer import BYTE_TOKENS
from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer
from minicpm_data.tokenizer.sentencepiece import SpmModel, bpe_merges, fast_spec, read_spm
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError

TEXTS = [
    "Hello world",
    " leading",
    "  two   runs  of spaces ",
    "你好，世界。",
    "def f(x):\n\n    return 42\t# ok\r\n",
    "👍 and 👨‍👩‍👧, é ﬁ \u200b zero width",
    "<用户>你好<AI>",
    "x" * 3000,
    "𠮷\U0010ffff\x00\x07",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fast_conversion_is_sentencepiece_with_a_space_in_front(tokenizer):
    """A text with no user-defined piece in it merges as SentencePiece merges it, after the "▁"."""
    model = tiny.sentencepiece_model()
    words = " ".join(tiny.SENTENCES).replace("\n", " ").split(" ") + ["  ", "世界", "👍", "é", "42"]
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choices(words, k=8))
        assert tokenizer.encode(text) == [1, *model.encode(" " + text)]
    assert tokenizer.encode(" leading", add_bos=False) == model.encode("  leading")


def test_model_and_json_give_the_same_ids(tokenizer, tmp_path):
    both = load_tokenizer(tiny.write(tmp_path, {"tokenizer.json": tiny.as_json()}))
    for text in [*TEXTS, "a</s>b <s>", "<td>\n<td>"]:
        assert both.encode(text) == tokenizer.encode(text)


def test_merges_rank_by_score_then_ids():
    pieces = ["a", "b", "c", "bc", "ab", "abc"]
    assert bpe_merges(pieces, [-5.0, -6.0, -7.0, -2.0, -1.0, -1.5]) == [
        ("a", "b"),
        ("a", "bc"),
        ("ab", "c"),
        ("b", "c"),
    ]


def test_attributes(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (2,), None)
    assert tokenizer.vocab_size == tiny.sentencepiece_model().get_piece_size()
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode([1, 2], skip_special_tokens=False) == "<s></s>"


def test_bos_exactly_once(tokenizer):
    assert tokenizer.encode("<s>Hello") == tokenizer.encode("Hello")
    assert tokenizer.encode("Hello")[0] == 1 not in tokenizer.encode("Hello")[1:]
    assert tokenizer.encode("Hello", add_bos=False) == tokenizer.encode("Hello")[1:]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("a</s>b").count(2) == 1


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("in_json", [True, False])
def test_config_decides_on_bos_before_the_json_file(tmp_path, flag, in_json):
    spec = tiny.as_json()
    spec["post_processor"] = spec["post_processor"] if in_json else None
    config = {"tokenizer_config.json": {} if flag is None else {"add_bos_token": flag, "bos_token": "<s>"}}
    tokenizer = load_tokenizer(tiny.write(tmp_path, {"tokenizer.json": spec, **config}))
    assert tokenizer.encode("Hello").count(1) == (in_json if flag is None else flag)


@pytest.mark.parametrize("ends", [False, True])
def test_bos_comes_first_whatever_the_vocabulary_can_spell(ends):
    """Neither an "a" nor bytes to spell it with."""
    spec = tiny.as_json()
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "b": 3}
    spec["model"] |= {"vocab": vocab, "merges": [], "byte_fallback": False, "unk_token": None}
    if ends:
        spec["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        spec["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    spec["normalizer"] = None
    tokenizer = Tokenizer(FastTokenizer(spec, "test"), bos_token_id=1, eos_token_ids=[2])
    assert tokenizer.encode("b") == [1, 3, 2][: 2 + ends]
    assert tokenizer.encode("") == [1, 2][: 1 + ends]


def test_config_may_ask_for_eos_and_pad(tmp_path):
    folder = tiny.write(tmp_path, add_eos_token=True, pad_token={"content": "<unk>"}, eos_token=tiny.special("</s>"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Hello")[-1] == 2
    assert tokenizer.pad_token_id == 0


def test_added_tokens_of_the_config(tmp_path):
    n = tiny.sentencepiece_model().get_piece_size()
    reserved = tiny.sentencepiece_model().piece_to_id("<reserved_1>")
    added = {str(n): tiny.special("<|im_end|>"), str(reserved): tiny.special("<slice>")}
    tokenizer = load_tokenizer(tiny.write(tmp_path / "a", added_tokens_decoder=added, chat_template=tiny.CHATML))
    assert tokenizer.encode("<slice>x<|im_end|>", add_bos=False)[0] == reserved  # the piece took the new name
    assert tokenizer.eos_token_ids == (2, n)
    assert tokenizer.vocab_size == n + 1
    with pytest.raises(InputError, match=f"'<slice>' the id {n + 5}"):
        load_tokenizer(tiny.write(tmp_path / "b", added_tokens_decoder={str(n + 5): tiny.special("<slice>")}))


def test_slow_classes_are_sentencepiece_itself(tmp_path):
    """MiniCPM-V's tokenizers put nothing in front and cut user-defined pieces out first, tokenizer.json or not."""
    model = tiny.sentencepiece_model()
    tokenizer = load_tokenizer(
        tiny.write(tmp_path, {"tokenizer.json": tiny.as_json()}, tokenizer_class="MiniCPMVTokenizer")
    )
    for text in [*TEXTS, "<td>x<td>\n\n", "Hello<td> world"]:
        assert tokenizer.encode(text) == [1, *model.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_only_sentencepiece_can_merge():
    """The skin tone is no piece, so no merge list has it: fast falls back to bytes, slow must not."""
    pieces = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "👍", "👍🏽"]
    model = SpmModel(pieces, [0.0] * len(pieces), [2, 3, 3] + [6] * 256 + [1, 1])
    slow = FastTokenizer(fast_spec(model, space_prefix=False), "test").encode("👍🏽")
    assert slow.ids == [pieces.index("👍🏽")]
    fast = FastTokenizer(fast_spec(model, space_prefix=True), "test").encode("👍🏽")
    assert len(fast.ids) == 3 + 1 + 4  # "▁" in bytes, the thumb, the tone in bytes


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+D83D"):
        tokenizer.encode("a\ud83d")


def test_check_vocab(tokenizer):
    check_vocab(tokenizer, tokenizer.vocab_size)
    check_vocab(tokenizer, tokenizer.vocab_size + 7)
    with pytest.raises(InputError, match=rf"{tokenizer.vocab_size} ids.*{tokenizer.vocab_size - 1}"):
        check_vocab(tokenizer, tokenizer.vocab_size - 1)


def test_truncated_model(tmp_path):
    for size in range(1, len(tiny.spm_bytes()) - 40, 371):
        (tmp_path / "tokenizer.model").write_bytes(tiny.spm_bytes()[:size])
        with pytest.raises(InputError, match="cut short"):
            read_spm(tmp_path / "tokenizer.model")


def test_unigram_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a BPE model"):
        load_tokenizer(tiny.write(tmp_path, {"tokenizer.model": tiny.spm_bytes("unigram")}))


def test_has_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(InputError, match="neither"):
        load_tokenizer(tmp_path)
    assert has_tokenizer(tiny.write(tmp_path))


def gguf_llama() -> dict:
    model = tiny.sentencepiece_model()
    n = model.get_piece_size()
    user_defined = {"\n", "\t", "<td>", "<reserved_1>"}
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in range(n)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(n)],
        "tokenizer.ggml.token_type": [4 if model.id_to_piece(i) in user_defined else kinds[i] for i in range(n)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_gguf_llama_is_the_folder_tokenizer(tokenizer):
    from_gguf = tokenizer_from_gguf(gguf_llama())
    for text in [*TEXTS, "a</s>b", "<td>\n"]:
        assert from_gguf.encode(text) == tokenizer.encode(text)
    assert from_gguf.eos_token_ids == (2,)
    bare = tokenizer_from_gguf({**gguf_llama(), "tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("Hello", add_bos=False) == tiny.sentencepiece_model().encode("Hello")


@pytest.mark.parametrize("key", ["tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.scores"])
@pytest.mark.parametrize(
    "change", [lambda key: key[:-1], lambda key: "T" + key[1:], lambda key: key.replace("o", "0", 1)]
)
def test_gguf_key_that_is_nearly_one(key, change):
    metadata = gguf_llama()
    metadata[change(key)] = metadata.pop(key)
    with pytest.raises(InputError, match=f"the GGUF file has {change(key)}, which is no key; write {key}"):
        tokenizer_from_gguf(metadata)


def test_gguf_keys_of_llama_cpp_are_let_pass():
    names = """add_sep_token remove_extra_whitespaces precompiled_charsmap token_type_count seperator_token_id
    cls_token_id mask_token_id eom_token_id eog_token_id fim_pre_token_id fim_suf_token_id fim_mid_token_id
    fim_pad_token_id fim_rep_token_id fim_sep_token_id prefix_token_id suffix_token_id middle_token_id""".split()
    more = {f"tokenizer.ggml.{name}": 1 for name in names} | {"tokenizer.huggingface.json": "{}"}
    more |= {"tokenizer.chat_templates": ["x"], "tokenizer.chat_template.x": "", "general.name": "x"}
    assert tokenizer_from_gguf({**gguf_llama(), **more}).encode("Hello") == tokenizer_from_gguf(gguf_llama()).encode(
        "Hello"
    )


def gguf_gpt2(pre: str) -> dict:
    from minicpm_data.tokenizer.detokenizer import BYTE_OF_CHAR

    merges = ["1 2", "12 3", "Ġ w", "o r", "Ġw or", "ä ½", "ä½ ł"]
    tokens = ["<|im_start|>", "<|im_end|>", *BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": tiny.CHATML,
    }


@pytest.mark.parametrize(("pre", "digits"), [("smollm", 4), ("gpt-2", 2), ("default", 2), ("llama-bpe", 2)])
def test_gguf_byte_level(pre, digits):
    tokenizer = tokenizer_from_gguf({**gguf_gpt2(pre), "tokenizer.ggml.add_bos_token": False})
    assert len(tokenizer.encode("1234")) == digits
    assert len(tokenizer.encode("1231")) == digits
    for text in [*TEXTS, "word world 你好 👍\n\n  x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat([{"role": "user", "content": "<|im_end|> wor"}])
    assert [i for i in ids if i < 2] == [0, 1, 0]
    assert tokenizer.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "qwen2x"}, "'qwen2x'"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "'x yz'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "outside"),
        ({"tokenizer.chat_template": ["x"]}, "chat_template"),
        ({"tokenizer.ggml.eot_token_id": "1"}, "eot_token_id of the GGUF file is '1'"),
        ({"tokenizer.ggml.unknown_token_id": "0"}, "unknown_token_id of the GGUF file is '0'"),
        ({"tokenizer.ggml.padding_token_id": 1.0}, "padding_token_id of the GGUF file is 1.0"),
        ({"tokenizer.ggml.pre": ["smollm"]}, "tokenizer.ggml.pre of the GGUF file must be a string"),
        ({"tokenizer.ggml.token_type": 1}, "no list tokenizer.ggml.token_type"),
    ],
)
def test_gguf_refusals(change, message):
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf({**gguf_gpt2("smollm"), **change})


def test_older_added_tokens_file(tmp_path):
    n = tiny.sentencepiece_model().get_piece_size()
    tokenizer = load_tokenizer(tiny.write(tmp_path, {"added_tokens.json": json.dumps({"<im_patch>": n})}))
    assert tokenizer.encode("x<im_patch>", add_bos=False)[-1] == n
