"""Generation through the public calls of both backends: greedy, sampled, batched, streamed, stopped."""

import functools
import importlib
import inspect
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
from documented_commands import ROOT

from minicpm_data.generation.options import Sampling, count_tokens
from minicpm_data.generation.request import GenerationRequest
from weights_io.errors import InputError

BACKENDS = ["minicpm_jax", "minicpm_mlx"]
FOLDERS = ["dense_1b", "dense_2b", "dense_untied", "llama_format", "long_128k", "minicpm4_8b", "moe_8x2b", "s_1b"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def babbler(backend, tmp_path_factory):
    """A model of random weights, and its tokenizer."""
    return backend.load(tiny_model.write(tmp_path_factory.mktemp("babbler")))


@pytest.fixture(params=FOLDERS)
def case(backend, reference, request):
    return opened(backend, reference(request.param))


@functools.cache
def opened(backend, folder):
    return backend.load(folder, "float32")[0], np.load(folder / "reference.npz")


def tokens_of(responses):
    return [response.token for response in responses]


def test_greedy_ids_are_the_originals(backend, case):
    model, data = case
    endings = ["", *(key.removeprefix("prompt_ids") for key in data if key.startswith("prompt_ids_P"))]
    for ending in endings:
        prompt, expected = data[f"prompt_ids{ending}"][0].tolist(), data[f"greedy_ids{ending}"].reshape(-1).tolist()
        made = expected[len(prompt) :]
        assert tokens_of(backend.stream_generate(model, None, prompt, max_tokens=len(made))) == made


@pytest.mark.parametrize("case", ["dense_1b", "long_128k", "minicpm4_8b", "moe_8x2b", "s_1b"], indirect=True)
def test_a_batch_of_unequal_prompts_equals_single_runs(backend, case):
    model, data = case
    mask = data["batch_attention_mask"]
    prompts = [row[seen == 1].tolist() for row, seen in zip(data["batch_prompt_ids"], mask, strict=True)]
    prompts.append(prompts[0][:3])
    rows = backend.batch_generate(model, None, prompts, max_tokens=24)
    if (
        getattr(model.config.rope_scaling, "type", None) != "dynamic"
    ):  # the original counts padding as length, which moves a dynamic base
        assert [tokens_of(row) for row in rows[:2]] == data["batch_greedy_ids"][:, mask.shape[1] :].tolist()
    singles = [tokens_of(backend.stream_generate(model, None, prompt, max_tokens=24)) for prompt in prompts]
    assert [tokens_of(row) for row in rows] == singles


def test_text_is_the_decoded_tokens(backend, babbler):
    model, tokenizer = babbler
    prompt = tokenizer.apply_chat([{"role": "user", "content": "你好"}])
    responses = list(backend.stream_generate(model, tokenizer, prompt, max_tokens=40, temperature=1.5, seed=3))
    ids = [r.token for r in responses if r.token not in (*tokenizer.eos_token_ids, *model.eos_token_ids)]
    text = "".join(r.text for r in responses)
    assert text == tokenizer.decode(ids) and text
    assert all("\ufffd" not in r.text for r in responses[:-1]) or "\ufffd" in tokenizer.decode(ids)
    again = backend.generate(model, tokenizer, prompt, max_tokens=40, temperature=1.5, seed=3)
    assert again == text


def test_a_text_prompt_gets_bos_once(backend, babbler):
    model, tokenizer = babbler
    expected = tokens_of(backend.stream_generate(model, tokenizer, tokenizer.encode("Hello"), max_tokens=8))
    assert tokens_of(backend.stream_generate(model, tokenizer, "Hello", max_tokens=8)) == expected
    assert tokens_of(backend.stream_generate(model, tokenizer, "<s>Hello", max_tokens=8)) == expected


@pytest.mark.parametrize("case", ["dense_1b"], indirect=True)
def test_an_answer_ends_at_eos_of_config_or_tokenizer(backend, case):
    model, data = case
    prompt = data["prompt_ids"][0].tolist()
    made = data["greedy_ids"].reshape(-1)[len(prompt) :].tolist()
    model.eos_token_ids, before = (made[5],), model.eos_token_ids
    try:
        responses = list(backend.stream_generate(model, None, prompt, max_tokens=24))
    finally:
        model.eos_token_ids = before
    first = made.index(made[5])
    assert tokens_of(responses) == made[: first + 1]
    assert [r.finish_reason for r in responses] == [None] * first + ["stop"]


def test_max_tokens_is_the_other_end(backend, babbler):
    model, tokenizer = babbler
    for count in (1, 2, 33, 50):
        responses = list(backend.stream_generate(model, tokenizer, [1, 5, 9], max_tokens=count, temperature=1, seed=1))
        assert len(responses) <= count
        assert responses[-1].finish_reason == ("length" if len(responses) == count else "stop")


def test_stop_string(backend, babbler):
    model, tokenizer = babbler
    options = {"max_tokens": 60, "temperature": 1.0, "seed": 11}
    whole = backend.generate(model, tokenizer, "The fox", **options)
    stop = whole[len(whole) // 2 :][:3]
    cut = backend.generate(model, tokenizer, "The fox", stop=["no such text", stop], **options)
    assert cut == whole[: whole.index(stop)]


def test_the_seed_decides(backend, babbler):
    model, tokenizer = babbler

    def draw(**options):
        return tokens_of(backend.stream_generate(model, tokenizer, [1, 7], max_tokens=30, temperature=1.0, **options))

    assert draw(seed=5) == draw(seed=5)
    assert draw(seed=5) != draw(seed=6)
    assert draw() != draw()


def test_rows_of_a_sampled_batch_differ(backend, babbler):
    model, tokenizer = babbler
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 5}
    rows = [tokens_of(row) for row in backend.batch_generate(model, tokenizer, [[1, 7]] * 3, **options)]
    assert len({tuple(row) for row in rows}) == 3
    assert rows[0] == tokens_of(backend.stream_generate(model, tokenizer, [1, 7], **options))


def test_a_seed_of_64_bits_counts_whole(backend, babbler):
    model, tokenizer = babbler
    options = {"max_tokens": 30, "temperature": 1.0}
    texts = [backend.generate(model, tokenizer, [1, 7], seed=seed, **options) for seed in (1, 2**32 + 1)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50])
