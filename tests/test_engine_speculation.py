"""Speculation in an engine gives every request its tokens, whatever is guessed; so do the texts of prompt caches."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from minicpm_data.fingerprint import fingerprint
from minicpm_data.generation import guessing
from minicpm_data.generation.beginnings import Beginnings
from minicpm_data.generation.constraint import Constraint
from minicpm_data.generation.guessing import AGAIN, TRIALS, Pace
from minicpm_data.generation.options import Sampling
from minicpm_data.generation.pages import PagePool
from minicpm_data.generation.prompt_cache import open_prompt_cache, write_prompt_cache
from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.speculation import Speculation, check_tokenizers
from minicpm_serve import openai_api
from minicpm_serve.http.metrics import Metrics
from weights_io.built_in import built_in
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.write import save_checkpoint

PICO = built_in()

SAMPLED = {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "seed": 3}
ASKS = [  # prompt, most tokens, sampling, grammar
    ("The fox and the fox and the fox and the", 40, {}, None),
    ("12 + 30 =", 12, {}, None),
    ("The hare", 24, SAMPLED, None),
    ("Say it: ", 16, {}, "start: /[a-z ]{4,40}/"),
    ("The fox", 24, {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.02, "seed": 8}, None),
]


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def pico(backend):
    return backend.load(PICO, "float32")


@pytest.fixture(scope="module")
def cut(backend, tmp_path_factory):
    """Pico with its first layer alone: a draft model that guesses right now and then."""
    whole = open_checkpoint(PICO)
    raw = whole.config.to_dict() | {"num_hidden_layers": 1}
    tensors = {name: x for name, x in whole.tensors.items() if ".layers." not in name or ".layers.0." in name}
    folder = tmp_path_factory.mktemp("cut")
    save_checkpoint(folder / "model", type(whole.config).from_dict(raw), tensors, raw_config=raw, copy_from=PICO)
    return folder / "model", backend.load(folder / "model", "float32")[0]


@pytest.fixture
def always(monkeypatch):
    """Guessing, whether it pays or not."""
    monkeypatch.setattr(Pace, "pays", lambda self, running: True)


def make(backend, model, **options):
    return importlib.import_module(f"{backend.__name__}.generation.engine").Engine(model, **options)


def requests(engine, tokenizer):
    for prompt, most, sampling, grammar in ASKS:
        request = GenerationRequest.of(
            engine.model, tokenizer, [prompt], most, Sampling(**sampling), engine.cache_options
        )
        if grammar is not None:
            held = Constraint.of(grammar, tokenizer, engine.model.config.vocab_size, request.end_ids, "grammar")
            request = GenerationRequest(request.prompts, most, request.sampling, request.end_ids, constraint=held)
        yield request


def answers(engine, asked):
    numbers, found = [engine.add(request) for request in asked], {}
    while not engine.idle:
        for made in engine.step():
            found.setdefault(made.number, []).append(made.token)
    return [found[number] for number in numbers]


@pytest.fixture(scope="module")
def plain(backend, pico):
    return make(backend, pico[0], slots=4)


@pytest.fixture(scope="module")
def expected(backend, pico, plain):
    """The answers without speculation. Those of single runs are compared in MLX, where no program is compiled."""
    model, tokenizer = pico
    found = answers(plain, requests(plain, tokenizer))
    for tokens, (prompt, most, sampling, grammar) in zip(found, ASKS, strict=True):
        if grammar is None and backend.__name__ == "minicpm_mlx":
            assert tokens == [r.token for r in backend.stream_generate(model, tokenizer, prompt, most, **sampling)]
    return found


@pytest.mark.parametrize("source", ["lookup", "draft"])
def test_every_answer_is_that_of_plain_decoding(backend, pico, cut, plain, expected, always, source):
    model, tokenizer = pico
    if source == "lookup" and backend.__name__ == "minicpm_jax":
        pytest.skip("one more program to compile, for guesses of the host")
    draft = None if source == "lookup" else cut[1]
    engine = make(backend, model, slots=4, speculation=Speculation(draft, draft is None, 3))
    assert answers(engine, requests(engine, tokenizer)) == expected
    assert 0 < engine.guessing.accepted <= engine.guessing.drafted
    # Where four answers of two pages have five, some give theirs up, and go on later.
    engine = make(backend, model, slots=4, speculation=Speculation(draft, draft is None, 3))
    engine.pool = PagePool(6, min(engine.pool.page, 32))  # that of MLX only counts
    asked = [
        GenerationRequest((PromptIds(prompt, 2048),), 50, sampling)
        for prompt, sampling in (
            ([1, 5], Sampling()),
            ([1, 7], Sampling(**SAMPLED)),
            ([3, 8], Sampling()),
            ([4], Sampling()),
        )
    ]
    assert answers(engine, asked) == answers(plain, asked) and engine.preemptions > 0


def test_latents_and_scaled_rope(backend, reference, always):
    """The original's tokens, through the length of 32 from which RoPE is scaled otherwise; in JAX over a mesh. The
    model is its own draft: all guesses are right."""
    folder, placed = reference("minicpm3"), {}
    if backend.__name__ == "minicpm_jax":
        import jax

        placed = {"mesh": jax.make_mesh((2, 2), ("data", "tensor"))}
    model, _ = backend.load(folder, "float32", **placed)
    data = np.load(folder / "reference.npz")
    engine = make(backend, model, slots=2, context=64, speculation=Speculation(model))
    prompt, whole = data["prompt_ids_P20"][0].tolist(), data["greedy_ids_P20"].tolist()
    asked = GenerationRequest.of(model, None, [prompt], len(whole) - 20, cache=engine.cache_options)
    assert answers(engine, [asked, asked]) == [whole[20:]] * 2
    assert engine.guessing.accepted == engine.guessing.drafted > 0


def test_guessing_goes_on_where_it_pays():
    pace, tried = Pace(), []
    for _ in range(4 * AGAIN):
        guesses = pace.pays(5)
        tried.append(guesses)
        pace.record(5, guesses, 8 if guesses else 5, 1.0 if guesses else 0.5)  # 8 tokens a second, and 10
    assert tried[: 2 * TRIALS] == [True] * TRIALS + [False] * TRIALS
    again = tried.index(True, 2 * TRIALS)
    assert AGAIN <= again <= AGAIN + 2 * TRIALS and tried[again : again + TRIALS + 1] == [True] * TRIALS + [False]
    assert tried.count(True) == 3 * TRIALS  # and once more, after twice as many
    assert pace.pays(1)  # measured by itself
    assert guessing.Guessing(Speculation(prompt_lookup=True)).plan([None, None], 3) is None


def test_what_cannot_be_guessed_is_refused(backend, pico, reference):
    model, tokenizer = pico
    other, _ = backend.load(reference("dense_1b"), "float32")
    with pytest.raises(InputError, match="token ids, the model .*with its tokenizer"):
        make(backend, model, speculation=Speculation(other))


def test_tokenizers_that_differ(pico, tmp_path):
    from minicpm_data import load_tokenizer

    _, tokenizer = pico
    tiny = load_tokenizer(tiny_model.write(tmp_path))
    check_tokenizers(tokenizer, tokenizer, 2048)
    with pytest.raises(InputError, match="draft_model has another tokenizer: .* of 60 token ids"):
        check_tokenizers(tokenizer, tiny, 60)


def stored(ids, path):
    """A file that MLX wrote, which compiles no program for it."""
    decoding = importlib.import_module("minicpm_mlx.backend").Decoding()
    model, _ = importlib.import_module("minicpm_mlx").load(PICO, "float32")
    found = decoding.cached_prompt(model, GenerationRequest.of(model, None, [ids], 1))
    write_prompt_cache(path, found, "pico", fingerprint(open_checkpoint(PICO)), "text", ids)
    return open_prompt_cache(path)


def test_the_text_of_a_file_is_not_run_again(backend, pico, plain, tmp_path, monkeypatch):
    """Its keys stay in the cache, also where no page is left for others."""
    pytest.importorskip("minicpm_mlx")
    (model, tokenizer), tokens = pico, plain.pool.page * (plain.pool.pages - 1)
    text = tokenizer.encode("The fox and the hare went to the river. " * 6)[:70]
    file = stored(text, tmp_path / "c.safetensors")
    engine = make(backend, model, slots=4, cache_tokens=tokens, prompt_cache=file)  # the shapes of the other one
    asked = [GenerationRequest.of(model, None, [p], 8) for p in ([*text, 9, 8], [*text[:68], 5, 6, 7], [1, 9])]
    others = [GenerationRequest.of(model, None, [[3, i] * 120], 4) for i in range(12, 18)]
    expected = answers(plain, asked)
    decoding = importlib.import_module(f"{backend.__name__}.generation.decoding")
    name = "prefill" if backend.__name__ == "minicpm_jax" else "prefill_chunks"

    def check(engine):
        """Of 72 + 71 + 2 tokens, no more are run than those after the file."""
        real, ran = getattr(decoding, name), []
        with monkeypatch.context() as patch:
            patch.setattr(decoding, name, lambda *given, **more: ran.append(given[1].shape[1]) or real(*given, **more))
            assert answers(engine, asked) == expected
        assert len(ran) == 3 and sum(ran) <= 96

    engine.beginnings = Beginnings()
    assert answers(engine, asked) == expected
    whole, found = engine.beginnings.common(), engine.stored(engine.beginnings.common())
    assert whole == text[:64] and found.length == 64  # whole blocks of 32 tokens
    answers(engine, others)  # take all other pages
    check(engine)
    path = tmp_path / "saved.safetensors"
    write_prompt_cache(path, found, "pico", fingerprint(open_checkpoint(PICO)), "text", whole)
    engine = make(backend, model, slots=4, cache_tokens=tokens, prompt_cache=open_prompt_cache(path))
    answers(engine, asked[2:])  # compiles
    check(engine)


def test_files_that_an_engine_cannot_use(backend, pico, tmp_path):
    model, tokenizer = pico
    pytest.importorskip("minicpm_mlx")
    file = stored([1, 5, 6], tmp_path / "c.safetensors")
    if backend.__name__ == "minicpm_jax":
        with pytest.raises(InputError, match="prompt_cache_file holds 3 tokens, less than a page of 32"):
            make(backend, model, slots=1, prompt_cache=file)
    with pytest.raises(InputError, match=r"is 256, .* 256 beside the 3 of the prompt cache"):
        make(backend, model, cache_tokens=256, prompt_cache=file)


def test_the_server_guesses_and_keeps_what_requests_begin_with(cut, always, tmp_path, monkeypatch, capsys):
    """In MLX, which compiles nothing: what is said by the options is the same in both."""
    pytest.importorskip("minicpm_mlx")
    path, texts, counts = tmp_path / "kept.safetensors", [], []
    prompt = "The fox and the hare went to the river. " * 3

    def server(engine, *_):
        def run(sockets):
            texts.extend("".join(r.text for r in engine.stream_generate(prompt + end, 9)) for end in ("So", "12 +"))
            metrics = Metrics(engine, "m").text().decode()
            counts.append([line for line in metrics.splitlines() if line.startswith("minicpm:spec_decode")])

        return SimpleNamespace(run=run)

    monkeypatch.setattr(openai_api, "server", server)
    options = {"backend": "mlx", "port": 0, "log_level": "warning"}
    openai_api.main(openai_api.Options(**options, save_prompt_cache=str(path)))
    assert f"{path}: 32 tokens" in capsys.readouterr().out and open_prompt_cache(path).text.startswith(prompt[:60])
    openai_api.main(openai_api.Options(**options, prompt_cache_file=str(path), draft_model=str(cut[0])))
    assert texts[:2] == texts[2:] and counts[0] == []
    (drafted, accepted) = (float(line.split()[-1]) for line in counts[1])
    assert drafted >= accepted >= 0 and drafted > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--draft-model", "pico", "--prompt-lookup"], "leave one of them out"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens is 0"),
        (["--prompt-cache-file", "no.safetensors"], "no.safetensors"),
        (["--save-prompt-cache", "no.bin"], "no.bin; the name must end with .safetensors"),
        (["--draft-model", "no-such-model"], "no-such-model"),
    ],
)
def test_flags_of_the_server_that_are_refused(flags, said):
    ran = typed("minicpm_serve.openai_api", "--backend", "mlx", "--port", 0, *flags)
    assert ran.returncode == 2 and said in ran.stderr and ran.stderr.count("\n") == 1
