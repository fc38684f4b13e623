"""Paths, short names and downloads, the latter from a hub of our own on loopback."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest

from minicpm_data.cli.notebook import check_room
from weights_io import catalog, hub
from weights_io.checkpoint import open_checkpoint
from weights_io.config import FAMILIES
from weights_io.errors import InputError
from weights_io.write import save_checkpoint

CONFIG = b'{"hidden_size": 8}'
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
REPO = "openbmb/tiny"
FILES = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
    "tf_model.h5": b"never",
    "model.onnx": b"never",
    "tiny-q4.gguf": b"never",
    "modeling_minicpm.py": b"never",
    "README.md": b"never",
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ 1 }}",
    "onnx/config.json": b"never",
}
NEEDED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
SHARDS = {
    "config.json": CONFIG,
    "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}',
    "pytorch_model-1.bin": b"1",
    "pytorch_model-2.bin": b"2",
    "training_args.bin": b"never",
}
# What a user's program does, in a process of its own, whose client reads its settings when it is imported.
CLIENT = """
import sys
from weights_io.hub import resolve

print(resolve(sys.argv[1]))
"""


class Server(http.server.ThreadingHTTPServer):
    """The part of the hub's HTTP interface that the client uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {(REPO, "main"): FILES}
        self.fetched: list[str] = []  # names of the files whose bytes were asked for, in order
        self.asked: list[str] = []  # what was asked of repositories, in order
        self.claimed: dict[str, int | None] = {}  # sizes of files that are none
        self.fault: str | None = None  # "cut" | "stall" | "gated" | "broken"
        self.released = threading.Event()  # ends a stall


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.server.fault == "broken":
            return self._reply(503)
        if path.startswith("api/models/"):
            self.server.asked.append(path.removeprefix("api/models/"))
            owner, name, *rest = path.removeprefix("api/models/").split("/", 3)
            return self._repository(f"{owner}/{name}", *(rest or ["revision", "main"]))
        if path.count("/") < 4:  # what else the client may ask for is not there
            return self._reply(404)
        owner, name, _, revision, file = path.split("/", 4)
        return self._file(f"{owner}/{name}", revision, file)

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for (known, branch), files in self.server.repos.items():
            commit = hashlib.sha1(f"{known} {branch}".encode()).hexdigest()
            if known == repo and revision in (branch, commit):
                return commit, files
        known_repo = any(known == repo for known, _ in self.server.repos)
        self._reply(404, {"X-Error-Code": "RevisionNotFound" if known_repo else "RepoNotFound"})
        return None

    def _repository(self, repo: str, what: str, revision: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        commit, files = found
        sizes = {name: len(data) for name, data in files.items()} | self.server.claimed
        listing: object = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if what == "revision":
            listing = {"id": repo, "sha": commit, "siblings": [{"rfilename": n, "size": sizes[n]} for n in files]}
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        if self.server.fault == "gated":
            return self._reply(403, {"X-Error-Code": "GatedRepo"})
        commit, files = found
        data = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if self.command == "GET":
            self.server.fetched.append(name)
            if self.server.fault and name == "model.safetensors":
                first = self.server.fetched.count(name) == 1
                self._reply(200, headers, data[: len(data) // 2 if first else 0], len(data))
                self.wfile.flush()
                if self.server.fault == "stall":
                    self.server.released.wait(30)
                return
        self._reply(200, headers, data)

    def _reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int | None = None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(length or len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def start(server: Server, home: Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, REPO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "no_proxy": "127.0.0.1", **settings},
        cwd=Path(__file__).parent.parent,
    )


def download_alone(server: Server, home: Path, **environment: str) -> Path:
    """Of what the others do in this process."""
    out, err = start(server, home, **environment).communicate(timeout=60)
    assert out, err
    return Path(out.splitlines()[-1])


@contextlib.contextmanager
def client(server: Server, home: Path, offline: bool = False, endpoint: str | None = None) -> Iterator[None]:
    """The client's settings as a process that begins with them would have them."""
    from huggingface_hub import constants

    at = endpoint or f"http://127.0.0.1:{server.server_port}"
    with (
        mock.patch.dict(os.environ, HF_ENDPOINT=at, no_proxy="127.0.0.1"),
        mock.patch.multiple(constants, HF_HUB_OFFLINE=offline, HF_HUB_CACHE=str(home / "hub")),
    ):
        yield


def check(config: dict, source: str) -> None:
    if config["hidden_size"] != 8:
        raise InputError(f"{source}: hidden_size 9 is not supported.")


def download(server: Server, home: Path, repo: str, revision: str | None = None, **settings: Any) -> Path:
    with client(server, home, **settings):
        return hub.resolve(repo, revision, check=check)


def refusal(server: Server, home: Path, repo: str, revision: str | None = None, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        download(server, home, repo, revision, **settings)
    assert "\n" not in str(caught.value)
    return f"error: {caught.value}"


def stored(home: Path, name: str) -> list[Path]:
    return list(home.rglob(f"snapshots/*/{name}"))


def test_only_needed_files_are_fetched_and_then_work_offline(server, tmp_path):
    folder = download_alone(server, tmp_path)
    assert sorted(server.fetched) == NEEDED == sorted(path.name for path in folder.iterdir())
    assert server.fetched[0] == "config.json"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert download(server, tmp_path, REPO) == folder
    assert download_alone(server, tmp_path, HF_HUB_OFFLINE="1") == folder
    assert download(server, tmp_path, REPO, endpoint="http://127.0.0.1:9") == folder  # nobody listens there
    assert sorted(server.fetched) == NEEDED, "something was fetched a second time"


def test_shards_are_those_of_the_index(server, tmp_path):
    server.repos[REPO, "main"] = SHARDS
    assert sorted(path.name for path in download(server, tmp_path, REPO).iterdir()) == sorted(SHARDS)[:4]
    server.repos[REPO, "main"] = {key: value for key, value in SHARDS.items() if key != "pytorch_model-2.bin"}
    assert "lacks pytorch_model-2.bin" in refusal(server, tmp_path / "other", REPO)


def test_unsupported_config_is_refused_before_the_weights(server, tmp_path):
    server.repos[REPO, "main"] = {**FILES, "config.json": b'{"hidden_size": 9}'}
    assert refusal(server, tmp_path, REPO) == f"error: config.json of {REPO}: hidden_size 9 is not supported."
    assert server.fetched == ["config.json"]


def test_revision(server, tmp_path):
    server.repos[REPO, "step-10000"] = {**FILES, "model.safetensors": b"early"}
    assert (download(server, tmp_path, REPO, "step-10000") / "model.safetensors").read_bytes() == b"early"
    assert f"{REPO} has no revision 'step-7'" in refusal(server, tmp_path, REPO, "step-7")


def test_subfolder(server, tmp_path):
    steps = {f"steps/{n}/{name}": data for n in (1, 2) for name, data in FILES.items()}
    server.repos[REPO, "main"] = {**steps, "README.md": b"never", "steps/2/model.safetensors": b"later"}
    folder = download(server, tmp_path, f"{REPO}/steps/2")
    assert sorted(server.fetched) == [f"steps/2/{name}" for name in NEEDED]
    assert (folder / "model.safetensors").read_bytes() == b"later" and folder.parts[-2:] == ("steps", "2")
    assert download(server, tmp_path, f"{REPO}/steps/2", offline=True) == folder
    server.repos[REPO, "other"] = {name.replace("steps", "saved"): data for name, data in steps.items()}
    assert download(server, tmp_path, f"{REPO}/saved/1", "other").name == "1"
    assert f"hf download {REPO} --local" in refusal(server, tmp_path, f"{REPO}/steps/1", offline=True)
    assert f"{REPO}/steps/3 holds no config.json" in refusal(server, tmp_path, f"{REPO}/steps/3")
    whole = refusal(server, tmp_path, REPO)
    assert f"steps/1/onnx and steps/2 and more do, so name {REPO}/steps/1" in whole


def test_what_a_download_takes_is_known_before_it(server, tmp_path, capsys):
    """Of the files that a model is loaded from, those that are not in the cache yet; none of them is fetched for it."""
    config = (Path(__file__).parent / "reference" / "dense_1b" / "config.json").read_bytes()
    files = {**FILES, "config.json": config}
    del files["tokenizer.model"], files["chat_template.jinja"]
    server.repos[REPO, "main"] = files

    def room(memory: int = 10**9) -> tuple[str, str]:
        """What a notebook prints before a download, and why it refuses one."""
        with client(server, tmp_path):
            try:
                check_room(REPO, [None, "float32"], memory=memory)
            except InputError as error:
                return capsys.readouterr().out, str(error)
        return capsys.readouterr().out, ""

    out, refused = room()
    assert refused == "" and "download       1.0 MB in 1 file of openbmb/tiny\n" in out
    assert (
        f"disk           1.0 MB in {tmp_path}/hub and 2.7 MB at most for the copies that this notebook writes;" in out
    )
    assert (
        "memory         1.2 MB of weights in float32, 4.2 MB of keys and values for 4,096 tokens; 1.00 GB are free"
        in out
    )
    assert "first answer   in seconds; an estimate, not timed on a TPU\n" in out
    assert "model.safetensors" not in server.fetched
    assert "the weights of openbmb/tiny in float32 would take 1.2 MB, and 1.0 MB are free" in room(1000000)[1]
    server.claimed = {"model.safetensors": 10**10, "tf_model.h5": 10**15}
    assert "first answer   about 100 s from here (100 s to download at 100 MB/s)" in room()[0]
    server.claimed = {"model.safetensors": 10**16}
    assert re.match(r"openbmb/tiny on the disk of /.* would take 10,000,000.* are free; make room", room()[1])
    server.claimed = {"model.safetensors": None}  # a mirror that does not say
    assert "download       unknown in 1 file " in (said := room()[0]) and "first answer" not in said
    server.claimed = {}
    with client(server, tmp_path):
        hub.resolve(REPO)
    assert "download       nothing: openbmb/tiny is in the cache" in room()[0]


def test_refusals_are_one_sentence(server, tmp_path):
    assert "no repository openbmb/MiniCPM-2B-sft" in (text := refusal(server, tmp_path, "openbmb/MiniCPM-2B-sft"))
    assert text.endswith("did you mean minicpm-2b or minicpm-2b-fp32 or minicpm-2b-int4?")
    offline = refusal(server, tmp_path, REPO, offline=True)
    assert "HF_HUB_OFFLINE is set" in offline and f"hf download {REPO}" in offline
    assert "http://127.0.0.1:9 cannot be reached" in refusal(server, tmp_path, REPO, endpoint="http://127.0.0.1:9")
    server.repos[REPO, "gguf"] = {"tiny-q4.gguf": b""}
    assert f"hf download {REPO} FILE.gguf" in refusal(server, tmp_path, REPO, "gguf")
    server.repos[REPO, "bare"] = {"config.json": CONFIG}
    assert "holds none of model.safetensors" in refusal(server, tmp_path, REPO, "bare")
    server.fault = "broken"
    assert "answered 503" in refusal(server, tmp_path, REPO)
    server.fault = "gated"
    assert "accept its terms" in refusal(server, tmp_path, REPO)
    assert stored(tmp_path, "model.safetensors") == []


@pytest.mark.slow  # the client tries five times
def test_cut_download_leaves_no_half_file(server, tmp_path):
    server.fault = "cut"
    assert "was interrupted" in refusal(server, tmp_path, REPO)
    assert stored(tmp_path, "config.json") and not stored(tmp_path, "model.safetensors")
    # Half a snapshot is not a model.
    assert "not completely" in refusal(server, tmp_path, REPO, offline=True)
    server.fault = None
    assert (download(server, tmp_path, REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_killed_download_leaves_no_half_file(server, tmp_path):
    server.fault = "stall"
    process = start(server, tmp_path)
    until = time.monotonic() + 120
    while not ("model.safetensors" in server.fetched and list(tmp_path.rglob("*.incomplete"))):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert "model.safetensors" in server.fetched and not stored(tmp_path, "model.safetensors")
    server.fault = None
    assert (download(server, tmp_path, REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_full_disk(monkeypatch):
    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(InputError, match="disk of .* is full: free space for a/b, or set HF_HOME"):
        hub.HuggingFace("a/b", None).fetch(["config.json"])


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model.gguf").touch()
    Path("model.txt").touch()
    assert hub.resolve("model") == Path("model") and hub.resolve(tmp_path) == tmp_path
    assert hub.resolve("model.gguf") == Path("model.gguf")
    with pytest.raises(InputError, match="neither a model folder nor a .gguf file"):
        hub.resolve("model.txt")
    with pytest.raises(InputError, match="has no revision 'main'"):
        hub.resolve("model", revision="main")
    with pytest.raises(InputError, match="'minicmp-2b' is no folder.*did you mean minicpm-2b"):
        hub.resolve("minicmp-2b")
    with pytest.raises(InputError, match="models/none.gguf does not exist"):
        hub.resolve("models/none.gguf")
    with pytest.raises(InputError, match="~nosuchuser/x.* cannot be looked up"):
        hub.resolve("~nosuchuser/x")
    for path in ("a" * 5000, "a/" * 2500):
        with pytest.raises(InputError, match="cannot be looked up .File name too long.: give another") as caught:
            hub.resolve(path)
        assert len(str(caught.value)) < 200
    for path in ("a/" + "b" * 300, "a/b--c", "a/b."):
        with pytest.raises(InputError, match=r"\"a/b.* is not a valid repository name") as caught:
            hub.resolve(path)
        assert len(str(caught.value)) < 200
    Path("runs/first").mkdir(parents=True)
    with pytest.raises(InputError, match="folder runs/first holds no model/last: give the path of a model folder"):
        hub.resolve("runs/first/model/last")
    for path in ("./missing", "/no/such/folder", "a/b/.c", "a/b//c", "a/b/c/", "../b", ""):
        with pytest.raises(InputError, match="is no folder, .gguf file, owner/name of a hub or short name"):
            hub.resolve(path)


def test_built_in_model_is_the_default(tmp_path, monkeypatch):
    folder = tmp_path / "pico"
    folder.mkdir()
    monkeypatch.setattr("weights_io.built_in.ROOT", tmp_path)
    assert hub.resolve() == hub.resolve("pico") == folder
    folder.rmdir()
    with pytest.raises(InputError, match="built-in model pico is missing"):
        hub.resolve()


def test_modelscope_names_what_is_missing(monkeypatch):
    with pytest.raises(InputError, match="hub 'modelhub' is not known"):
        hub.resolve("minicpm-1b", hub="modelhub")
    with pytest.raises(InputError, match="no ModelScope repository of minicpm-2b-fp32"):
        hub.resolve("minicpm-2b-fp32", hub="modelscope")
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'minicpm-jax-mlx\[modelscope\]'"):
        hub.resolve("minicpm-1b", hub="modelscope")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", f'{{"a": {"1" * 5000}}}'])
def test_json_of_a_repository_that_cannot_be_read(server, tmp_path, text):
    server.repos[REPO, "main"] = {**FILES, "config.json": text.encode()}
    said = refusal(server, tmp_path, REPO)
    assert "config.json" in said and said.endswith("download it again.")
    assert server.fetched == ["config.json"]


def test_the_same_side_files_are_fetched_and_copied(server, tmp_path, reference):
    source = shutil.copytree(reference("dense_2b"), tmp_path / "source", copy_function=shutil.copyfile)
    for name in {*hub.FETCHED, "chat_template.json"} - {"config.json"}:
        (source / name).write_text("{}")
    server.repos[REPO, "main"] = {
        path.name: CONFIG if path.name == "config.json" else path.read_bytes() for path in source.iterdir()
    }
    folder = download(server, tmp_path / "cache", REPO)
    opened = open_checkpoint(source)
    save_checkpoint(tmp_path / "out", opened.config, opened.tensors, copy_from=source)
    fetched, copied = ({path.name for path in place.iterdir()} for place in (folder, tmp_path / "out"))
    assert fetched - {"quantize_config.json"} == copied
    assert "generation_config.json" in copied and "chat_template.json" not in copied


@pytest.mark.parametrize("weight_map", ['{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"])
def test_damaged_index(tmp_path, weight_map):
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text(weight_map)
    with pytest.raises(InputError, match="holds no weight_map"):
        hub.weight_files([name], lambda names: tmp_path)


def parameters(config: dict) -> int:
    """Sum over the shapes of a text model, written out by hand."""
    D, F, V, L = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    Q = config.get("head_dim", D // config["num_attention_heads"]) * config["num_attention_heads"]
    K = Q // config["num_attention_heads"] * config["num_key_value_heads"]
    experts = config.get("num_experts", 1)
    router = experts * D if experts > 1 else 0
    attention = 2 * D * Q + 2 * D * K
    if "kv_lora_rank" in config:
        N, Q, C = (config[key] for key in ("num_attention_heads", "q_lora_rank", "kv_lora_rank"))
        E, R = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        attention = Q * (D + 1 + N * (E + R)) + (C + R) * D + C * (1 + N * E + D) + D * D
    layer = attention + experts * 3 * D * F + router + 2 * D
    return L * layer + D + (1 if config.get("tie_word_embeddings", True) else 2) * V * D


def test_catalog():
    names = [entry.name for entry in catalog.CATALOG]
    repos = [entry.repo for entry in catalog.CATALOG if entry.repo is not None]
    assert len(set(names)) == len(names) and len(set(repos)) == len(repos)
    for entry in catalog.CATALOG:
        assert entry.repo is None or hub.REPOSITORY.fullmatch(entry.repo)
        assert entry.architecture in FAMILIES
        if entry.config:
            assert entry.config.get("torch_dtype") == entry.dtype
            if entry.architecture != "minicpmv":
                assert parameters(dict(entry.config)) == entry.parameters, entry.name
    assert catalog.find("MiniCPM-2B") is catalog.find("openbmb/MiniCPM-2B-sft-bf16") is not None
    assert catalog.find("gpt-2") is None
