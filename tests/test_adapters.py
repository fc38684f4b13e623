"""Adapters as arrays and as files of both forms; what is refused, and by which sentence."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_adapter
from documented_commands import typed

from weights_io import adapters
from weights_io.adapters import (
    AdapterConfig,
    read_adapter,
    save_adapter,
    stack_adapter,
    target_parameters,
    unstack_adapter,
)
from weights_io.checkpoint import open_checkpoint
from weights_io.errors import InputError
from weights_io.files.safetensors import Computed, write_file
from weights_io.lora import adapter_by_layer, adapter_from_layers, row_norms
from weights_io.parameters import module_name, modules

FORMS = ("peft", "mlx_lm")
WEIGHTS = {"peft": "adapter_model.safetensors", "mlx_lm": "adapters.safetensors"}


@pytest.fixture(scope="module")
def dense(reference):
    return open_checkpoint(reference("dense_2b"))


@pytest.fixture(scope="module")
def moe(reference):
    return open_checkpoint(reference("moe_8x2b"))


def short(parameters):
    return [module_name(p.name).rpartition(".")[2] for p in parameters]


def rewrite(folder, form, change_config=None, change_tensors=None):
    """An adapter's files with ``change_config`` keys, and tensors as ``change_tensors`` returns them."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (change_config or {})))
    if change_tensors:
        tensors = change_tensors(safetensors.numpy.load_file(folder / WEIGHTS[form]))
        write_file(folder / WEIGHTS[form], {name: Computed.of(array) for name, array in tensors.items()})


def test_targets(dense, moe):
    linear = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert short(target_parameters(dense.config, ["all-linear"])) == [*linear, "gate_proj", "up_proj", "down_proj"]
    assert short(target_parameters(dense.config, ["v_proj", "self_attn.q_proj"])) == ["q_proj", "v_proj"]
    assert short(target_parameters(moe.config, ["all-linear"])) == [*linear, "w1", "w2", "w3"]
    assert short(target_parameters(moe.config, ["gate", "experts.w2"])) == ["gate", "w2"]
    for target in ("gate_proj", "proj", "embed_tokens", "lm_head", "model.norm", "", "weight"):
        with pytest.raises(
            InputError, match=r"no matrix .* choose among q_proj, k_proj, v_proj and 5 more, or give all-linear"
        ):
            target_parameters(moe.config, [target])
    with pytest.raises(InputError, match="no matrix 'gate' "):
        target_parameters(dense.config, ["gate"])
    with pytest.raises(InputError, match="at least one target"):
        target_parameters(dense.config, [])


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"alpha": np.nan}, {"dropout": 1.0}])
def test_numbers_that_no_adapter_has(wrong):
    with pytest.raises(InputError, match=f"the adapter's {next(iter(wrong))} is"):
        AdapterConfig(**{"rank": 8, "alpha": 16, **wrong})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_stacks_and_back(request, name, dora):
    checkpoint = request.getfixturevalue(name)
    model = checkpoint.config
    adapter = tiny_adapter.make(checkpoint, dora=dora)
    table = target_parameters(model, ["all-linear"])
    arrays = {p.name: stack_adapter(p, adapter, model) for p in table}
    for p in table:
        a, b, magnitude = arrays[p.name]
        rows, columns = p.tensor_shape(model)
        assert a.shape == (*p.stack(model), 4, columns) and b.shape == (*p.stack(model), rows, 4)
        assert magnitude.shape == (*p.stack(model), rows) if dora else magnitude is None
    tiny_adapter.same(unstack_adapter(adapter.config, arrays, model), adapter)
    layers = {name: arrays for p in table for name, arrays in adapter_by_layer(p, adapter, model).items()}
    assert len(layers) == 7 * model.num_hidden_layers
    back = adapter_from_layers(adapter.config, layers, model)
    tiny_adapter.same(dataclasses.replace(back, tensors={m: back.tensors[m] for m in adapter.tensors}), adapter)


def test_ranks_and_scales_become_one(moe):
    """Smaller ranks are padded, other scales folded into b: W changes by the same."""
    adapter = tiny_adapter.make(moe, ranks=(4, 2, 3))
    for p in target_parameters(moe.config, ["all-linear"]):
        a, b, _ = stack_adapter(p, adapter, moe.config)
        for place, name in zip(np.ndindex(*p.stack(moe.config)), p.hf_names(moe.config), strict=True):
            change = adapter.config.scale * b[place] @ a[place]
            np.testing.assert_allclose(change, adapter.tensors[module_name(name)].change(), rtol=1e-5, atol=1e-6)


