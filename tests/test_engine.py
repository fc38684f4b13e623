"""Requests that share an engine get the tokens of runs by themselves."""

import importlib
import threading

import numpy as np
import pytest
import tiny_model

from minicpm_data.generation.options import CacheOptions, Sampling
from minicpm_data.generation.pages import PagePool
from minicpm_data.generation.request import GenerationRequest
from minicpm_serve import engine as serve
from weights_io.errors import InputError

END = 57
SAMPLED = {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.4, "seed": 3}
LONG = [1, *range(20, 60)]
REQUESTS = [  # prompt, most tokens, sampling
    ([1, 7, 9], 12, {}),
    (LONG, 20, {}),
    ([1, 5], 9, SAMPLED),
    ([*LONG[:30], 4, 4], 14, {"temperature": 1.1, "xtc_probability": 0.5, "xtc_threshold": 0.02, "seed": 8}),
    ([2, 3, 4], 15, {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {9: 2.0, 60: -100}}),
]


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def model(backend, tmp_path_factory):
    return backend.load(tiny_model.write(tmp_path_factory.mktemp("engine"), eos_token_id=END), "float32")[0]


@pytest.fixture(scope="module")
def alone(backend, model):
    """The tokens of each request by itself."""
    runs = [
        backend.stream_generate(model, None, prompt, max_tokens, **sampling)
        for prompt, max_tokens, sampling in REQUESTS
    ]
    return [[r.token for r in run] for run in runs]


def make(backend, model, **options):
    return importlib.import_module(f"{backend.__name__}.generation.engine").Engine(model, **options)


def asked(engine, prompt, max_tokens, **sampling):
    return GenerationRequest.of(engine.model, None, [prompt], max_tokens, Sampling(**sampling), engine.cache_options)


def add(engine, index):
    prompt, max_tokens, sampling = REQUESTS[index]
    return engine.add(asked(engine, prompt, max_tokens, **sampling))


def run(engine, until=lambda found: False):
    """The tokens of each request until all are over."""
    found, over = {}, set()
    while not engine.idle and not until(found):
        for made in engine.step():
            assert made.number not in over
            found.setdefault(made.number, []).append(made.token)
            over |= {made.number} if made.last else set()
    return found


def test_requests_come_and_go(backend, model, alone):
    """Two slots for five requests of all lengths, the later ones arriving while the first are decoded."""
    engine = make(backend, model, slots=2, cache_options=CacheOptions(prefill_step_size=16))
    numbers = [add(engine, 0), add(engine, 1)]
    found = run(engine, lambda found: len(found.get(1, ())) > 3)
    numbers += [add(engine, i) for i in (2, 3, 4)]
    for number, tokens in run(engine).items():
        found[number] = found.get(number, []) + tokens
    assert [found[number] for number in numbers] == alone


def test_over_a_mesh(tmp_path_factory, alone, backend):
    """Heads over tensor, weights over all."""
    if backend.__name__ != "minicpm_jax":
        pytest.skip("MLX has no mesh")
    import jax

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    folder = tiny_model.write(tmp_path_factory.mktemp("mesh"), eos_token_id=END)
    engine = make(backend, backend.load(folder, "float32", mesh=mesh)[0], slots=4)
    assert engine.state.cache.k.sharding.spec == jax.P(None, None, None, "tensor")
    assert run_one(engine, 1) == alone[1]
    numbers = [add(engine, index) for index in (2, 1, 4)]
    found = run(engine)
    assert [found[number] for number in numbers] == [alone[index] for index in (2, 1, 4)]