def test_the_coldest_draws_are_greedy(backend, babbler, temperature):
    model, tokenizer = babbler
    greedy = tokens_of(backend.stream_generate(model, tokenizer, [1, 7], max_tokens=20))
    cold = backend.stream_generate(model, tokenizer, [1, 7], max_tokens=20, temperature=temperature, seed=1)
    assert tokens_of(cold) == greedy


def test_the_cache_of_jax_grows_with_the_answer(tmp_path, monkeypatch):
    from minicpm_jax import load, stream_generate
    from minicpm_jax.generation import decoding

    model, _ = load(tiny_model.write(tmp_path, eos_token_id=None))
    prompts = [[1, 7, 9], [1] * 30]
    expected = [tokens_of(stream_generate(model, None, prompt, max_tokens=150)) for prompt in prompts]
    monkeypatch.setattr(decoding, "ROOM", 4)
    sizes, resize_state = set(), decoding.resize_state
    monkeypatch.setattr(decoding, "resize_state", lambda state, slots: sizes.add(slots) or resize_state(state, slots))
    assert [tokens_of(stream_generate(model, None, prompt, max_tokens=150)) for prompt in prompts] == expected
    assert [len(row) for row in expected] == [150, 150]
    assert sizes == {64, 128, 256}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {1: -0.5, 6: 2}},
        {"temperature": 0.9, "presence_penalty": -0.7, "frequency_penalty": -0.2, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.6, "min_tokens_to_keep": 3},
        {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.12},
        {"temperature": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.05, "xtc_special_tokens": (1, 6)},
        {"temperature": 0.7, "top_k": 4, "xtc_probability": 0.3, "xtc_threshold": 0.2},
        {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.5},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(backend, options):
    """2000 draws from 8 known logits against what transformers' chain of warpers, then mlx_lm's XTC leave of them."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], np.float32)
    prompt, answer = [0, 3, 7], [4, 3, 3, 4, 3]
    seen = count_tokens([prompt], len(logits), [answer])[0]
    expected = warped(logits, prompt, answer, **options)
    counts = Counter(draws(backend.__name__, logits, seen, 2000, Sampling(**options, seed=0)))
    assert set(counts) <= set(np.flatnonzero(expected))
    for token, probability in enumerate(expected):  # 4.5 standard deviations
        assert abs(counts[token] / 2000 - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / 2000)


def warped(
    logits,
    prompt,
    answer,
    temperature,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    min_tokens_to_keep=1,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    xtc_special_tokens=(),
    frequency_penalty=0.0,
    presence_penalty=0.0,
    logit_bias=(),
):
    """The probabilities that transformers draws from, worked out one token at a time, and `mlx_lm`'s XTC on them.
    Before them come OpenAI's bias and penalties, in vLLM's order."""
    logits = np.array([logit + dict(logit_bias).get(i, 0) for i, logit in enumerate(logits)])
    scores = np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    own = np.where(np.isin(np.arange(len(logits)), prompt + answer), scores, logits)
    for token, count in Counter(answer).items():
        own[token] -= presence_penalty + frequency_penalty * count
    scores = own / temperature
    order = np.argsort(-scores)
    kept = set(order[: top_k or len(order)].tolist())
    p = np.where(np.isin(np.arange(len(scores)), list(kept)), np.exp(scores), 0)
    p /= p.sum()
    total, nucleus = 0.0, set()
    for token in order:
        if total >= top_p:
            break
        nucleus.add(int(token))
        total += p[token]
    p = np.where(np.isin(np.arange(len(scores)), list(nucleus)), p, 0)
    p = np.where((p >= min_p * p.max()) | np.isin(np.arange(len(p)), order[:min_tokens_to_keep]), p, 0)
    p /= p.sum()
    if not xtc_probability:
        return p
    import mlx.core as mx
    from mlx_lm.sample_utils import apply_xtc

    left = mx.array(np.where(p > 0, own, -np.inf).astype(np.float32))[None]
    spared = np.isfinite(np.asarray(apply_xtc(left, 1.0, xtc_threshold, list(xtc_special_tokens))))[0]
    without = np.where(spared, p, 0)
    return xtc_probability * without / without.sum() + (1 - xtc_probability) * p


def draws(package, logits, seen, count, sampling):
    """``count`` tokens drawn by the backend's own sampler."""
    sampler = importlib.import_module(f"{package}.generation.sampling")
    rows, seen_rows = np.tile(logits, (count, 1)), np.tile(seen, (count, 1))
    if package == "minicpm_jax":
        import jax

        rows, params = jax.numpy.asarray(rows), sampler.SamplingParams.of(sampling, len(logits))
        return np.asarray(sampler.sample(rows, seen_rows, params, jax.random.split(jax.random.key(0), count))).tolist()
    import mlx.core as mx

    seen_rows = mx.array(seen_rows) if sampling.penalized else None
    keys = mx.random.split(mx.random.key(0), count)
    return np.asarray(sampler.sample(mx.array(rows), seen_rows, sampling, keys)).tolist()


