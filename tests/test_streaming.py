"""Text while it is generated: whole characters, stop strings, EOS, and no token pulled too many."""

import random

import pytest
import tiny_tokenizer as tiny
from test_tokenizer import gguf_gpt2

from minicpm_data import load_tokenizer, stream_text, tokenizer_from_gguf
from weights_io.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def byte_level():
    return tokenizer_from_gguf(gguf_gpt2("gpt-2"))


def pulled(ids, seen):
    for i in ids:
        seen.append(i)
        yield i


@pytest.mark.parametrize("name", ["tokenizer", "byte_level"])
def test_no_character_is_split(name, request):
    tokenizer = request.getfixturevalue(name)
    text = " 你好 👍🏽 𠮷 naïve 龘 end"
    ids = tokenizer.encode(text, add_bos=False)
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.add(i) for i in ids]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + detokenizer.finish() == text
    assert "👍" in parts and "𠮷" in parts  # each came with its last byte, not later
    assert parts.count("") >= 3


@pytest.mark.parametrize("name", ["tokenizer", "byte_level"])
def test_stream_is_decode_for_any_ids(name, request):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size + 3), k=rng.randrange(12))
        detokenizer = tokenizer.detokenizer()
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == tokenizer.decode(ids)


def test_decode_agrees_with_the_library(tokenizer, byte_level):
    """Wherever bytes form characters; and a byte of none, alone, is one U+FFFD in both."""
    rng = random.Random(0)
    pieces = [i for i in range(tokenizer.vocab_size) if not tokenizer._fast.id_to_token(i).startswith("<0x")]
    for skip in (True, False):
        for _ in range(200):
            ids = rng.choices(pieces, k=8)
            assert tokenizer.decode(ids, skip) == tokenizer._fast._fast.decode(ids, skip_special_tokens=skip)
            ids = rng.choices(range(byte_level.vocab_size), k=8)
            assert byte_level.decode(ids, skip) == byte_level._fast._fast.decode(ids, skip_special_tokens=skip)
    cut = tokenizer.encode("Hello 龘", add_bos=False)[:-1]
    assert tokenizer.decode(cut) == tokenizer._fast._fast.decode(cut) == "Hello \ufffd\ufffd"


def test_incomplete_bytes_come_out_at_the_end(tokenizer):
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("👍", add_bos=False)
    assert [detokenizer.add(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish() == "\ufffd" * 3


def test_one_response_per_token_and_eos(tokenizer):
    ids, seen = [*tokenizer.encode("Hello 你好 fox", add_bos=False), 2, 9, 9], []
    responses = list(stream_text(pulled(ids, seen), tokenizer, {2}, max_tokens=50))
    assert [r.token for r in responses] == ids[:-2] == seen
    assert "".join(r.text for r in responses) == "Hello 你好 fox"
    assert [r.finish_reason for r in responses] == [None] * (len(responses) - 1) + ["stop"]


def test_max_tokens(tokenizer):
    ids, seen = tokenizer.encode("Hello world fox", add_bos=False), []
    responses = list(stream_text(pulled(ids, seen), tokenizer, {2}, max_tokens=3))
    assert [r.finish_reason for r in responses] == [None, None, "length"]
    assert seen == ids[:3]
    assert "".join(r.text for r in responses) == tokenizer.decode(ids[:3])
    assert list(stream_text(pulled(ids, seen), tokenizer, {2}, max_tokens=0)) == []
    assert list(stream_text([2], tokenizer, {2}, max_tokens=1))[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["<用户>"], "Hello the fox "),
        (["dog", "fox"], "Hello the "),
        (["x <用户>d"], "Hello the fo"),
        (["He"], ""),
        ("fox", "Hello the "),
        (["fox!"], "Hello the fox <用户>dog"),
    ],
)
def test_stop_strings(tokenizer, stop, text):
    ids, seen = tokenizer.encode("Hello the fox <用户>dog", add_bos=False), []
    responses = list(stream_text(pulled([*ids, 2], seen), tokenizer, {2}, stop, max_tokens=99))
    assert "".join(r.text for r in responses) == text
    assert responses[-1].finish_reason == "stop"
    assert [r.token for r in responses] == seen
    if text != "Hello the fox <用户>dog":
        assert len(seen) <= len(ids)


def test_what_may_begin_a_stop_string_is_held_back(tokenizer):
    ids = [tokenizer.token_to_id(piece) for piece in "▁dodo"]
    texts = [r.text for r in stream_text(ids, tokenizer, (), ["dog"], max_tokens=5)]
    assert texts == ["", "", "", "do", "do"]  # let go where it cannot be one any more, and at the end


def test_ids_that_run_out_lose_no_text(tokenizer):
    ids = tokenizer.encode("Hello <", add_bos=False)
    responses = list(stream_text(ids, tokenizer, (), ["<用户>"], max_tokens=99))
    assert "".join(r.text for r in responses) == "Hello <"
    assert (responses[-1].token, responses[-1].finish_reason) == (None, "length")


def test_without_a_tokenizer():
    responses = list(stream_text(iter([5, 6, 2, 7]), None, {2}, max_tokens=9))
    assert [(r.token, r.text, r.finish_reason) for r in responses] == [(5, "", None), (6, "", None), (2, "", "stop")]
    with pytest.raises(InputError, match="tokenizer"):
        stream_text(iter([5]), None, {2}, ["x"], 9)


def test_empty_stop_string(tokenizer):
    with pytest.raises(InputError, match="empty"):
        stream_text(iter([5]), tokenizer, {2}, [""], 9)