def test_a_group_never_has_the_last_slot_and_takes_turns(tmp_path):
    """Ten requests of one group, then two others: these do not wait for them, in three slots or in one. Who has a turn
    is said by what both engines share, and MLX has no programs to compile for other numbers of slots."""
    backend = pytest.importorskip("minicpm_mlx")
    model = backend.load(tiny_model.write(tmp_path, eos_token_id=END), "float32")[0]
    for slots, before in ((3, 2), (1, 1)):
        engine = make(backend, model, slots=slots)
        group = engine.group()
        for _ in range(10):
            engine.queued.append(engine.admitted(asked(engine, [1, 7, 9], 12), group))
        run(engine, lambda found: bool(found))
        alone = [engine.add(asked(engine, [1, 5], 3)) for _ in range(2)]
        over = []
        while not engine.idle:
            assert sum(request.group == group for request in engine.running.values()) <= max(1, slots - 1)
            over += [made.number for made in engine.step() if made.last]
        assert max(map(over.index, alone)) < 2 * before + 2 and len(over) == 12


def test_a_cancelled_request_gives_up_its_slot(backend, model, alone):
    engine = make(backend, model, slots=2, cache_options=CacheOptions(prefill_step_size=16))
    first, second, third, never = add(engine, 1), add(engine, 1), add(engine, 0), add(engine, 2)
    run(engine, lambda found: first in found)  # the prompt of the second may be on its way
    for number in (first, second, never):
        engine.cancel(number)
    found = run(engine)
    assert found == {third: alone[0]}
    engine.cancel(third)  # over: nothing to do
    assert engine.idle and engine.step() == []


def test_a_prompt_that_begins_alike_is_not_run_twice(backend, model, alone, monkeypatch):
    engine = make(backend, model, slots=2, cache_options=CacheOptions(prefill_step_size=16))
    assert run(engine) == {} and run_one(engine, 1) == alone[1]
    ran, decoding = [], importlib.import_module(f"{backend.__name__}.generation.decoding")
    name = "prefill" if backend.__name__ == "minicpm_jax" else "prefill_chunks"
    real = getattr(decoding, name)
    monkeypatch.setattr(decoding, name, lambda *given, **named: ran.append(1) or real(*given, **named))
    assert run_one(engine, 3) == alone[3]  # 30 of 32 tokens are there
    assert run_one(engine, 1) == alone[1]  # all 41
    assert len(ran) <= 2  # a piece each, if any; without pages that are shared they would be 2 and 3
    history = [*LONG, *alone[1]][:-1]
    expected = [r.token for r in backend.stream_generate(model, None, [*history, 6], max_tokens=4)]
    number = engine.add(asked(engine, [*history, 6], 4))
    assert run(engine)[number] == expected  # a conversation that goes on


