"""The files of a tokenizer: what they say is used, and what is broken, hostile or contradictory is one sentence."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_model
import tiny_tokenizer as tiny

from minicpm_data import check_vocab, load_tokenizer, tokenizer_from_gguf
from minicpm_data.generation.request import prompt_ids
from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer, panics_unprinted
from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files import json_text

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def sentence(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "version https://git-lfs.github.com/spec/v1"},
        {"tokenizer.json": b""},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": "{}"},
        {
            "tokenizer.json": {
                "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "<s>": 2, "<unk>": 3}, "unk_token": "a"}
            }
        },
        {"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}},
        {"tokenizer.model": b""},
        {"tokenizer.model": b"<html>not found</html>"},
        {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": {"eos_token": "<nothing>"}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}},
        {"tokenizer_config.json": {"chat_template": 3}},
        {"tokenizer_config.json": {"bos_token": 5}},
        {"tokenizer_config.json": {"eos_token": ["a"]}},
        {"tokenizer_config.json": {"pad_token": {"content": 5}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": 5}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"1": 5}}},
        {"tokenizer.json": {**tiny.as_json(), "added_tokens": [{}]}},
        {"tokenizer.json": {**tiny.as_json(), "added_tokens": [{"content": []}]}},
        {"tokenizer.json": {**tiny.as_json(), "added_tokens": 5}},
        {"chat_template.jinja": b"\xff\xfe"},
        {"tokenizer.json": {**tiny.as_json(), "model": {**tiny.as_json()["model"], "dropout": 0.1}}},
        {"tokenizer.json": '{"version": "1.0", "version": "1.0"}'},
        {"tokenizer.json": '{"model": ' + "[" * 100_000},
        {"tokenizer.model": b"\xff" * 100_000},  # one number without an end
        {"tokenizer_config.json": '{"bos_token": "<s>", "bos_token": "<unk>"}'},
        {"special_tokens_map.json": '{"bos_token": {"content": "<s>", "content": "<unk>"}}'},
        {"added_tokens.json": '{"<x>": 480, "<x>": 481}'},
        {"added_tokens.json": {"<x>": -1}},
        {"added_tokens.json": {"<x>": -(2**63)}},
        {"added_tokens.json": {"<x>": 480.5}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"-1": {"content": "<x>"}}}},
        {"tokenizer_config.json": {"add_bos_token": "yes"}},
        {"tokenizer_config.json": {"legacy": 0}},
        {"tokenizer_config.json": {"add_prefix_space": "no"}},
        {"tokenizer_config.json": {"split_special_tokens": True}},
        {"tokenizer_config.json": {"sp_model_kwargs": {"enable_sampling": True}}},
        {"tokenizer_config.json": {"do_lower_case": True}},
        {"tokenizer_config.json": {"additional_special_tokens": "<x>"}},
        {"tokenizer_config.json": {"additional_special_tokens": [3]}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default"}]}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "a"}] * 2}},
    ],
)
def test_broken_files_are_one_sentence(tmp_path, files):
    with pytest.raises(InputError) as caught:
        load_tokenizer(tiny.write(tmp_path, files))
    sentence(caught)


# Each makes the library panic: at reading, at its first text, or around it.
PANICS = [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"post_processor": {**tiny.as_json()["post_processor"], "special_tokens": {}}},
    {"model": {**tiny.as_json()["model"], "continuing_subword_prefix": "##"}},
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# Each would make a short text take all memory, or ids without end around it.
TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SWOLLEN = [
    {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 40}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    {"decoder": {"type": "Sequence", "decoders": [TWICE] * 40}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 100 + [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": tiny.as_json()["post_processor"]["pair"],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 100, "tokens": ["<s>"] * 100}},
        }
    },
    {"post_processor": {**tiny.as_json()["post_processor"], "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2}},
    {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 900},
        "added_tokens": [{**tiny.special("a" * 20_000), "id": 480, **FLAGS, "normalized": True}],
    },
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2000}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}] * 2000}},
    {"model": {**tiny.as_json()["model"], "end_of_word_suffix": "x" * 2000}},
    {"added_tokens": [{**tiny.special(f"<{n}>"), "id": n, **FLAGS} for n in range(480, 100_500)]},
]


@pytest.mark.parametrize("part", PANICS + SWOLLEN)
def test_hostile_steps_are_one_sentence(tmp_path, part, capfd):
    with pytest.raises(InputError) as caught:
        load_tokenizer(tiny.write(tmp_path, {"tokenizer.json": {**tiny.as_json(), **part}}))
    assert "tokenizer.json" in sentence(caught)
    assert capfd.readouterr().err == ""


def test_special_tokens_of_a_config_without_end(tmp_path):
    """A list that is copied for each of them takes minutes."""
    many = [f"<{n}>" for n in range(150_000)]
    with pytest.raises(InputError, match="added tokens"):
        load_tokenizer(tiny.write(tmp_path, additional_special_tokens=many))


@pytest.mark.parametrize("name", ["tokenizer.model", "added_tokens.json"])
def test_a_pipe_is_called_so(tmp_path, name):
    folder = tiny.write(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name}: it is a pipe"):
        load_tokenizer(folder)


@pytest.mark.parametrize("last, said", [(2**32 - 2, "beyond any vocabulary"), (2**24 - 1, "wrong tokenizer size")])
def test_an_id_beyond_all_rows(tmp_path, last, said):
    """What lies between is never written out; the library ends the process where it lacks the memory for it."""
    spec = tiny.as_json()
    spec["model"]["vocab"]["zz"] = last
    folder = tiny.write(tmp_path, {"tokenizer.json": spec})
    with pytest.raises(InputError, match=said):
        check_vocab(load_tokenizer(folder), 480)


def test_a_panic_at_a_text_is_one_sentence(capfd):
    """A pattern that takes exponential time, which the library gives up."""
    spec = {**tiny.as_json(), "normalizer": None}
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(h+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = FastTokenizer(spec, "test")
    with pytest.raises(InputError, match="test cannot encode this text"):
        tokenizer.encode("h" * 40 + "x")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"


def test_what_others_write_to_stderr_is_kept(capfd):
    with panics_unprinted():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


def test_panics_of_several_threads_at_once_are_not_printed(capfd):
    import tokenizers

    spec = {**tiny.as_json(), "normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 4000}}
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    together = threading.Barrier(4)

    def panic(_: int) -> str:
        try:
            with panics_unprinted():
                together.wait()
                library.encode_batch(["é"])
        except BaseException as error:
            return type(error).__name__
        return ""

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(panic, range(4))] == ["PanicException"] * 4
    with panics_unprinted():
        os.write(2, b"before\nthread '<unnamed>' (7) panicked at x.rs:1:2:\nno\nnote: run with `R`\nafter\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_a_byte_order_mark_is_passed_over(tmp_path):
    config = b"\xef\xbb\xbf" + json.dumps({**tiny.CONFIG, "add_eos_token": True}).encode()
    files = {"tokenizer_config.json": config, "chat_template.jinja": b"\xef\xbb\xbf{{ messages[0].content }}"}
    tokenizer = load_tokenizer(tiny.write(tmp_path, files))
    assert tokenizer.encode("Hello")[-1] == 2 and tokenizer.chat_template == "{{ messages[0].content }}"


def test_json_texts():
    assert json_text.loads('\ufeff{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    assert json_text.loads(b"\xef\xbb\xbf3", "x") == 3
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]'):
        with pytest.raises(InputError, match="^x has the key 'a' twice"):
            json_text.loads(text, "x")
    for wrong in ("{", b"\xff", "[" * 100_000, "9" * 5_000, ""):
        with pytest.raises(InputError, match="^x is "):
            json_text.loads(wrong, "x")


def test_a_file_without_end_is_refused(tmp_path):
    with open(tiny.write(tmp_path) / "tokenizer.json", "wb") as file:
        file.truncate(10 << 30)  # holes alone
    with pytest.raises(InputError, match="such a file has at most"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [1, 263, 2, 268]),
        ({"legacy": True, "add_prefix_space": None}, [1, 263, 2, 268]),
        ({"legacy": False}, [1, 263, 2, 1419]),
        ({"add_prefix_space": False}, [1, 1395, 2, 1419]),
        ({"legacy": False, "add_prefix_space": False}, [1, 1395, 2, 1419]),
    ],
)
def test_legacy_and_add_prefix_space(tmp_path, config, ids):
    """The ids are those of transformers 4.57 and 5.24."""
    pico = Path(__file__).parent.parent / "weights_io" / "pico" / "tokenizer.model"
    folder = tiny.write(tmp_path, {"tokenizer.model": pico.read_bytes()}, **config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a</s>b") == ids
    prefixed = config.get("add_prefix_space") is not False
    assert tokenizer.decode(ids) == ("a b" if ids[-1] == 268 else "ab")
    spaces = "" if config.get("legacy") is False and prefixed else " "
    assert tokenizer.decode(tokenizer.encode(" x")) == spaces + "x"  # as there: a text's own space counts as the prefix


def test_add_prefix_space_beside_a_json_file(tmp_path):
    """transformers rebuilds a Llama's tokenizer without the space; other classes take the file as it stands."""
    files = {"tokenizer.json": tiny.as_json()}
    bare = load_tokenizer(tiny.write(tmp_path / "bare", files, add_prefix_space=False))
    assert bare.encode("Hello") == [1, *tiny.sentencepiece_model().encode("Hello")]
    assert bare.decode(bare.encode(" Hello")) == " Hello"
    other = {"add_prefix_space": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    kept = load_tokenizer(tiny.write(tmp_path / "kept", files, **other))
    assert kept.encode("Hello") == [1, *tiny.sentencepiece_model().encode(" Hello")]
    spec = {**tiny.as_json(), "normalizer": None, "pre_tokenizer": {**BYTES, "use_regex": True}, "decoder": BYTES}
    gpt2 = tiny.write(
        tmp_path / "gpt2", {"tokenizer.json": spec}, add_prefix_space=True, tokenizer_class="GPT2Tokenizer"
    )
    assert load_tokenizer(gpt2)._fast.spec()["pre_tokenizer"]["add_prefix_space"] is True


def test_keys_without_effect_are_let_pass(tmp_path):
    more = {"model_max_length": 1e30, "padding_side": "left", "sp_model_kwargs": {}, "split_special_tokens": False}
    more |= {"clean_up_tokenization_spaces": True, "auto_map": {"AutoTokenizer": ["x.Y", None]}, "anything": [1]}
    more |= {"legacy": None, "use_default_system_prompt": False, "extra_special_tokens": {}, "do_lower_case": False}
    plain = load_tokenizer(tiny.write(tmp_path / "plain"))
    assert load_tokenizer(tiny.write(tmp_path / "more", **more)).encode("Hello </s>") == plain.encode("Hello </s>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("slip", "key"),
    [("chat_templat", "chat_template"), ("eos_tokn", "eos_token"), ("lagacy", "legacy"), ("Unk_token", "unk_token")],
)
def test_a_key_that_is_nearly_one_that_is_used_is_refused(tmp_path, name, slip, key):
    config = {given: value for given, value in tiny.CONFIG.items() if given != key} | {slip: "</s>"}
    tiny.write(tmp_path, {name: config})
    with pytest.raises(InputError, match=f"{name} has {slip}, which is no key; write {key}"):
        load_tokenizer(tmp_path)


def test_keys_of_other_tokenizers_are_not_taken_for_slips(tmp_path):
    """The configs of MiniCPM, of transformers 5 and of models with images have these."""
    keys = """spaces_between_special_tokens use_default_system_prompt clean_up_tokenization_spaces tokenizer_file
    processor_class padding_side truncation_side name_or_path backend is_local local_files_only image_token video_token
    audio_bos_token vision_eos_token boi_token eoi_token eot_token eos_token_id errors tokenizer_type
    chat_template_kwargs max_length stride truncation_strategy model_input_names add_special_tokens fix_mistral_regex
    slow_tokenizer_class response_schema""".split()
    folder = tiny.write(
        tmp_path, {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", **dict.fromkeys(keys, "x")}}
    )
    assert load_tokenizer(folder).encode("Hello") == load_tokenizer(tiny.write(tmp_path / "plain")).encode("Hello")


def test_a_file_of_thousands_of_keys_is_refused(tmp_path):
    folder = tiny.write(tmp_path, **{f"add_bos_token_{i}": 1 for i in range(5000)})
    with pytest.raises(InputError, match="tokenizer_config.json has 5000 keys that are not known"):
        load_tokenizer(folder)


def test_special_tokens_that_only_the_config_names(tmp_path):
    """As in transformers: a piece of the vocabulary becomes one, and what is no piece comes behind it."""
    n = tiny.sentencepiece_model().get_piece_size()
    piece = tiny.sentencepiece_model().piece_to_id("<td>")
    named = {"additional_special_tokens": ["<td>", tiny.special("<new>")], "pad_token": "[PAD]"}
    tokenizer = load_tokenizer(tiny.write(tmp_path, **named))
    assert tokenizer.encode("x<td>[PAD]<new>", add_bos=False)[-3:] == [piece, n, n + 1]
    assert tokenizer.pad_token_id == n
    assert piece not in tokenizer.apply_chat([{"role": "user", "content": "<td>"}])


def test_a_pad_token_beyond_the_table(tmp_path, capsys):
    model = tiny_model.write(tmp_path / "made")
    rows = load_tokenizer(model).vocab_size
    (model / "added_tokens.json").write_text(json.dumps({"[PAD]": rows}))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[PAD]"}))
    checkpoint = open_checkpoint(model)
    tokenizer = tokenizer_of(checkpoint)
    tokenizer_of(checkpoint)
    note = capsys.readouterr().err
    assert note.startswith("note: the tokenizer's added '[PAD]' are beyond") and note.count("\n") == 1
    assert tokenizer.pad_token_id == rows and prompt_ids(tokenizer, "Hello", rows)
    with pytest.raises(InputError, match=rf"the token '\[PAD\]' \(id {rows}\)"):
        prompt_ids(tokenizer, "Hello[PAD]", rows)
    with pytest.raises(InputError, match=f"token id {rows} of the prompt is outside"):
        prompt_ids(tokenizer, [rows], rows)
    assert max(tokenizer.apply_chat([{"role": "user", "content": "[PAD]"}])) < rows  # a content stays text
    with pytest.raises(InputError, match="wrong tokenizer size"):
        check_vocab(load_tokenizer(model), rows - 1)
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[PAD]"}))
    with pytest.raises(InputError, match="wrong tokenizer size"):
        tokenizer_of(checkpoint)


def test_chat_template_sources(tmp_path):
    def template(name, **kwargs):
        return load_tokenizer(tiny.write(tmp_path / name, **kwargs)).chat_template

    assert "<用户>" in template("none")
    assert template("string", chat_template="a") == "a"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert template("list", chat_template=named) == "d"
    assert template("file", files={"chat_template.jinja": "f"}, chat_template="a") == "f"
    with pytest.raises(InputError, match="none is named default"):
        template("ambiguous", chat_template=[{"name": "a", "template": "a"}, {"name": "b", "template": "b"}])


def test_the_template_for_tools(tmp_path):
    named = [{"name": "tool_use", "template": "tools {{ tools[0].name }}"}, {"name": "default", "template": "none"}]
    tokenizer = load_tokenizer(tiny.write(tmp_path / "named", chat_template=named))
    messages = [{"role": "user", "content": "Hello"}]
    tools = [{"name": "f"}]
    assert tokenizer.apply_chat(messages) == tokenizer.encode("none")
    assert tokenizer.apply_chat(messages, tools) == tokenizer.encode("tools f")
    files: dict = {"chat_template.jinja": "file"}
    folder = tiny.write(tmp_path / "file", files, chat_template=named)  # the file comes before the list
    with pytest.raises(InputError, match="tools cannot be used"):
        load_tokenizer(folder).apply_chat(messages, tools)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("more {{ tools[0].name }}")
    assert load_tokenizer(folder).apply_chat(messages, tools) == tokenizer.encode("more f")
    assert load_tokenizer(folder).apply_chat(messages) == tokenizer.encode("file")


def of_llama_cpp(reference, pre: str) -> tuple[dict, list[list[int]], list[str]]:
    """The metadata of a vocabulary, and the ids that llama.cpp gives texts with it and ``pre``."""
    found = json.loads((reference("gguf_tokenizers") / "llama_cpp.json").read_text("utf-8"))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": found["tokens"],
        "tokenizer.ggml.merges": found["merges"],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(found["tokens"]) - 2),
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata, found["ids"][pre], found["texts"]


OF_LLAMA_CPP = (
    "minicpm5 qwen2 deepseek-llm deepseek-coder deepseek-v3 llama-bpe gpt-2 default smollm falcon bloom seed-coder "
    "bailingmoe glm4 jais-2 qwen35 viking"
)


@pytest.mark.parametrize("pre", OF_LLAMA_CPP.split())
def test_pre_tokenizers_are_those_of_llama_cpp(reference, pre):
    metadata, expected, texts = of_llama_cpp(reference, pre)
    tokenizer = tokenizer_from_gguf(metadata)
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_bos=False) == ids, text
        assert tokenizer.decode(ids) == text


def test_without_a_pre_tokenizer_it_is_llama_cpps_default(reference):
    metadata, expected, texts = of_llama_cpp(reference, "default")
    del metadata["tokenizer.ggml.pre"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert [tokenizer.encode(text, add_bos=False) for text in texts] == expected


def test_a_broken_tokenizer_leaves_one_line_and_status_2(tmp_path):
    model = tiny_model.write(tmp_path)
    (model / "tokenizer.json").write_text(json.dumps({**tiny.as_json(), **PANICS[1]}))
    done = subprocess.run(
        [sys.executable, "-m", "weights_io.inspect", "--model", str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "RUST_BACKTRACE": "1"},
    )
    assert done.returncode == 2 and "tokenizer.json" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
