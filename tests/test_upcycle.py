"""A dense model as a mixture of experts: the same logits, and each number where it belongs."""

import importlib

import numpy as np
import pytest
import tiny_model
from documented_commands import typed

from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.upcycle import Options, main, upcycled


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return open_checkpoint(tiny_model.write(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixture") / "out"
    options = ["--model", dense.path, "--num-experts", 4, "--num-experts-per-tok", 3, "--save-path", out, "--seed", 7]
    ran = typed("weights_io.upcycle", *options)
    assert ran.returncode == 0, ran.stderr
    assert "MiniCPMForCausalLM" in ran.stdout and "parameters are used for each token" in ran.stdout
    return open_checkpoint(out)


@pytest.mark.parametrize("backend", ["minicpm_jax", "minicpm_mlx"])
def test_the_logits_are_those_of_the_dense_model(dense, mixture, backend):
    ids = np.random.default_rng(0).integers(3, dense.config.vocab_size, (3, 20))
    load = importlib.import_module(backend).load
    expected, found = (np.asarray(load(c.path, dtype="float32")[0](ids)) for c in (dense, mixture))
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_every_expert_is_an_exact_copy(dense, mixture):
    config = mixture.config
    assert (config.num_experts, config.num_experts_per_tok) == (4, 3)
    assert mixture.eos_token_ids == dense.eos_token_ids and (mixture.path / "tokenizer.model").exists()
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        for expert in range(4):
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                copy = mixture.tensors[f"{mlp}.experts.{expert}.{ours}.weight"].read()
                np.testing.assert_array_equal(copy, dense.tensors[f"{mlp}.{theirs}.weight"].read())
    for name, tensor in dense.tensors.items():
        if ".mlp." not in name:
            np.testing.assert_array_equal(mixture.tensors[name].read(), tensor.read())


def test_the_router_is_random_by_seed_and_layer(reference):
    source = open_checkpoint(reference("dense_bf16"))

    def router(layer, seed):
        tensor = upcycled(source, 64, 2, seed)[1][f"model.layers.{layer}.mlp.gate.weight"].read()
        assert tensor.dtype.name == "bfloat16"
        return tensor.astype(np.float32)

    first = router(0, 5)
    assert abs(first.std() - 0.1) < 0.005 and abs(first.mean()) < 0.005
    np.testing.assert_array_equal(router(0, 5), first)
    for other in (router(1, 5), router(0, 6)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1


def test_a_float16_copy(dense, tmp_path):
    main(Options(model=str(dense.path), save_path=tmp_path / "out", dtype="float16"))
    written = open_checkpoint(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in written.tensors.values()} == {"float16"}


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("moe_8x2b", {}, "has 8 experts already"),
        ("llama_format", {}, "is a Llama, which has no experts; .* --unfold"),
        ("dense_2b", {"num_experts": 0}, "is 0; .* at most 1024"),
        ("dense_2b", {"num_experts": 5000}, "is 5000; .* at most 1024"),
        ("dense_2b", {"num_experts_per_tok": 9}, "is 9; .* the number of experts, 8"),
        ("dense_2b", {"num_experts_per_tok": 0}, "is 0; .* the number of experts"),
        ("dense_2b", {"seed": -1}, "is -1; it must not"),
    ],
)
def test_what_is_refused_leaves_nothing(reference, tmp_path, name, wrong, said):
    with pytest.raises(InputError, match=said) as caught:
        main(Options(model=str(reference(name)), save_path=tmp_path / "out", **wrong))
    assert [caught.value.option] == [*wrong] or not wrong
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
