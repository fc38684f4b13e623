"""Every JSON text of a model: strict, bounded, refused in one sentence; and files that are none."""

import json
import os
import socket
from pathlib import Path

import pytest

from weights_io.errors import InputError, listed, short
from weights_io.files import json_text
from weights_io.files.json_text import loads, parse_object, read_json, read_optional_json
from weights_io.files.regular import open_regular, read_regular


def refused(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        loads(text, "the file")
    assert str(caught.value).startswith("the file ") and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value", [None, 1, -2.5, "a\u00e9\U0001f98a", [], {}, [1, [2, {"a": [None]}]], {"a": {"a": 1}}]
)
def test_values(value):
    for ascii in (True, False):
        text = json.dumps(value, ensure_ascii=ascii)
        assert loads(text, "x") == loads(text.encode(), "x") == loads(b"\xef\xbb\xbf" + text.encode(), "x") == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("{}{}", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        ("[1]".encode("utf-16"), "is not JSON"),
        ("1" * 5000, "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (r'{"a": "\ud800"}', "is not JSON .*surrogates"),
        (r'{"\uDFFF": 1}', "is not JSON .*surrogates"),
        ("[" * 102 + "]" * 102, "more than 100 lists and objects in each other"),
        ('{"a":' * 102 + "1" + "}" * 102, "more than 100 lists"),
        ('{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice"),
        ('[{"x": [{"a": 1, "a": 2}]}]', "has the key 'a' twice"),
        ('{"' + "k" * 1000 + '": 1, "' + "k" * 1000 + '": 1}', r"has the key 'k+\.\.\.' twice"),
        (r'{"a\n\u0000": 1, "a\n\u0000": 1}', "twice"),
        ("[" + "1," * 4_200_000 + "1]", "larger than any such JSON text"),
        (b"[" * 30 + b" " * 2**26, "larger than any such JSON text"),
    ],
)
def test_what_is_refused(text, message):
    refused(text, message)


def test_half_characters_that_are_whole_and_deep_texts_that_are_not():
    assert loads(r'"\ud83e\udd8a \\ud800"', "x") == "\U0001f98a \\ud800"
    assert loads("[" * 100 + "]" * 100, "x")
    assert loads(json.dumps("[" * 1000), "x") == "[" * 1000


def test_a_key_twice_among_many_is_found_at_once():
    keys = ", ".join(f'"{i}": 1' for i in range(100_000))
    refused(f'{{{keys}, "99999": 1}}', "has the key '99999' twice")


def test_objects_and_files(tmp_path):
    path = tmp_path / "config.json"
    assert read_optional_json(path) == {}
    with pytest.raises(InputError, match="config.json does not exist; a model folder holds config.json"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == read_optional_json(path) == {"a": 1}
    with pytest.raises(InputError, match="the text holds list, not a JSON object; download it again"):
        parse_object("[]", "the text")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")  # a link of a hub's cache whose file is gone is no absent file
    with pytest.raises(InputError, match="cannot read .*config.json"):
        read_optional_json(path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(json_text.MAX_CONFIG + 1)
    with pytest.raises(InputError, match="config.json has 16777217 bytes, and such a file has at most 16777216"):
        read_json(path)
    path.write_text('{"a": [' + "1," * 1_100_000 + "1]}")
    with pytest.raises(InputError, match="config.json is larger than any such JSON text"):
        read_json(path)
    assert len(read_json(path, json_text.MAX_BYTES)["a"]) == 1_100_001


def unusual(folder: Path) -> dict[str, Path]:
    """Paths that are no files, by what they are."""
    found = {"pipe": folder / "fifo", "device": Path("/dev/zero"), "folder": folder, "socket": folder / "socket"}
    os.mkfifo(found["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(found["socket"]))
    return found


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
    for kind, path in unusual(Path()).items():
        for read in (open_regular, read_json, lambda path: read_regular(path, 10)):
            with pytest.raises(InputError, match=f"^cannot read {path}: it is a {kind}.*, not a file; put the file"):
                read(path)
    Path("loop").symlink_to("loop")
    for path in (Path("loop"), Path("none"), Path("x" * 5000), Path("nul\0")):
        with pytest.raises(InputError, match="cannot read"):
            open_regular(path)


def test_a_model_whose_files_are_none(reference, tmp_path):
    """Of each reader: nothing waits and nothing swells."""
    from minicpm_data.cli.inspect import inspect
    from weights_io.adapters import read_adapter
    from weights_io.checkpoint import open_checkpoint

    config = (reference("dense_2b") / "config.json").read_bytes()
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "generation_config.json"]
    names += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "weights.safetensors"]
    for kind in ("fifo", "zero"):
        for name in names:
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            for other in {"config.json"} - {name}:
                (folder / other).write_bytes(config)
            if name == "generation_config.json":
                (folder / "model.safetensors").symlink_to(reference("dense_2b") / "model.safetensors")
            if kind == "fifo":
                os.mkfifo(folder / name)
            else:
                (folder / name).symlink_to("/dev/zero")
            with pytest.raises(InputError, match=f"^cannot read [^ ]*{name}: it is a [^:]*$"):
                open_checkpoint(folder)
            try:
                assert any(f"{name}: it is a" in problem for problem in inspect(folder).problems)
            except InputError as error:
                assert f"{name}: it is a" in str(error)
        file = tmp_path / kind / "model.gguf"
        os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
        with pytest.raises(InputError, match="model.gguf: it is a"):
            open_checkpoint(file)
    dense = open_checkpoint(reference("dense_2b"))
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InputError, match="is no adapter"):
        read_adapter(tmp_path, dense.config)


def test_messages_are_one_line_of_bounded_length():
    assert listed("abc") == "a, b, c" and listed("abcde") == "a, b, c and 2 more" and listed([]) == ""
    assert len(short("x" * 1000)) == 80 and short("x" * 80) == "x" * 80
    text = str(InputError("a\nb\x1b[31m\u202e\ud800" + "\u4e2d" * 10_000 + "end."))
    assert text.startswith("a\\u000ab\\u001b[31m\\u202e\\ud800\u4e2d") and text.endswith("end.") and len(text) < 2100