def test_penalties_are_the_same_in_both(tmp_path):
    folder = tiny_model.write(tmp_path)
    rows = []
    for package in BACKENDS:
        backend = importlib.import_module(package)
        model, tokenizer = backend.load(folder, "float32")
        options = {"max_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
        options["logit_bias"] = {70: 0.5}
        rows.append(tokens_of(backend.stream_generate(model, tokenizer, "The fox and the dog", **options)))
    assert rows[0] == rows[1]


def test_chat_keeps_the_history(backend, babbler):
    model, tokenizer = babbler
    reply, history = backend.chat(model, tokenizer, "Hello", max_tokens=8, seed=1)
    assert history == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]
    system = [{"role": "system", "content": "Be kind."}]
    _, longer = backend.chat(model, tokenizer, "And you?", history=[*system, *history], max_tokens=8, seed=1)
    assert longer[:3] == [*system, *history] and [m["role"] for m in longer[3:]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 2}, "min_p is 2"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep is 0"),
        ({"xtc_probability": 1.5}, "xtc_probability is 1.5"),
        ({"xtc_threshold": 0.6}, "xtc_threshold is 0.6"),
        ({"xtc_probability": 1, "xtc_special_tokens": (1, 99999)}, "xtc_special_tokens holds 99999"),
        ({"quantized_kv_start": 5}, "quantized_kv_start is for kv_bits"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2"),
        ({"logit_bias": {1: 101}}, "logit_bias gives token 1 101; it must be from -100 to 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias holds 'a', which is no token id"),
        ({"logit_bias": {1: "a"}}, "logit_bias is {1: 'a'}; it must hold token ids with a number each"),
        ({"logit_bias": {99999: 1}}, "logit_bias holds 99999, outside the vocabulary"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias holds 301 tokens; give at most 300"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "stop holds an empty text"),
    ],
)
def test_options_out_of_range_are_refused_at_once(backend, babbler, options, said):
    with pytest.raises(InputError, match=said):
        backend.stream_generate(*babbler, "Hello", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": "3"}, "max_tokens is '3'; it must be a number"),
        ({"max_tokens": 3.5}, "max_tokens is 3.5; it must be a whole number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": np.ones(2)}, "temperature is array"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"stop": 5}, "stop is 5; it must be a text or a list of texts"),
        ({"kv_bits": "8"}, "kv_bits is '8'; it must be a number"),
        ({"num_draft_tokens": "3"}, "num_draft_tokens is '3'"),
        ({"draft_model": "pico"}, "draft_model is 'pico'; give the model that load returns"),
        (
            {"xtc_probability": 1, "xtc_special_tokens": 5},
            "xtc_special_tokens is 5; it must be a list of whole numbers",
        ),
    ],
)
def test_arguments_of_another_type_are_refused_at_once(backend, babbler, options, said):
    with pytest.raises(InputError, match=said):
        backend.stream_generate(*babbler, "Hello", **options)