def test_requests_that_give_up_their_pages_go_on_as_if_they_had_not(backend, model):
    """Four answers that grow to 53 tokens where there are pages for 96; the oldest is never interrupted."""
    asks = [([1, 7, 9], {}), ([1, 5], SAMPLED), ([2, 3, 4], {"frequency_penalty": 1.3}), ([8], SAMPLED | {"seed": 5})]
    runs = [backend.stream_generate(model, None, prompt, 50, **sampling) for prompt, sampling in asks]
    expected = [[r.token for r in run] for run in runs]
    engine = make(backend, model, slots=4, context=64)
    engine.pool = PagePool(1 + 96 // min(engine.pool.page, 32), min(engine.pool.page, 32))  # that of MLX only counts
    numbers = [engine.add(asked(engine, prompt, 50, **sampling)) for prompt, sampling in asks]
    oldest, preempt = [], engine._preempt

    def preempted():
        before = set(engine.running)
        preempt()
        oldest.append(min(before) in engine.running)

    engine._preempt = preempted
    found = run(engine)
    assert [found[number] for number in numbers] == expected
    assert engine.preemptions == len(oldest) >= 1 and all(oldest)


def test_answers_to_one_prompt_share_its_pages(model, alone, backend):
    if backend.__name__ != "minicpm_jax":
        pytest.skip("in MLX each request has a cache of its own")
    engine = make(backend, model, slots=4, cache_options=CacheOptions(prefill_step_size=16))
    numbers = [add(engine, 1) for _ in range(3)]
    shared = []
    found = run(engine, lambda found: shared.append({s.row.pages[0] for s in engine.running.values()}) and False)
    assert [found[number] for number in numbers] == [alone[1]] * 3 and max(map(len, shared)) == 1


def run_one(engine, index):
    number = add(engine, index)
    return run(engine)[number]


@pytest.mark.parametrize("name", ["long_128k", "minicpm4_8b"])
def test_scaled_rope_rotates_each_prompt_by_its_own_length(backend, reference, name):
    """The original's tokens of prompts on both sides of the 32 tokens from which RoPE is scaled otherwise."""
    folder = reference(name)
    model, _ = backend.load(folder, "float32")
    data = np.load(folder / "reference.npz")
    engine = make(backend, model, slots=2, context=64, cache_options=CacheOptions(prefill_step_size=16))
    prompts = [data[f"prompt_ids_{name}"][0].tolist() for name in ("P20", "P40", "P40")]
    numbers = [engine.add(asked(engine, prompt, 16)) for prompt in prompts]  # the last one could share with the second
    found = run(engine)
    for number, name in zip(numbers, ("P20", "P40", "P40"), strict=True):
        assert found[number] == data[f"greedy_ids_{name}"][int(name[1:]) :][:16].tolist()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda engine: engine.add(asked(engine, [], 4)), "empty"),
        (lambda engine: engine.add(asked(engine, [10**6], 4)), "1000000"),
        (lambda engine: engine.add(asked(engine, [1], 0)), "max_tokens is 0"),
        (lambda engine: engine.add(asked(engine, [1] * 30, 40)), "30 tokens and 40 more are above the 64"),
        (
            lambda engine: engine.add(GenerationRequest.of(engine.model, None, [[1]], cache=CacheOptions(8))),
            "share its cache_options",
        ),
    ],
)
def test_what_an_engine_cannot_take(backend, model, call, said):
    with pytest.raises(InputError, match=said):
        call(make(backend, model, slots=1, context=64))


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"context": -1}, {"cache_tokens": 9}, {"cache_options": CacheOptions(max_kv_size=16)}]
)
def test_engines_that_cannot_be(backend, model, options):
    with pytest.raises(InputError):
        make(backend, model, **options)


@pytest.fixture
def served(backend, model):
    engine = serve.ServingEngine(backend.__name__.removeprefix("minicpm_"), copy_of(backend, model), None, slots=2)
    yield engine
    engine.close()


def copy_of(backend, model):
    """As an engine uses its model up."""
    if backend.__name__ == "minicpm_mlx":  # arrays that no thread has computed yet
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_map

        copy = type(model)(model.config)
        copy.load_weights(list(tree_flatten(tree_map(lambda x: x + mx.zeros_like(x), model.parameters()))))
        return copy
    import jax

    return jax.tree.map(lambda x: x.copy(), model)


def test_a_request_that_nobody_holds_is_cancelled(served):
    with pytest.raises(InputError, match="stop holds an empty text"):
        served.stream_generate(LONG, 20, stop="")
    served.stream_generate(LONG, 20)  # and dropped before its first token
    served.close()  # asked after the cancellations
    assert not served._answers


def test_threads_share_an_engine(backend, served, alone):
    found = {}

    def ask(index):
        prompt, most, sampling = REQUESTS[index]
        found[index] = [r.token for r in served.stream_generate(prompt, most, **sampling)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    left = served.stream_generate(LONG, 20)
    assert next(left).token == alone[1][0]
    left.close()  # cancelled
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(REQUESTS))] == alone
    with pytest.raises(InputError, match="outside the vocabulary"):
        served.stream_generate([10**6])
    with pytest.raises(InputError, match="more are above"):
        served.stream_generate([1], 10**6)
    served.close()
    with pytest.raises(InputError, match="closed"):
        served.stream_generate([1])


def test_an_engine_that_fails_says_so_to_everybody(served, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served._engine, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(served.stream_generate([1, 2], 4))
