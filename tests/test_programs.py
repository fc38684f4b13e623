"""Programs are compiled beside the running requests, and an error of one reaches only the requests that need it."""

import threading

import jax
import pytest
import tiny_model

import minicpm_jax
from minicpm_data.generation.options import CacheOptions, Sampling
from minicpm_data.generation.request import GenerationRequest
from minicpm_jax.generation.engine import Engine
from minicpm_jax.generation.programs import Key, Programs
from minicpm_serve.engine import ServingEngine

LONG = [1, *range(3, 60)] * 4
REQUESTS = [  # prompt, most tokens, sampling
    ([1, 7, 9], 4, {}),
    (LONG, 300, {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.4, "seed": 3}),
    ([*LONG, 5], 4, {}),
]
A, B, C = (Key("decode", (size,)) for size in (1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("programs"), eos_token_id=None)


def test_what_is_asked_for_is_compiled_first_and_an_error_is_for_those_who_ask():
    begun, going, order, broken = threading.Event(), threading.Event(), [], {B}

    def compiled(key):
        order.append(key)
        begun.set()
        assert going.wait(60)
        if key in broken:
            raise RuntimeError("no memory")
        return key

    table = Programs(compiled)
    table.warm([A, B, C, A])
    assert begun.wait(60) and table.counts() == {"ready": 0, "compiling": 1, "waiting": 2}
    assert not table.ready([C]) and not table.ready([A, C])  # A is on its way
    going.set()
    while table.counts()["waiting"] or table.counts()["compiling"]:
        table.wait(table.changes)
    assert order == [A, C, B] and table.ready([A, C])  # the error of B, for which nobody waited, is for nobody
    assert not table.ready([B])
    table.wait(3)
    with pytest.raises(RuntimeError, match="no memory"):
        table.ready([A, B])
    broken.clear()
    assert not table.ready([B])  # it is tried again
    table.wait(4)
    assert table.ready([A, B, C]) and order == [A, C, B, B, B]


def test_a_closed_table_waits_for_the_program_that_is_being_compiled():
    begun, done = threading.Event(), []

    def compiled(key):
        begun.set()
        done.append(key)

    table = Programs(compiled)
    table.warm([A, B, C])
    assert begun.wait(60)
    table.close()
    after = list(done)
    assert not table.ready([Key("late")]) and done == after and table.counts()["compiling"] == 0


@pytest.mark.parametrize(("axes", "bits"), [(None, None), (("data", "tensor"), 8)])
def test_no_program_is_compiled_by_the_thread_that_decodes(folder, axes, bits):
    """Prompts of all lengths, a penalty, a longer answer, a shared beginning; on one device, and int8 over a mesh."""
    mesh = None if axes is None else jax.make_mesh((2, 2), axes, devices=jax.devices()[:4])
    model, _ = minicpm_jax.load(folder, "float32", mesh=mesh)
    jax.clear_caches()
    engine = Engine(model, slots=2, cache_options=CacheOptions(kv_bits=bits))
    here, compiled = threading.get_ident(), []

    def listen(event, seconds, **given):
        if event.endswith("backend_compile_duration") and threading.get_ident() == here:
            compiled.append(given.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for prompt, most, sampling in REQUESTS:
            engine.add(GenerationRequest.of(model, None, [prompt], most, Sampling(**sampling), engine.cache_options))
        while not engine.idle:
            engine.step()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    ours = {"prefill", "first_token", "insert", "decode", "vacate"}
    assert not [name for name in compiled if any(each in str(name) for each in ours)]
    assert {key.name for key in engine._programs._ready} == ours


def test_an_error_reaches_the_request_that_needs_the_program(folder, monkeypatch):
    engine = ServingEngine("jax", minicpm_jax.load(folder, "float32")[0], None, slots=2)
    lowered = engine._engine.shapes.lowered

    def fails(key, rows):
        if key.name == "prefill":
            raise RuntimeError("the compiler has no memory")
        return lowered(key, rows)

    monkeypatch.setattr(engine._engine.shapes, "lowered", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        list(engine.stream_generate(LONG, 4))
    assert engine.error is None
    monkeypatch.undo()
    assert len(list(engine.stream_generate(LONG, 4))) == 4
    engine.close()
    assert engine.programs["compiling"] == 0