def test_numbers_of_numpy_are_numbers(backend, babbler):
    given = {"max_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.int32(1)}
    plain = {name: value.item() for name, value in given.items()}
    assert backend.generate(*babbler, np.array([1, 7]), **given) == backend.generate(*babbler, [1, 7], **plain)


def test_unknown_arguments_name_the_near_one(backend, babbler):
    for call, given, near in (
        (backend.generate, {"prompt": "Hello", "temp": 1}, "'temp'; did you mean 'temperature'"),
        (backend.batch_generate, {"prompts": ["Hello"], "max_toknes": 1}, "'max_toknes'; did you mean 'max_tokens'"),
        (backend.chat, {"query": "Hello", "kv_bit": 8}, "'kv_bit'; did you mean 'kv_bits'"),
        (
            backend.generate,
            {"prompt": "Hello", "verbose": True},
            "'verbose'; the keywords are draft_model, frequency_penalty",
        ),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument {near}"):
            call(*babbler, **given)
    with pytest.raises(TypeError, match="'adapter_path'; did you mean 'adapter'"):
        backend.load(adapter_path="x")


def test_other_things_than_prompts_and_models_are_refused(backend, babbler):
    model, tokenizer = babbler
    for prompt in (None, 5, b"Hello", [1.5], ["Hello"], [[1, 2]]):
        with pytest.raises(InputError, match="give a text, or a list of token ids"):
            backend.stream_generate(model, tokenizer, prompt)
    for prompts in ("Hello", 5):
        with pytest.raises(InputError, match="it must be a list of prompts"):
            backend.batch_generate(model, tokenizer, prompts)
    with pytest.raises(InputError, match="model is .*; give the model that load returns"):
        backend.stream_generate(tokenizer, model, "Hello")
    with pytest.raises(InputError, match="history is 'Hi'; it must be a list of messages"):
        backend.chat(model, tokenizer, "Hello", history="Hi")
    for given, said in (
        ({"dtype": np.float32}, "dtype is float32 of a library; give its name as a text"),
        ({"path_or_repo": 5}, "path_or_repo is 5; it must be the name"),
        ({"adapter": b"x"}, "adapter is b'x'; it must be the name"),
        ({"quantize": "4"}, "quantize is '4'"),
    ):
        with pytest.raises(InputError, match=said):
            backend.load(**given)


def test_xtc_spares_the_line_break_and_the_ends(backend, babbler):
    """As in mlx_lm, which has no flag for these tokens."""
    model, tokenizer = babbler
    sampling = Sampling(temperature=1.0, xtc_probability=1.0)
    request = GenerationRequest.of(model, tokenizer, ["Hello"], sampling=sampling)
    assert set(request.sampling.xtc_special_tokens) == {*tokenizer.encode("\n"), *request.end_ids}
    given = replace(sampling, xtc_special_tokens=(3,))
    assert GenerationRequest.of(model, tokenizer, ["Hello"], sampling=given).sampling == given


@pytest.mark.parametrize(("prompt", "said"), [([], "empty"), ([1, 100_000], "100000"), ([-1], "-1")])
def test_prompts_that_cannot_be_run(backend, babbler, prompt, said):
    with pytest.raises(InputError, match=said):
        backend.stream_generate(*babbler, prompt)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 100_000]], "100000"),
        ([[-1]], "-1"),
        ([1, 2], "batch, tokens"),
        ([[1], [2, 3]], "unequal"),
        ([[0.5]], "whole"),
    ],
)
def test_ids_that_a_model_cannot_take(backend, babbler, ids, said):
    with pytest.raises(InputError, match=said):
        babbler[0](ids)


