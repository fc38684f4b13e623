"""What has no room is refused before it is allocated, with both numbers; and the numbers are those of the arrays."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
import tiny_training

from minicpm_data.cli import generate as commands
from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.request import GenerationRequest
from minicpm_serve import engine as serve
from weights_io import memory
from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("room"), intermediate_size=64, hidden_size=64)


@pytest.fixture(scope="module")
def model(backend, folder):
    return tiny_training.load(backend, folder)


@pytest.fixture
def free(backend, monkeypatch):
    """A device with so many bytes left."""
    device = tiny_training.part(backend, "device")
    return lambda count: monkeypatch.setattr(device, "free_memory", lambda *model: count)


def nbytes(backend, tree):
    if backend == "minicpm_jax":
        import jax

        # int4 is half a byte, whatever numpy says
        return sum(leaf.size // 2 if leaf.dtype == "int4" else leaf.nbytes for leaf in jax.tree.leaves(tree))
    from mlx.utils import tree_flatten

    return sum(leaf.nbytes for _, leaf in tree_flatten(tree))


def test_weights(backend, folder, model, free, monkeypatch):
    weights = nbytes(backend, model if backend == "minicpm_jax" else model.parameters())
    assert weights == memory.weight_bytes(model.config, "float32")
    free(weights)
    tiny_training.load(backend, folder)
    monkeypatch.setattr(Checkpoint, "read", None)  # is not called
    free(weights - 1)
    said = r"the weights in float32 would take 0\.[0-9] MB, and 0\.[0-9] MB are free; keep them in fewer bits"
    with pytest.raises(InputError, match=said):
        tiny_training.load(backend, folder)
    with pytest.raises(InputError, match="are free; train adapters"):  # what has no --quantize does not name it
        tiny_training.load(backend, folder, **tiny_training.full(folder, folder).loading())


@pytest.mark.parametrize(("bits", "remedy"), [(8, "keep them in fewer bits .--quantize 4., take"), (4, "take")])
def test_packed_weights(backend, folder, model, free, bits, remedy):
    """What is refused is what has no room when it is packed; the table of words is packed to generate alone."""
    options = tiny_training.lora(folder, folder, quantize=bits).loading()
    packed = [memory.packed_bytes(model.config, "float32", bits, head) for head in (False, True)]
    free(packed[0])
    found = tiny_training.load(backend, folder, **options)
    held = nbytes(backend, found if backend == "minicpm_jax" else found.parameters())
    assert held <= packed[0] < 1.1 * held < memory.weight_bytes(model.config, "float32")
    free(packed[1])
    tiny_training.load(backend, folder, quantize=bits)
    with pytest.raises(InputError, match=f"the weights in int{bits} would take .* are free; {remedy}"):
        tiny_training.load(backend, folder, **options)


def test_a_command_says_it_in_a_sentence(backend, folder, free, monkeypatch, capsys):
    free(10**5)
    monkeypatch.setattr("sys.argv", ["generate", "--model", str(folder)])
    with pytest.raises(SystemExit) as ended:
        commands.run_generate(tiny_training.part(backend, "backend").backend, "generate")
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    assert "the weights in float32 would take 0.3 MB, and 0.1 MB are free; keep" in told.err
    assert "Traceback" not in told.err


def test_a_prompt(backend, model, free):
    generate = importlib.import_module(backend).generate
    free(memory.cache_bytes(model.config, 2048, "float32"))
    assert isinstance(generate(model, None, [1, 2], max_tokens=3), str)
    with pytest.raises(InputError, match=r"keys and values of 1 x [23],[0-9]+ tokens would take .*shorter prompt"):
        generate(model, None, [1] * 2500, max_tokens=3)


def test_an_engine_and_its_remedy(backend, model, free):
    engine = importlib.import_module(f"{backend}.generation.engine").Engine
    free(memory.cache_bytes(model.config, 3072, "float32"))
    with pytest.raises(InputError, match=r"of 4,096 tokens would take .* are free; lower context \(to ") as told:
        engine(model, slots=8, context=4096)
    context = int(str(told.value).partition("(to ")[2].split()[0].replace(",", ""))
    assert 2048 <= context < 3072
    with pytest.raises(InputError, match=r"of 9,000 tokens would take .*; lower cache_tokens, or leave it out"):
        engine(model, slots=4, context=context, cache_tokens=9000)
    fits = engine(model, slots=4, context=context)
    assert context <= (fits.pool.pages - 1) * fits.pool.page <= 3072
    number = fits.add(GenerationRequest.of(model, None, [[1, 5, 7]], 6))
    made = []
    while not fits.idle:
        made += [each.token for each in fits.step() if each.number == number]
    stream = importlib.import_module(backend).stream_generate
    assert made == [r.token for r in stream(model, None, [1, 5, 7], max_tokens=6)][: len(made)] and len(made) == 6


def test_a_server_takes_what_there_is_room_for(backend, folder, free):
    """Requests share the room; where not even one has it, the context is shorter, if nobody asked for one."""

    def taken(bytes_left, *asked):
        free(None)
        model = tiny_training.load(backend, folder)
        free(bytes_left)
        engine = serve.ServingEngine(backend.removeprefix("minicpm_"), model, None, *asked)
        engine.close()
        return engine.slots, engine.context

    row = memory.cache_bytes(ModelConfig.from_file(folder / "config.json"), 2048, "float32")
    assert taken(None) == taken(20 * row) == taken(2 * row) == (8, 2048)
    slots, context = taken(row // 2, 4)
    assert slots == 4 and 256 <= context < 2048
    with pytest.raises(InputError, match="of 2,048 tokens would take"):
        taken(row // 2, None, 2048)
    with pytest.raises(InputError, match=r"of 2,048 tokens would take .*; take a smaller model"):
        taken(1)


def test_training(backend, tmp_path, free):
    tiny_training.write_world(tmp_path)
    free(4 * memory.weight_bytes(tiny_training.load(backend, tmp_path / "model").config, "float32") - 1)
    with pytest.raises(InputError, match=r"training all weights \(masters, gradients and moments\) would take"):
        tiny_training.trainer(backend, tiny_training.full(tmp_path, tmp_path / "out"))
    tiny_training.trainer(backend, tiny_training.lora(tmp_path, tmp_path / "lora"))


@pytest.mark.parametrize("bits", [None, 8])
def test_the_cache_is_as_large_as_was_said(backend, model, bits):
    decoding = tiny_training.part(backend, "generation.decoding")
    if backend == "minicpm_jax":
        cache, _ = decoding.empty(model, 2, 64, bits)
        assert nbytes(backend, cache) == decoding.cache_bytes(model, 2, 64, CacheOptions(kv_bits=bits))
        return
    import mlx.core as mx

    options = CacheOptions(kv_bits=bits, kv_group_size=32 if bits else None)
    if bits:  # heads of 16 numbers have no groups
        model = tiny_training.part(backend, "model").initialize(memory_config(model), mx.random.key(0))
    cache = decoding.make_cache(model, [0], options)
    decoding.prefill_chunks(model, mx.array([[1] * 250]), cache, 250, 250)  # MLX makes room for 256
    found = sum(leaf.nbytes for layer in cache for leaf in flat(layer.keys) + flat(layer.values))
    assert found == decoding.cache_bytes(model, 1, 256, options)


def memory_config(model):
    import dataclasses

    return dataclasses.replace(model.config, head_dim=32, num_attention_heads=2, num_key_value_heads=2)


def flat(part):
    return list(part) if isinstance(part, (list, tuple)) else [part]


def test_the_devices_of_a_mesh_share_the_memory_of_a_cpu(monkeypatch):
    jax = pytest.importorskip("jax")
    device, sharding = (importlib.import_module(f"minicpm_jax.{name}") for name in ("device", "sharding"))
    monkeypatch.setattr(device, "host_free", lambda: 800)
    meshes = None, sharding.make_mesh("tensor=2", jax.devices()[:2]), sharding.make_mesh("fsdp=8")
    assert [device.free_memory(mesh) for mesh in meshes] == [800, 400, 100]


@pytest.mark.parametrize(("elsewhere", "least"), [(10**12, 5 * 10**11), (10**11 + 1, 10**11 + 1), (None, 5 * 10**11)])
def test_processes_agree_on_the_least(monkeypatch, elsewhere, least):
    """Else one would refuse, and the others wait for it."""
    jax = pytest.importorskip("jax")
    from jax.experimental import multihost_utils

    device = importlib.import_module("minicpm_jax.device")
    asked = []

    def gathered(own):
        asked.append(own)
        return np.stack([own, np.array([elsewhere or np.iinfo(np.int64).max]).view(np.uint8)])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(device, "host_free", lambda: 10**12)
    several = SimpleNamespace(local_devices=jax.devices()[:2], is_multi_process=True)
    assert device.free_memory(several) == least and asked[0].dtype == np.uint8
    assert device.free_memory() == 10**12 and len(asked) == 1  # of a model that lies here alone nobody else hears


def test_what_an_engine_of_mlx_keeps_is_bounded():
    pytest.importorskip("mlx.core")
    pico = importlib.import_module("minicpm_mlx").load(dtype="float32")[0]
    engine = importlib.import_module("minicpm_mlx.generation.engine").Engine(pico, slots=4, context=96)
    for first in (3, 4, 5, 6):
        engine.add(GenerationRequest.of(pico, None, [[1, *[first] * 39]], 2))
        while not engine.idle:
            engine.step()
    assert [kept.text[1] for kept in engine.kept] == [5, 6]  # a page each of two
