"""A second question of a chat runs programs that were compiled while the first answer was read."""

import logging

import pytest
import tiny_model

pytest.importorskip("jax")
import jax

import minicpm_jax
from minicpm_data.generation.options import Sampling
from minicpm_data.generation.request import GenerationRequest
from minicpm_jax.backend import Decoding, generator
from minicpm_jax.generation import warming


def test_a_second_question_compiles_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(warming, "QUESTIONS", (64,))
    model, _ = minicpm_jax.load(tiny_model.write(tmp_path, eos_token_id=None), decoding=True)
    prepared = Decoding().warming(model)
    sampling = Sampling(temperature=0.3, top_p=0.8)

    def compiled(length):
        request = GenerationRequest.of(model, None, [range(3, 3 + length)], 8, sampling)
        prepared.claim(request)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
            count = len(list(generator.stream(model, None, request)))
        prepared.follow(request, count)
        while prepared._programs.counts()["ready"] < 8:
            prepared._programs.wait(prepared._programs.changes)
        return {name for name in ("prefill", "first_token", "decode") if f"Compiling jit({name})" in caplog.text}

    assert compiled(20) == {"prefill", "first_token", "decode"}
    assert compiled(80) == set()
    prepared.close()