def test_a_text_prompt_needs_a_tokenizer(backend, babbler):
    with pytest.raises(InputError, match="tokenizer"):
        backend.stream_generate(babbler[0], None, "Hello")


def test_a_tokenizer_of_another_size_is_refused(backend, tmp_path):
    folder = tiny_model.write(tmp_path, vocab_size=300)
    with pytest.raises(InputError, match="wrong tokenizer size: the tokenizer has [0-9]+ ids, and .* 300 rows"):
        backend.load(folder)


def test_both_packages_export_the_same_calls():
    jax, mlx = map(importlib.import_module, BACKENDS)
    assert jax.__all__ == mlx.__all__
    for name in jax.__all__:
        ours, theirs = (
            [p for p in inspect.signature(getattr(package, name)).parameters.values() if p.name != "mesh"]
            for package in (jax, mlx)
        )
        if name != "Model":  # built of weights in JAX, of a config in MLX; mesh is keyword-only
            assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs], name


TWINS = sorted(
    {path.stem for package in BACKENDS for path in (ROOT / package / "generation").glob("[a-z]*.py")}
    # JAX compiles programs beside the work; those of guesses are methods of MLX's engine.
    - {"programs", "shapes", "slots", "warming", "drafts", "verification"}
)
ONLY_JAX = {
    "decoding.State": {"finished", "eos_ids", "scores"},  # its loop runs on the device
    "decoding.sample_next": {"allowed"},  # its engine samples on the device
    "sparsity.Counting": {"neurons"},  # a mesh pads its layers
}


@pytest.mark.parametrize("file", TWINS)
def test_the_twin_files_of_generation_read_alike(file):
    """What both have comes in the same order, with the same parameters; JAX makes `SamplingParams` of a `Sampling`."""
    twins = [importlib.import_module(f"{package}.generation.{file}") for package in BACKENDS]
    jax, mlx = map(public, twins)
    both = [name for name in jax if name in mlx]
    assert both and both == [name for name in mlx if name in jax]
    for name in both:
        given = [p for p in inspect.signature(jax[name]).parameters if p not in ONLY_JAX.get(f"{file}.{name}", ())]
        assert ["sampling" if p == "params" else p for p in given] == [*inspect.signature(mlx[name]).parameters], name


def public(module):
    """Functions, compiled ones too, and classes that are defined there."""
    named = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in named.items() if callable(value) and not name.startswith("_")}


@pytest.mark.parametrize("pieces, name", [(3, "minicpm4_8b"), (32, "long_128k")])
def test_the_size_of_a_prompts_pieces_changes_nothing(backend, reference, pieces, name, monkeypatch):
    """Under dynamic NTK and LongRoPE too: each piece is rotated for the whole prompt."""
    if backend.__name__ == "minicpm_jax":  # whose pieces are at least 32 tokens, and attention's blocks 512
        monkeypatch.setattr("minicpm_jax.generation.decoding.bucket_length", lambda length: -(-length // 4) * 4)
        monkeypatch.setattr("minicpm_jax.layers.blockwise.BLOCK", 7)
    model, data = opened(backend, reference(name))
    for ending in ["", *(key.removeprefix("prompt_ids") for key in data if key.startswith("prompt_ids_P"))]:
        prompt, expected = data[f"prompt_ids{ending}"][0].tolist(), data[f"greedy_ids{ending}"].reshape(-1).tolist()
        made = expected[len(prompt) :]
        options = {"max_tokens": len(made), "prefill_step_size": pieces}
        assert tokens_of(backend.stream_generate(model, None, prompt, **options)) == made
    prompts = [prompt, prompt[:2], prompt[:7]]
    rows = backend.batch_generate(model, None, prompts, max_tokens=12, prefill_step_size=pieces)
    singles = [tokens_of(backend.stream_generate(model, None, prompt, max_tokens=12)) for prompt in prompts]
    assert [tokens_of(row) for row in rows] == singles
