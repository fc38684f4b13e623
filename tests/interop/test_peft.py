"""A LoRA that peft trains here: the adapter and the merged model open in both backends with its logits."""

import importlib

import numpy as np
import ours
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weights_io.errors import InputError

pytestmark = pytest.mark.interop

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
    attn_implementation="eager",
)
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (4, 24))


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the base model, the adapter and the merged model, with the logits of the first and the last."""
    root = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    base.save_pretrained(root / "base")
    plain = logits(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    with_adapter = logits(model)
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "merged")
    ours.close(logits(LlamaForCausalLM.from_pretrained(root / "merged")), with_adapter)
    assert np.abs(with_adapter - plain).max() > 1  # the adapter is not lost in the tolerance
    return root, plain, with_adapter


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_merged_and_base_model(trained, backend):
    root, plain, with_adapter = trained
    ours.close(ours.logits(ours.load(backend, root / "merged"), IDS), with_adapter)
    ours.close(ours.logits(ours.load(backend, root / "base"), IDS), plain)


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_the_adapter_on_the_base_model(trained, backend):
    root, _, with_adapter = trained
    model, _ = importlib.import_module(backend).load(root / "base", "float32", adapter=root / "adapter")
    ours.close(ours.logits(model, IDS), with_adapter)
    with pytest.raises(InputError, match="config.json does not exist"):
        importlib.import_module(backend).load(root / "adapter")
