"""A command resolves its model's name once, and opens the checkpoint once: each header is read once."""

import importlib
import io
import runpy
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_adapter
import tiny_model
import tiny_training
from test_hub import Server

from weights_io import hub
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_checkpoint, open_model
from weights_io.config import ModelConfig
from weights_io.files import safetensors
from weights_io.write import save_checkpoint

REPO = "openbmb/sharded"
MESH = {"--mesh": "fsdp=2,tensor=4"}
TRAIN = {"--data": "{data}", "--iters": 1, "--batch-size": 2, "--max-seq-length": 32, "--warmup-steps": 0}
# What each command needs besides its model, and whether a mesh may be named.
COMMANDS = {
    "generate": ({"--prompt": "The fox", "--max-tokens": 1}, True),
    "chat": ({}, True),
    "lora": ({**TRAIN, "--adapter-path": "{out}"}, True),
    "finetune": ({**TRAIN, "--save-path": "{out}"}, True),
    "fuse": ({"--adapter-path": "{adapter}", "--save-path": "{out}"}, False),
    "evaluate": ({"--data": "{data}/valid.jsonl", "--limit": 1, "--max-tokens": 1, "--batch-size": 1}, True),
    "parity": ({"--reference": "{reference}"}, True),
    "kv_error": ({"--prompt": "The fox", "--max-tokens": 4}, True),
}
SERVED = {
    "openai_api": ({"--port": 0, "--max-num-seqs": 1, "--max-model-len": 16}, True),
    "longcontext": ({"--max-seq-length": 300, "--num-samples": 1}, True),
}
OTHERS = {
    "minicpm_serve.retrieval": {"--lengths": (300, 310), "--num-samples": 1, "--save-path": "{out}/x.jsonl"},
    "weights_io.convert": {"--to": "hf", "--save-path": "{out}"},
    "weights_io.inspect": {},
    "weights_io.upcycle": {"--save-path": "{out}"},
    "weights_io.adapters": {"--to": "mlx_lm", "--adapter-path": "{adapter}", "--save-path": "{out}"},
}
WITHOUT_WEIGHTS = ("minicpm_serve.retrieval", "weights_io.inspect", "weights_io.adapters")
CASES = [(f"minicpm_{backend}.{name}", *how) for backend in ("jax", "mlx") for name, how in COMMANDS.items()]
CASES += [
    (f"minicpm_serve.{name}", {"--backend": backend, **flags}, mesh)
    for backend in ("jax", "mlx")
    for name, (flags, mesh) in SERVED.items()
]
CASES += [(name, flags, False) for name, flags in OTHERS.items()]
QUICK = ("minicpm_jax.generate", "minicpm_mlx.generate", "minicpm_mlx.finetune", *OTHERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model in several files, and what the commands read besides."""
    root = tmp_path_factory.mktemp("one_way_in")
    heads = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    whole = open_checkpoint(tiny_model.write(root / "whole", **heads))
    files = save_checkpoint(
        root / "model",
        whole.config,
        whole.tensors,
        raw_config=whole.raw_config,
        copy_from=whole.path,
        max_shard_bytes=2**17,
    )
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    tiny_training.write_data(root / "data", tiny_training.chats(2), valid=tiny_training.chats(2, seed=1))
    save_adapter(root / "adapter", tiny_adapter.make(whole, ("q_proj",)), whole.config)
    np.savez(root / "reference.npz", input_ids=np.ones((1, 2), int), logits=np.zeros((1, 2, whole.config.vocab_size)))
    return root


@pytest.fixture
def headers(monkeypatch):
    """How often the header of each safetensors file has been read."""
    counts: Counter[str] = Counter()
    read = safetensors._read_header

    def counted(path):
        counts[path.name] += 1
        return read(path)

    monkeypatch.setattr(safetensors, "_read_header", counted)
    return counts


@pytest.fixture
def server(world, monkeypatch):
    """A hub that has the model."""
    from huggingface_hub import constants

    with Server() as server:
        server.repos[REPO, "main"] = {path.name: path.read_bytes() for path in (world / "model").iterdir()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def cache(folder: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def run(command: str, flags: dict, model: str, world: Path, out: Path, monkeypatch) -> None:
    """``python -m COMMAND`` in this process."""
    places = {name: world / name for name in ("data", "adapter")}
    places |= {"reference": world / "reference.npz", "out": out}
    named = "--tokenizer" if command.endswith("retrieval") else "--model"
    typed = [command, named, model]
    for flag, value in flags.items():
        typed += [flag, *(str(v).format(**places) for v in (value if isinstance(value, tuple) else (value,)))]
    monkeypatch.setattr("sys.argv", typed)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    if command.endswith("openai_api"):  # which would not end
        module = importlib.import_module(command)
        monkeypatch.setattr(module, "server", lambda *_: Ends())
        return importlib.import_module("weights_io.command_line").run(module.main, module.Options, command)
    monkeypatch.delitem(sys.modules, command, raising=False)
    try:
        runpy.run_module(command, run_name="__main__")
    except SystemExit as stop:  # numbers that are not those of the reference
        assert command.endswith("parity") and stop.code == 1


class Ends:
    def run(self, sockets) -> None:
        """Serves nobody."""


def shards(world: Path) -> set[str]:
    return {path.name for path in (world / "model").glob("*.safetensors")}


def read_once(command: str, flags: dict, world: Path) -> dict[str, int]:
    """Which headers the command has to read."""
    names = set() if command in ("minicpm_serve.retrieval", "weights_io.adapters") else shards(world)
    return dict.fromkeys(names | ({"adapter_model.safetensors"} if "{adapter}" in flags.values() else set()), 1)


def cases(mesh: bool) -> list:
    """With ``mesh`` those of JAX name one."""
    found = []
    for command, flags, meshed in CASES:
        of_jax = "jax" in command or flags.get("--backend") == "jax"
        more = MESH if mesh and meshed and of_jax else {}
        marks = () if command in QUICK else pytest.mark.slow
        found.append(pytest.param(command, flags | more, id=f"{command} {flags.get('--backend', '')}", marks=marks))
    return found


@pytest.mark.parametrize(("command", "flags"), cases(mesh=False))
def test_a_folder_is_opened_once(command, flags, world, headers, tmp_path, monkeypatch):
    run(command, flags, str(world / "model"), world, tmp_path / "out", monkeypatch)
    assert headers == read_once(command, flags, world)


@pytest.mark.parametrize(("command", "flags"), cases(mesh=True))
def test_a_hub_is_asked_once(command, flags, world, server, headers, tmp_path, monkeypatch):
    """As often as for one download; the model is then opened once, over several devices too."""
    cache(tmp_path / "one", monkeypatch)
    hub.resolve(REPO, weights=command not in WITHOUT_WEIGHTS)
    one_download, fetched = list(server.asked), sorted(server.fetched)
    assert one_download and len(set(fetched)) == len(fetched)
    server.asked.clear()
    server.fetched.clear()
    cache(tmp_path / "two", monkeypatch)
    run(command, flags, REPO, world, tmp_path / "out", monkeypatch)
    assert (server.asked, sorted(server.fetched)) == (one_download, fetched)
    assert headers == ({} if command in WITHOUT_WEIGHTS else read_once(command, flags, world)) | (
        {"adapter_model.safetensors": 1} if "{adapter}" in flags.values() else {}
    )


def test_a_config_is_made_once(world, server, tmp_path, monkeypatch):
    made = []
    make = ModelConfig.from_dict
    monkeypatch.setattr(ModelConfig, "from_dict", lambda raw, source: made.append(source) or make(raw, source))
    cache(tmp_path, monkeypatch)
    assert open_model(REPO).config == open_model(world / "model").config
    assert made == [f"config.json of {REPO}", str(world / "model" / "config.json")]
    assert open_model(REPO, weights=False).tensors == {}


def test_a_mesh_may_follow_from_the_config(world, headers):
    from minicpm_jax import load
    from minicpm_jax.parallel.sharding import serving_mesh

    model, _ = load(world / "model", mesh=serving_mesh)
    assert model.mesh.shape == {"fsdp": 8}  # heads of 32 fill no lanes of a device each
    assert headers == dict.fromkeys(shards(world), 1)
    assert load(world / "model", mesh=lambda config: None)[0].mesh is None
