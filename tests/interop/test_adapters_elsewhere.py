"""Adapters between peft, mlx_lm and here: what each makes, the others compute the same logits with."""

import importlib
import json

import numpy as np
import ours
import peft
import pytest
import tiny_adapter
import tiny_training
import torch
from test_peft import CONFIG, IDS, logits
from transformers import LlamaForCausalLM

from minicpm_data.training.options import LoraOptions
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.fuse import Options, main

pytestmark = pytest.mark.interop

PEFT_KINDS = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
        "alpha_pattern": {"v_proj": 3, "q_proj": 8},
    },
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {"layers_to_transform": [1], "target_modules": ["gate_proj", "up_proj"]},
    "dora, patterns": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "layers_to_transform": 0},
}
MLX_KINDS = {"lora": {}, "last layers": {"layers": [1]}, "ranks": {"ranks": (4, 2)}, "dora": {"dora": True}}
OUR_KINDS = {**MLX_KINDS, "first layer": {"layers": [0]}, "dora, ranks": {"dora": True, "ranks": (3, 4, 1)}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a random Llama, opened."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return open_checkpoint(folder)


def opened(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def fuse(base, adapter, out) -> np.ndarray:
    """The logits of the model that the command writes, in transformers."""
    main(Options(model=str(base.path), adapter_path=(adapter,), save_path=out))
    return logits(opened(out))


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_an_adapter_of_peft_fused_here(base, tmp_path, kind, bin_file):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **PEFT_KINDS[kind]}
    model = peft.get_peft_model(opened(base.path), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    expected = logits(model)
    assert np.abs(expected - logits(opened(base.path))).max() > 0.3
    model.save_pretrained(tmp_path / "adapter", safe_serialization=not bin_file)
    if bin_file:
        assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    ours.close(fuse(base, tmp_path / "adapter", tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", OUR_KINDS)
def test_an_adapter_of_ours_in_peft(base, tmp_path, kind):
    save_adapter(tmp_path / "adapter", tiny_adapter.make(base, **OUR_KINDS[kind]), base.config)
    model, loaded = opened(base.path), set()
    with pytest.MonkeyPatch.context() as patch:  # what peft misses, or does not know, is a warning of its
        patch.setattr("warnings.warn", lambda message, *_, **__: loaded.add(str(message)))
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not [text for text in loaded if "adapter" in text.lower()]
    expected = fuse(base, tmp_path / "adapter", tmp_path / "out")
    assert np.abs(expected - logits(opened(base.path))).max() > 0.3
    ours.close(logits(model), expected)
    ours.close(logits(model.merge_and_unload()), expected)


TRAINED = {
    "lora": {},
    "all-linear": {"targets": ("all-linear",)},
    "dora, last layer": {"fine_tune_type": "dora", "num_layers": 1, "targets": ("q_proj", "o_proj", "down_proj")},
}


@pytest.mark.parametrize("backend", ours.BACKENDS)
@pytest.mark.parametrize("kind", TRAINED)
def test_an_adapter_that_was_trained_here_in_peft(base, tmp_path, kind, backend):
    options = LoraOptions(model=str(base.path), adapter_path=tmp_path / "adapter", **TRAINED[kind])
    worker = importlib.import_module(f"{backend}.training.trainer").Trainer(ours.load(backend, base.path), options)
    batch = {"ids": IDS.astype(np.int32), "labels": IDS.astype(np.int32), "segments": np.ones_like(IDS, np.int32)}
    for step in range(3):
        worker.step([batch], 2e-2, step)
    worker.export()
    expected = ours.logits(tiny_training.model_of(worker), IDS)
    model = opened(base.path)
    assert np.abs(expected - logits(model)).max() > 0.3
    ours.close(logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter")), expected)


def of_mlx_lm(folder, adapter=None) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if adapter is not None:
        from mlx_lm.tuner.utils import load_adapters

        model = load_adapters(model, str(adapter))
        model.eval()
    return np.asarray(model(mx.array(IDS)))


@pytest.mark.parametrize("kind", MLX_KINDS)
def test_an_adapter_of_ours_in_mlx_lm(base, tmp_path, kind):
    save_adapter(tmp_path / "adapter", tiny_adapter.make(base, **MLX_KINDS[kind]), base.config, form="mlx_lm")
    expected = fuse(base, tmp_path / "adapter", tmp_path / "out")
    ours.close(of_mlx_lm(base.path, tmp_path / "adapter"), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_mlx_lm_fused_here(base, tmp_path, dora):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.random.seed(0)
    model, _ = load_model(base.path)
    model.freeze()
    numbers = {"rank": 4, "scale": 5.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, numbers, use_dora=dora)
    weights = {
        name: mx.random.normal(array.shape) * 0.1 if name.endswith("lora_b") else array
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(weights.items()), strict=False)
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), weights)
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": numbers, "seed": 0, "model": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    model.eval()
    assert len(read_adapter(tmp_path / "adapter", base.config).tensors) == 7
    expected = fuse(base, tmp_path / "adapter", tmp_path / "out")
    assert np.abs(expected - logits(opened(base.path))).max() > 0.3
    ours.close(np.asarray(model(mx.array(IDS))), expected)


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_a_fused_model_here(base, tmp_path, backend):
    save_adapter(tmp_path / "adapter", tiny_adapter.make(base, dora=True), base.config)
    expected = fuse(base, tmp_path / "adapter", tmp_path / "out")
    ours.close(ours.logits(ours.load(backend, tmp_path / "out"), IDS), expected)