def test_layers_without_an_adapter_change_nothing(dense):
    (q,) = target_parameters(dense.config, ["q_proj"])
    names = q.hf_names(dense.config)
    adapter = tiny_adapter.make(dense, ["q_proj"], layers=[1], dora=True)
    with pytest.raises(ValueError, match="give the row norms"):
        stack_adapter(q, adapter, dense.config)
    a, b, magnitude = stack_adapter(q, adapter, dense.config, row_norms(dense))
    assert not a[0].any() and not b[0].any() and a[1].any()
    matrices = unstack_adapter(adapter.config, {q.name: (a, b, magnitude)}, dense.config).tensors[module_name(names[0])]
    weight = dense.tensors[names[0]].read()
    np.testing.assert_allclose(matrices.applied(weight), weight, rtol=1e-6)
    again = unstack_adapter(adapter.config, {q.name: (a, b, magnitude)}, dense.config, layers=[1])
    tiny_adapter.same(again, adapter)
    assert list(adapter_by_layer(q, adapter, dense.config)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [None, [1, 2], [0]])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_both_forms_keep_every_number(request, tmp_path, name, layers, form):
    checkpoint = request.getfixturevalue(name)
    for dora in [False] if (name, form) == ("moe", "mlx_lm") else [False, True]:
        adapter = tiny_adapter.make(checkpoint, layers=layers, dora=dora)
        written = save_adapter(tmp_path, adapter, checkpoint.config, form=form)
        assert sorted(tmp_path.iterdir()) == sorted(written)
        tiny_adapter.same(read_adapter(tmp_path, checkpoint.config), adapter)
        tiny_adapter.same(read_adapter(written[0], checkpoint.config), adapter)


def test_several_ranks_in_both_forms(dense, tmp_path):
    adapter = tiny_adapter.make(dense, ranks=(4, 2), layers=[0, 2])
    save_adapter(tmp_path / "peft", adapter, dense.config)
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(raw["rank_pattern"].values()) == {2} and len(raw["rank_pattern"]) == 7
    assert set(raw["alpha_pattern"].values()) == {12} and raw["layers_to_transform"] == [0, 2]
    tiny_adapter.same(read_adapter(tmp_path / "peft", dense.config), adapter)
    save_adapter(tmp_path / "mlx", adapter, dense.config, form="mlx_lm")  # which has one rank and one scale
    for name, matrices in read_adapter(tmp_path / "mlx", dense.config).tensors.items():
        assert matrices.scale == 2.0
        np.testing.assert_allclose(matrices.change(), adapter.tensors[name].change(), rtol=1e-5, atol=1e-6)


