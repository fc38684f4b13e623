"""Several LoRA adapters in one batch: each request gets the tokens of a model with its adapter alone."""

import dataclasses
import importlib

import numpy as np
import pytest
import tiny_adapter
import tiny_model
from fastapi.testclient import TestClient

from minicpm_data.generation.adapters import read_adapters
from minicpm_data.generation.options import CacheOptions, Sampling
from minicpm_data.generation.pages import PagePool
from minicpm_data.generation.request import GenerationRequest
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.app import application
from weights_io.adapters import save_adapter
from weights_io.checkpoint import open_model
from weights_io.errors import InputError

NAMES = ("attention", "everything", "second-layer")
PROMPT = [1, *range(20, 79)]  # 60 tokens: an answer needs a third page of 32
SAMPLED = {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.4, "seed": 3}
REQUESTS = [(index, sampling) for sampling in ({}, SAMPLED) for index in range(4)]  # adapter (0: none), sampling


def write_adapters(folder, source, names=NAMES, **changes):
    """Adapters of different ranks, scales, modules, layers and file formats."""
    checkpoint = open_model(source)
    attention = ("q_proj", "o_proj") if not checkpoint.config.is_latent else ("q_a_proj", "o_proj")
    kinds = {
        "attention": ({"targets": attention, "ranks": (2,), "seed": 1}, "peft"),
        "everything": ({"targets": ("all-linear",), "ranks": (4, 3), "seed": 2}, "peft"),
        "second-layer": ({"targets": ("o_proj", "down_proj"), "layers": (1,), "ranks": (8,), "seed": 3}, "mlx_lm"),
    }
    for name in names:
        kind, form = kinds[name]
        adapter = tiny_adapter.make(checkpoint, **{**kind, **changes})
        strong = {key: dataclasses.replace(each, b=100 * each.b) for key, each in adapter.tensors.items()}
        adapter = dataclasses.replace(adapter, tensors=strong)
        save_adapter(folder / name, adapter, checkpoint.config, form=form)
    return folder


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("base"), eos_token_id=57)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), source)


@pytest.fixture(scope="module")
def model(backend, source, folder):
    return backend.load(source, "float32", adapters=folder, decoding=True)[0]


@pytest.fixture(scope="module")
def alone(backend, source, folder):
    """The tokens of each request by a model with its adapter alone."""
    found = {}
    for index in range(4):
        own = backend.load(source, "float32", adapter=None if index == 0 else folder / NAMES[index - 1])[0]
        for sampling in ({}, SAMPLED):
            run = backend.stream_generate(own, None, PROMPT, 12, **sampling)
            found[index, bool(sampling)] = [response.token for response in run]
    assert len({tuple(tokens) for tokens in found.values()}) == 8  # the adapters change the answers
    return [found[index, bool(sampling)] for index, sampling in REQUESTS]


def run(engine, model):
    """The tokens of all requests, submitted at once."""
    numbers = []
    for adapter, sampling in REQUESTS:
        request = GenerationRequest.of(model, None, [PROMPT], 12, Sampling(**sampling), engine.cache_options)
        numbers.append(engine.add(dataclasses.replace(request, adapter=adapter)))
    found = {number: [] for number in numbers}
    while not engine.idle:
        for made in engine.step():
            found[made.number].append(made.token)
    return [found[number] for number in numbers]


def test_a_mixed_batch_equals_each_alone(backend, model, alone):
    """One prompt goes through all adapters, so that shared pages would be wrong; and again, when the pages of
    each adapter are found."""
    engines = importlib.import_module(f"{backend.__name__}.generation.engine")
    engine = engines.Engine(model, slots=8, context=96, cache_options=CacheOptions(prefill_step_size=16))
    assert run(engine, model) == alone
    assert run(engine, model) == alone


def test_preempted_requests_keep_their_adapter(backend, model, alone):
    engines = importlib.import_module(f"{backend.__name__}.generation.engine")
    engine = engines.Engine(model, slots=8, context=96)
    engine.pool = PagePool(8, 32)  # as if memory held 7 pages
    assert run(engine, model) == alone
    assert engine.preemptions


def test_pages_belong_to_an_adapter():
    pool = PagePool(9, 4)
    text = list(range(9))
    row = pool.take(text, root=-1)
    pool.name(row, text)
    assert pool.shared(text, -1)[0] == row.pages[:2]
    assert pool.shared(text) == ([], 0)
    assert pool.shared(text, -2) == ([], -2)


@pytest.fixture(scope="module")
def engine(backend, model):
    found = ServingEngine(backend.__name__.removeprefix("minicpm_"), model, None, slots=2, context=96)
    yield found
    found.close()


def test_the_serving_engine_takes_names(engine, alone):
    for index, (adapter, sampling) in enumerate(REQUESTS[:4]):
        run = engine.stream_generate(PROMPT, 12, adapter=NAMES[adapter - 1] if adapter else None, **sampling)
        assert [response.token for response in run] == alone[index]
    with pytest.raises(InputError, match="'attention'") as error:
        engine.stream_generate(PROMPT, 12, adapter="other")
    assert error.value.option == "adapter"


def test_what_cannot_share_a_batch_is_refused(source, folder, tmp_path):
    config = open_model(source).config
    names, arrays = read_adapters(folder, config)
    assert names == NAMES
    a, b = arrays["model.layers.self_attn.o_proj.weight"]
    assert a.shape[1:3] == (4, 8) and not a[:, 0].any() and not b[0, 3].any() and b[1, 3].any()
    np.testing.assert_array_equal(a[:, 2, 4:], 0)
    wrong = tiny_model.write(tmp_path / "wider", hidden_size=64)
    dora = write_adapters(tmp_path / "dora", source, ("attention",), dora=True)
    other = write_adapters(tmp_path / "other", wrong, ("attention",))
    for path in (tmp_path / "nothing", folder / "attention", dora):
        with pytest.raises(InputError) as error:
            read_adapters(path, config)
        assert error.value.option == "adapters"
    with pytest.raises(InputError, match="expects"):
        read_adapters(other, config)


def test_the_api_serves_a_model_for_each_adapter(engine, alone):
    client = TestClient(application(engine, "base"))
    listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert listed == ["base", *(f"base:{adapter}" for adapter in NAMES)]
    assert client.get("/v1/models/base:everything").json()["id"] == "base:everything"
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "model": "base:second-layer"}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["model"] == "base:second-layer" and answer["usage"]["completion_tokens"] == len(alone[3])
    refused = client.post("/v1/completions", json={**body, "model": "base:other"})
    assert refused.status_code == 404
    assert "'base:attention'" in refused.text and "and 1 more" in refused.text
