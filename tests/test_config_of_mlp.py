"""What config.json says of the MLP: experts and the activation. Wrong numbers are refused in one sentence."""

import json
import shutil

import pytest

from weights_io import catalog
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.safetensors import write_file
from weights_io.parameters import count, count_active, parameters, short_name

MOE = {"num_experts": 8, "num_experts_per_tok": 2}
FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.01}


def read(**changes):
    return ModelConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 8}, "num_experts is 8 and num_experts_per_tok is 0 or missing"),
        ({"num_experts": 8, "num_experts_per_tok": 0}, "num_experts_per_tok is 0 or missing; add the number"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok is 2 and num_experts is 0 or missing"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_experts 8"),
        ({"num_experts": -1, "num_experts_per_tok": 2}, "num_experts is -1; it must be a positive whole number"),
        ({"num_experts": 8, "num_experts_per_tok": 1.5}, "num_experts_per_tok is 1.5"),
        ({"num_experts": "8", "num_experts_per_tok": 2}, 'num_experts is "8"'),
        ({"num_local_experts": 8}, "num_local_experts = 8 changes the logits"),
        ({"architectures": ["LlamaForCausalLM"], **MOE}, "num_experts = 8 changes the logits and is not supported"),
        ({"hidden_act": "fatrelu"}, 'hidden_act_param, its threshold, is missing; add .*"hidden_act_param": 0.01'),
        ({"hidden_act": "fatrelu", "hidden_act_param": None}, r"hidden_act_param\": 0.01 \(arXiv 2402.13516"),
        (
            {"hidden_act": "fatrelu", "hidden_act_param": -0.1},
            "hidden_act_param is -0.1; the threshold of fatrelu must",
        ),
        ({"hidden_act": "fatrelu", "hidden_act_param": "0.1"}, 'hidden_act_param is "0.1"'),
        ({"hidden_act": "fatrelu", "hidden_act_param": float("nan")}, "hidden_act_param is NaN"),
        ({"hidden_act_param": 0.1}, "hidden_act_param is 0.1, and silu has no parameter; remove the key"),
        ({"hidden_act": "relu", "hidden_act_param": 0.1}, "and relu has no parameter"),
        ({"hidden_act": "gelu"}, "not supported; MiniCPM's are silu, relu, fatrelu"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 10**400}, "hidden_act_param is 1000"),
        ({"hidden_act": ["silu"]}, "is not supported; MiniCPM's are silu"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


def test_absent_null_and_zero_are_dense():
    for number in (None, 0):
        assert read(num_experts=number, num_experts_per_tok=number) == read()
    assert (read().num_experts, read().num_experts_per_tok) == (0, 0)
    assert "num_experts" not in read().to_dict() and "hidden_act_param" not in read().to_dict()


@pytest.mark.parametrize("changes", [MOE, FATRELU, MOE | FATRELU, {"hidden_act": "relu"}])
@pytest.mark.parametrize("architecture", ["MiniCPMForCausalLM", "LlamaForCausalLM"])
def test_written_and_read_again(changes, architecture):
    if architecture == "LlamaForCausalLM":
        changes = {key: value for key, value in changes.items() if key not in MOE}
    config = read(architectures=[architecture], **changes)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert all(config.to_dict()[key] == value for key, value in changes.items())


def test_activation_threshold():
    assert [read(**changes).activation_threshold for changes in ({}, {"hidden_act": "relu"}, FATRELU)] == [
        None,
        0,
        0.01,
    ]


def test_full_size():
    config = ModelConfig.from_dict(dict(catalog.find("minicpm-moe-8x2b").config))
    assert count(config) == 13_873_291_776
    embedding = config.vocab_size * config.hidden_size
    assert count_active(config) == 4_035_320_064 + embedding  # what the paper calls 4B, without the embedding
    assert count_active(ModelConfig.from_dict(dict(catalog.find("minicpm-2b").config))) == 2_724_880_896
    table = {p.name: p for p in parameters(config)}
    w1 = table["model.layers.mlp.experts.w1.weight"]
    assert w1.shape(config) == (40, 8, 5760, 2304)
    assert w1.logical_axes() == ("layers", "expert", "mlp", "embed")
    assert w1.hf_names(config)[9] == "model.layers.1.mlp.experts.1.w1.weight"
    assert list(w1.mlx_names(config))[39] == "model.layers.39.mlp.experts.w1.weight"
    assert {short_name(p) for p in table.values() if p.adds_to_residual} == {"o_proj", "w2"}
    for name in ("gate", "experts.w1", "experts.w2", "experts.w3"):  # muP's matrices
        parameter = table[f"model.layers.mlp.{name}.weight"]
        assert parameter.learning_rate_scale(config) == 1 / 9
        assert parameter.init_std(config) == pytest.approx(0.1 / 3)


def changed(folder, to, **changes):
    """A copy of a model folder with other keys in its config.json; None takes one away."""
    to = shutil.copytree(folder, to, copy_function=shutil.copyfile)
    raw = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return to


def test_experts_in_config_and_files_must_agree(reference, tmp_path):
    with pytest.raises(InputError, match="has num_experts 8 and the files hold no expert tensors") as caught:
        open_checkpoint(changed(reference("dense_2b"), tmp_path / "dense", **MOE))
    assert "remove num_experts and num_experts_per_tok" in str(caught.value) and len(str(caught.value)) < 400
    nothing = dict.fromkeys(MOE)
    with pytest.raises(InputError, match="hold expert tensors .* and config.json has no num_experts") as caught:
        open_checkpoint(changed(reference("moe_8x2b"), tmp_path / "moe", **nothing))
    assert "write num_experts and num_experts_per_tok" in str(caught.value) and len(str(caught.value)) < 400


def test_experts_missing_misshapen_and_too_many_are_told_by_name(reference, tmp_path):
    fewer = changed(reference("moe_8x2b"), tmp_path / "fewer", num_experts=7)
    with pytest.raises(InputError, match="9 unexpected .*experts.7.w1.weight.*3 misshapen .*gate.weight"):
        open_checkpoint(fewer)
    folder = changed(reference("moe_8x2b"), tmp_path / "lost")
    tensors = dict(open_checkpoint(folder).tensors)
    del tensors["model.layers.1.mlp.experts.5.w2.weight"]
    write_file(tmp_path / "kept.safetensors", tensors)
    shutil.move(tmp_path / "kept.safetensors", folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(model.layers.1.mlp.experts.5.w2.weight\)"):
        open_checkpoint(folder)