def test_modules_of_which_some_layers_have_none_are_named_whole(dense, tmp_path):
    adapter = tiny_adapter.make(dense, ["q_proj", "v_proj"])
    kept = {name: m for name, m in adapter.tensors.items() if name != "model.layers.1.self_attn.v_proj"}
    adapter = dataclasses.replace(adapter, tensors=kept)
    save_adapter(tmp_path, adapter, dense.config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == list(kept)
    tiny_adapter.same(read_adapter(tmp_path, dense.config), adapter)


def test_a_base_model_is_noted(dense, tmp_path):
    adapter = tiny_adapter.make(dense, ["q_proj"])
    for form in FORMS:
        save_adapter(tmp_path / form, adapter, dense.config, form=form, base_model="openbmb/MiniCPM-2B-sft-bf16")
        assert read_adapter(tmp_path / form, dense.config).config.base_model == "openbmb/MiniCPM-2B-sft-bf16"


@pytest.mark.parametrize(
    "key, value, scale", [("use_rslora", True, 4.0), ("alpha_pattern", {"layers.1.*q_proj": 2}, 2.0)]
)
def test_scales_of_peft(dense, tmp_path, key, value, scale):
    """Of rank 4 and alpha 8: over the root of the rank; another alpha where a pattern fits."""
    save_adapter(tmp_path, tiny_adapter.make(dense, ["q_proj"]), dense.config)
    rewrite(tmp_path, "peft", {key: value})
    adapter = read_adapter(tmp_path, dense.config)
    assert [m.scale for m in adapter.tensors.values()] == [scale, 0.5 if key == "alpha_pattern" else scale, scale]
    assert adapter.config.scale == scale


def test_bfloat16_and_old_names(dense, tmp_path):
    adapter = tiny_adapter.make(dense, ["q_proj"])
    save_adapter(tmp_path, adapter, dense.config)
    rename = lambda name: name.replace("lora_A.weight", "lora_A.default.weight")  # noqa: E731
    rewrite(
        tmp_path, "peft", None, lambda tensors: {rename(k): v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    )
    found = read_adapter(tmp_path, dense.config)
    for name, matrices in adapter.tensors.items():
        assert found.tensors[name].a.dtype == np.float32
        np.testing.assert_array_equal(found.tensors[name].a, matrices.a.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    "form, config, said",
    [
        ("peft", {"peft_type": "LOHA"}, 'peft_type "LOHA"; only LORA'),
        ("peft", {"bias": "all"}, 'bias "all"'),
        ("peft", {"modules_to_save": ["lm_head"]}, r"modules_to_save = \[\"lm_head\"\], which may change the numbers"),
        ("peft", {"fan_in_fan_out": True}, "fan_in_fan_out = true"),
        ("peft", {"trainable_token_indices": [1]}, "trainable_token_indices"),
        ("peft", {"layer_replication": [[0, 2]]}, "layer_replication"),
        ("peft", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ("peft", {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow = 1"),
        ("peft", {"init_lora_weights": "pissa"}, "which changed the base model too"),
        ("peft", {"use_dora": True}, "lacks the magnitude of model.layers.0.self_attn.q_proj"),
        ("peft", {"r": 8}, "says rank 8 for model.layers.0.self_attn.q_proj, whose matrices have rank 4"),
        ("peft", {"rank_pattern": {"q_proj": 2}}, "says rank 2"),
        ("peft", {"rank_pattern": {"(": 2}}, "the pattern .* correct it"),
        ("peft", {"r": "4"}, "it must be a positive whole number"),
        ("peft", {"lora_alpha": None}, "lora_alpha null; it must be a number"),
        ("peft", {"lora_alpha": -1}, "alpha is -1.* positive"),
        ("peft", {"alpha_pattern": {"q_proj": 0}}, "scales model.layers.0.self_attn.q_proj by 0"),
        ("peft", {"layers_to_transform": [1]}, r"layers_to_transform \[1\] and yet tensors for model.layers.0"),
        ("peft", {"target_modules": ["v_proj"]}, "target_modules .* and yet tensors for model.layers.0"),
        ("peft", {"use_dora": "false"}, 'use_dora "false"; it must be true or false'),
        ("peft", {"use_rslora": 1}, "use_rslora 1; it must be true or false"),
        ("peft", {"fan_in_fan_out": "false"}, 'fan_in_fan_out "false"; it must be true or false'),
        ("peft", {"inference_mode": 0}, "inference_mode 0; it must be true or false"),
        ("peft", {"layers_to_transform": "0"}, "must be a list of whole numbers"),
        ("peft", {"layers_to_transform": [True]}, "must be a list of whole numbers"),
        ("peft", {"target_modules": ".*v_proj"}, "target_modules .* and yet tensors for model.layers.0"),
        ("peft", {"target_modules": {"q_proj": 1}}, "must be a list of names or one pattern"),
        ("peft", {"target_modules": "(.+)+x"}, "which may take for ever"),
        ("peft", {"exclude_modules": ["q_proj"]}, "exclude_modules .* and yet tensors for model.layers.0"),
        ("peft", {"alpha_pattern": {"(.*)*x": 2}}, "which may take for ever"),
        ("peft", {"rank_pattern": {".*.*.*.*x": 2}}, "which may take for ever"),
        ("peft", {"rank_pattern": {f".*{i}.*x": 4 for i in range(50)}}, "which may take for ever"),
        ("peft", {"rank_pattern": {f"x{i}": 4 for i in range(5001)}}, "5001 patterns in rank_pattern"),
        ("peft", {"r": 10**400}, "it must be a positive whole number"),
        ("peft", {"lora_alpha": 10**400}, "it must be a number that float32 holds"),
        ("peft", {"base_model_name_or_path": ["a"]}, "it must be a name"),
        ("mlx_lm", {"use_dora": 1}, "use_dora 1; it must be true or false"),
        ("mlx_lm", {"use_dora": True}, 'use_dora true and fine_tune_type "lora"; correct one'),
        ("mlx_lm", {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow = 1, which is not understood"),
        ("mlx_lm", {"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}}, "lora_parameters.alpha = 8, which is"),
        ("mlx_lm", {"lora_parameters": {"rank": 8, "scale": 2.0}}, "rank 8, not 4, and yet tensors for"),
        ("mlx_lm", {"lora_parameters": {"scale": True}}, "scale true; it must be a number"),
        ("mlx_lm", {"lora_parameters": {"scale": 2.0, "keys": ["self_attn.v_proj"]}}, "keys .* and yet tensors for"),
        ("mlx_lm", {"num_layers": 1}, "num_layers 1 and yet tensors for model.layers.0"),
        ("mlx_lm", {"num_layers": "all"}, 'num_layers "all"; it must be a whole number'),
        ("mlx_lm", {"fine_tune_type": "full"}, 'fine_tune_type "full"; only lora and dora'),
        ("mlx_lm", {"fine_tune_type": "dora"}, "lacks the magnitude"),
        ("mlx_lm", {"lora_parameters": {"rank": 4, "alpha": 8}}, "no lora_parameters with a scale"),
        ("mlx_lm", {"lora_parameters": {"rank": 4, "scale": -2.0}}, "alpha .* positive"),
        ("mlx_lm", {"lora_parameters": {"scale": 2.0, "dropout": "a"}}, 'dropout "a"; it must be a number'),
    ],
)
def test_configs_that_are_refused(dense, tmp_path, form, config, said):
    save_adapter(tmp_path, tiny_adapter.make(dense, ["q_proj"]), dense.config, form=form)
    rewrite(tmp_path, form, config)
    with pytest.raises(InputError, match=said) as caught:
        read_adapter(tmp_path, dense.config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "form, config",
    [
        ("peft", {"target_modules": "all-linear"}),
        ("peft", {"target_modules": r".*\.self_attn\.(q|k|v)_proj"}),
        ("peft", {"exclude_modules": ["lm_head"], "use_qalora": False, "corda_config": None, "lora_bias": False}),
        ("peft", {"rank_pattern": {r"^model\.layers\.\d+\.self_attn\.(?:q|k)_proj": 4}}),
        ("mlx_lm", {"train": True, "optimizer_config": {"adam": {}}, "lr_schedule": None, "num_layers": 16}),
        ("mlx_lm", {"num_layers": -1, "lora_parameters": {"rank": 4, "alpha": 4, "scale": 2.0, "dropout": 0.0}}),
    ],
)
def test_what_the_tools_write_beside_is_read(dense, tmp_path, form, config):
    adapter = tiny_adapter.make(dense, ["q_proj"])
    save_adapter(tmp_path, adapter, dense.config, form=form)
    rewrite(tmp_path, form, config)
    tiny_adapter.same(read_adapter(tmp_path, dense.config), adapter)


def test_the_older_key_of_dora(dense, tmp_path):
    adapter = tiny_adapter.make(dense, ["q_proj"], dora=True)
    save_adapter(tmp_path, adapter, dense.config, form="mlx_lm")
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    del raw["fine_tune_type"]
    path.write_text(json.dumps(raw | {"use_dora": True, "lora_layers": 3}))
    tiny_adapter.same(read_adapter(tmp_path, dense.config), adapter)


def holding(name, array):
    return lambda tensors: tensors | {name: array}


NAN = np.full((4, 96), np.nan, np.float32)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "form, tensors, said",
    [
        ("peft", holding(f"{Q}.lora_A.weight", NAN), r"q_proj.lora_A.weight in .*NaN"),
        (
            "peft",
            holding(f"{Q}.lora_A.weight", NAN[:, :5]),
            r"q_proj.lora_A.weight in .* has shape \[4, 5\] .* \[r, 96\]",
        ),
        ("peft", holding(f"{Q}.lora_B.weight", np.ones((96, 3), np.float32)), "rank 4 and 3 in the two matrices"),
        ("peft", holding(f"{Q}.lora_B.weight", np.ones((96, 4), np.int32)), "has dtype int32"),
        (
            "peft",
            holding(Q.replace("0", "9") + ".lora_A.weight", NAN),
            "layers.9.self_attn.q_proj, which is not a matrix",
        ),
        ("peft", holding("base_model.model.lm_head.lora_A.weight", NAN), "for lm_head, which is not a matrix"),
        ("peft", holding("base_model.model.lm_head.weight", NAN), "lm_head.weight in .* is no matrix of a LoRA"),
        ("peft", holding(f"{Q}.lora_magnitude_vector", np.ones(96, np.float32)), "has a magnitude, as only DoRA has"),
        ("peft", lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lacks the b of model.layers.0"),
        ("peft", lambda t: {}, "holds no tensors"),
        ("peft", holding(f"{Q}.lora_A.default.weight", np.ones((4, 96), np.float32)), "two tensors for the a of model"),
        ("mlx_lm", holding("model.layers.0.self_attn.q_proj.lora_a", NAN), r"has shape \[4, 96\] .* \[96, r\]"),
        ("mlx_lm", holding("model.embed_tokens.lora_a", NAN), "for model.embed_tokens, which is not a matrix"),
    ],
)
def test_tensors_that_are_refused(dense, tmp_path, form, tensors, said):
    save_adapter(tmp_path, tiny_adapter.make(dense, ["q_proj"]), dense.config, form=form)
    rewrite(tmp_path, form, None, tensors)
    with pytest.raises(InputError, match=said) as caught:
        read_adapter(tmp_path, dense.config)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model(dense, moe, tmp_path):
    wide = dataclasses.replace(dense.config, hidden_size=128, num_attention_heads=8)
    save_adapter(tmp_path, tiny_adapter.make(dense), dense.config)
    with pytest.raises(InputError, match=r"model.layers.0.*lora_A.weight in .* \[4, 96\].* \[r, 128\]"):
        read_adapter(tmp_path, wide)
    save_adapter(tmp_path, tiny_adapter.make(dense, ["down_proj"]), dense.config)
    with pytest.raises(InputError, match="down_proj, which is not a matrix"):
        read_adapter(tmp_path, moe.config)


def test_folders_that_hold_no_adapter(dense, tmp_path):
    for path in (tmp_path, tmp_path / "none", dense.path):
        with pytest.raises(InputError, match="is no adapter: give the folder"):
            read_adapter(path, dense.config)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="neither peft_type nor lora_parameters"):
        read_adapter(tmp_path, dense.config)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        read_adapter(tmp_path, dense.config)
    (tmp_path / "adapters.npz").write_bytes(b"")
    with pytest.raises(InputError, match="neither a .safetensors nor a .bin"):
        read_adapter(tmp_path / "adapters.npz", dense.config)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_last_good_one(dense, tmp_path, monkeypatch, error):
    first, second = (tiny_adapter.make(dense, ["q_proj"], seed=seed) for seed in (0, 1))
    save_adapter(tmp_path, first, dense.config)

    def half(path, tensors):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch, pytest.raises((InputError, KeyboardInterrupt), match="disk of .* is full|^$"):
        patch.setattr(adapters, "write_file", half)
        save_adapter(tmp_path, second, dense.config)
    tiny_adapter.same(read_adapter(tmp_path, dense.config), first)
    assert len(list(tmp_path.iterdir())) == 2
    save_adapter(tmp_path, second, dense.config)
    tiny_adapter.same(read_adapter(tmp_path, dense.config), second)


def test_folders_that_cannot_be_written(dense, moe, tmp_path):
    adapter = tiny_adapter.make(dense, ["q_proj"])
    save_adapter(tmp_path / "a", adapter, dense.config)
    with pytest.raises(InputError, match="holds an adapter of another form"):
        save_adapter(tmp_path / "a", adapter, dense.config, form="mlx_lm")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        save_adapter(tmp_path / "file", adapter, dense.config)
    with pytest.raises(InputError, match="mlx_lm has no DoRA for experts"):
        save_adapter(tmp_path / "b", tiny_adapter.make(moe, ["w1"], dora=True), moe.config, form="mlx_lm")


def test_the_command_turns_one_form_into_the_other(dense, tmp_path):
    adapter = tiny_adapter.make(dense, layers=[1, 2])
    save_adapter(tmp_path / "peft", adapter, dense.config)
    for source, to in (("peft", "mlx_lm"), ("mlx_lm", "again")):
        form = "peft" if to == "again" else to
        given = ["--model", dense.path, "--adapter-path", tmp_path / source]
        ran = typed("weights_io.adapters", *given, "--to", form, "--save-path", tmp_path / to)
        assert ran.returncode == 0, ran.stderr
        assert "LoRA of rank 4, scale 2, on 14 matrices (q_proj, " in ran.stdout
    found = read_adapter(tmp_path / "again", dense.config)
    assert found.config.base_model == str(dense.path)
    tiny_adapter.same(dataclasses.replace(found, config=dataclasses.replace(found.config, base_model=None)), adapter)
    assert set(found.tensors) <= set(modules(dense.config))
