"""Speculative decoding gives the tokens of plain decoding, whatever is guessed."""

import importlib

import numpy as np
import pytest
import tiny_model

from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_data.generation.speculation import Draft, PromptLookup, speculate
from weights_io.errors import InputError

PROMPT = [1, 7, 9, 11, 7, 9, 11, 7, 9]


@pytest.fixture(scope="module", params=["minicpm_jax", "minicpm_mlx"])
def backend(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def models(backend, tmp_path_factory):
    """A model that does not end, and drafts: itself, and one that guesses right now and then."""
    folder = tmp_path_factory.mktemp("draft")
    own, _ = backend.load(tiny_model.write(folder / "own", eos_token_id=None), "float32")
    small = tiny_model.write(folder / "small", eos_token_id=None, num_hidden_layers=1)
    return own, {"itself": own, "smaller": backend.load(small, "float32")[0]}


def answer(backend, model, prompt=PROMPT, **options):
    responses = list(backend.stream_generate(model, None, prompt, **{"max_tokens": 60, **options}))
    return [r.token for r in responses], sum(r.from_draft for r in responses)


SAMPLINGS = [{}, {"temperature": 0.9, "top_k": 5, "repetition_penalty": 1.3, "seed": 4, "max_tokens": 24}]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["itself", "smaller", "lookup"])
def test_the_tokens_are_those_of_plain_decoding(backend, models, draft, sampling):
    model, drafts = models
    plain, none = answer(backend, model, **sampling)
    source = {"prompt_lookup": True} if draft == "lookup" else {"draft_model": drafts[draft]}
    tokens, guessed = answer(backend, model, num_draft_tokens=4, **source, **sampling)
    assert tokens == plain and none == 0
    if draft == "itself" and not sampling:  # all right: 11 rounds of 5, the first token and what is left
        assert guessed == 47
    assert guessed < 60


@pytest.mark.parametrize("name", ["long_128k", "minicpm4_8b"])
def test_scaled_rope_rotates_each_token_by_its_own_length(backend, reference, name):
    """The original's tokens, through the length of 32 from which RoPE is scaled otherwise."""
    folder = reference(name)
    model, _ = backend.load(folder, "float32")
    data = np.load(folder / "reference.npz")
    prompt, expected = data["prompt_ids_P20"][0].tolist(), data["greedy_ids_P20"].tolist()
    assert len(prompt) < model.config.max_position_embeddings < len(expected)
    tokens, guessed = answer(backend, model, prompt, max_tokens=24, draft_model=model)
    assert tokens == expected[20:] and guessed == 17  # all: 5 rounds of 3, the first token, and 2 of 3 that are left


def test_the_answer_ends_where_it_should(backend, models):
    model, drafts = models
    plain, _ = answer(backend, model)
    end = plain[17]
    model.eos_token_ids = (end,)
    try:
        tokens, _ = answer(backend, model, draft_model=drafts["itself"])
    finally:
        model.eos_token_ids = ()
    assert tokens == plain[: plain.index(end) + 1]


def test_the_caches_of_jax_grow_with_the_answer(models, monkeypatch):
    import minicpm_jax
    from minicpm_jax.generation import decoding, speculation

    if not isinstance(models[0], minicpm_jax.Model):
        pytest.skip("those of MLX grow by themselves")
    plain, _ = answer(minicpm_jax, models[0], max_tokens=36)
    monkeypatch.setattr(decoding, "ROOM", 4)
    monkeypatch.setattr(speculation, "ROOM", 4)
    options = {"draft_model": models[1]["itself"], "num_draft_tokens": 4}
    assert answer(minicpm_jax, models[0], max_tokens=36, **options)[0] == plain


def test_a_packed_cache_is_taken_back_too(backend, tmp_path):
    model, _ = backend.load(tiny_model.write(tmp_path, num_attention_heads=1, num_key_value_heads=1), "float32")
    memory = {"kv_bits": 8, "kv_group_size": 32, "max_tokens": 24}
    plain, _ = answer(backend, model, **memory)
    assert answer(backend, model, draft_model=model, **memory)[0] == plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_lookup": True, "num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"prompt_lookup": True, "max_kv_size": 16}, "max_kv_size"),
        ({"prompt_lookup": True, "draft_model": object()}, "leave one of them out"),
    ],
)
def test_what_cannot_be_guessed(backend, models, options, said):
    with pytest.raises(InputError, match=said):
        backend.stream_generate(models[0], None, PROMPT, **options)


def test_a_draft_of_another_vocabulary_is_refused(backend, models, reference):
    other, _ = backend.load(reference("dense_1b"), "float32")
    with pytest.raises(InputError, match="token ids, the model .*with its tokenizer"):
        backend.stream_generate(models[0], None, PROMPT, draft_model=other)


def test_lookup_copies_what_followed():
    lookup = PromptLookup()
    assert lookup([5, 6, 7, 8, 9, 6, 7], 3) == [8, 9, 6]
    assert lookup([5, 6, 7, 8, 9, 6, 7, 1, 2], 3) == []
    assert lookup([5, 6, 7, 8, 9, 6, 7, 1, 2, 6, 7], 2) == [1, 2]  # the latest
    assert PromptLookup()([3, 4, 3, 4], 5) == [3, 4, 3, 4, 3]  # goes on repeating
    assert PromptLookup()([3], 2) == []


def test_a_draft_runs_what_is_new_to_it():
    asked = []
    draft = Draft([1, 2, 3], lambda last, start, count: asked.append((list(last), start)) or [9] * count)
    draft([1, 2, 3, 4], 3)
    draft([1, 2, 3, 4, 9, 9, 9, 5], 3)  # all right: the third was never run
    draft([1, 2, 3, 4, 9, 9, 9, 5, 9, 6], 3)
    draft([1, 2, 3, 4, 9, 9, 9, 5, 9, 6, 7, 7, 7], 3)  # after a pause
    assert asked == [([3, 4], 2), ([9, 5], 6), ([9, 6], 8), ([6, 7, 7, 7], 9)]


def asking(max_tokens):
    return GenerationRequest((PromptIds([1], vocab_size=10),), max_tokens)


def test_guesses_of_no_use_are_made_less_and_less_often():
    asked = []

    def verify(guesses):
        asked.append(len(guesses))
        return [7]

    list(speculate(asking(30), 5, lambda tokens, count: [3] * count, verify, 2))
    assert [i for i, count in enumerate(asked) if count] == [0, 2, 6, 14]


def test_no_more_is_verified_than_is_wanted():
    asked = []

    def verify(guesses):
        asked.append(len(guesses))
        return [*guesses, 7]

    made = list(speculate(asking(8), 5, lambda tokens, count: [3] * count, verify, 4))
    assert made == [(5, False), *[(3, True)] * 4, (7, False), (3, True), (7, False)]
    assert asked == [4, 1]
