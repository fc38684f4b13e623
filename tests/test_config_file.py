"""``--config file.yaml`` of the fine-tuning commands: mlx_lm's files are read, flags go before them."""

import dataclasses
import signal
import sys

import pytest

from minicpm_data.training import finetuning
from minicpm_data.training.options import LoraOptions
from minicpm_data.training.yaml_config import flags_of_file
from weights_io.errors import InputError

MLX_LM = """
model: minicpm-1b
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {adamw: {}}
data: /data
seed: 3
num_layers: 16
batch_size: 2
iters: 30
learning_rate: 1e-5
steps_per_eval: 20
resume_adapter_file: null
mask_prompt: false
clear_cache_threshold: 0
grad_checkpoint: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule: {name: cosine_decay, warmup: 10, warmup_init: 1e-7, arguments: [2e-5, 30, 1e-7]}
"""


def options_of(monkeypatch, *argv: str) -> LoraOptions:
    """What the command would do with these flags."""
    found: list[LoraOptions] = []
    monkeypatch.setattr(finetuning, "finetune", lambda options, *_: found.append(options))
    monkeypatch.setattr(sys, "argv", ["lora", *argv])
    before = signal.getsignal(signal.SIGINT)
    finetuning.run(lambda: None, None, LoraOptions, "lora")
    assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C ends the process no longer than the command runs
    return found[0]


def test_a_file_of_mlx_lm_and_flags_before_it(tmp_path, monkeypatch):
    path = tmp_path / "lora.yaml"
    path.write_text(MLX_LM)
    options = options_of(monkeypatch, "--batch-size", "5", "-c", str(path))
    assert (options.model, options.train, options.optimizer, options.grad_checkpoint) == (
        "minicpm-1b",
        True,
        "adamw",
        True,
    )
    assert (options.batch_size, options.iters, options.seed, options.num_layers) == (5, 30, 3, 16)
    assert (options.adapter.rank, options.adapter.scale, options.dropout) == (8, 20.0, 0.0)
    assert options.targets == ("q_proj", "v_proj")
    assert (options.lr_schedule, options.warmup_steps, options.learning_rate) == ("cosine", 10, 2e-5)
    assert not options.mask_prompt and options.resume_adapter_file is None


def test_the_fields_themselves_are_keys(tmp_path, monkeypatch):
    path = tmp_path / "lora.yaml"
    path.write_text("targets: all-linear\nlr-schedule: wsd\nalpha: 16\npack: yes\n")
    options = options_of(monkeypatch, "--config", str(path))
    expected = LoraOptions(targets=("all-linear",), lr_schedule="wsd", alpha=16.0, pack=True, config=path)
    assert dataclasses.asdict(options) == dataclasses.asdict(expected)


@pytest.mark.parametrize(
    "text, said",
    [
        ("rank: [1", "is not YAML"),
        ("- rank", "must hold lines"),
        ("", "must hold lines"),
        ("ranks: 4", "ranks, which is no option"),
        ("config: other.yaml", "config, which is no option"),
        ("rank: {a: 1}", "must be one value"),
        ("lora_parameters: {rank: 8, layers: 4}", "of another form"),
        ("lora_parameters: {rank: 8, scale: big}", "is no number"),
        ("lora_parameters: {keys: 3}", "keys are no list"),
        ("lr_schedule: {name: step_decay, arguments: [1]}", "an lr_schedule that is not known"),
        ("lr_schedule: {name: cosine_decay, arguments: 1e-5}", "an lr_schedule that is not known"),
        ("lr_schedule: {name: [a], arguments: [1]}", "an lr_schedule that is not known"),
        ("lr_schedule: {name: cosine_decay, arguments: [x, 10]}", "are no numbers"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5, 100, 1e-6]}", "ends at 1e-06"),
        ("lr_schedule: {name: linear_schedule, arguments: [1e-5, 1e-6, 100]}", "ends at 1e-06"),
        ("iters: 3\nrank: 4\niters: 4", "the key iters stands there twice"),
        ("lora_parameters: {rank: 8, rank: 4}", "the key rank stands there twice"),
        ("a: " + "{a: " * 2000 + "1" + "}" * 2000, "more than 2000 values, or 10 lists"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 3)), "is not YAML"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)), "2000"),
        ("a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 20)), "2000"),
        ("a: &a [*a]", "a list or mapping, .*, within itself"),
        ("iters: 2001-99-99", "is not YAML"),
        ("iters: !!timestamp x", "is not YAML"),
        ("iters: !!python/object/apply:os.system [x]", "is not YAML"),
        ("? [1]\n: 2", "is not YAML"),
        ("x" * 100_000, "such a file has at most"),
        ("optimizer_config: adamw", "has an optimizer_config"),
        ("optimizer_config: {adamw: {eps: 1}}", "has an optimizer_config"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, said):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        flags_of_file(path, LoraOptions)


def test_anchors_and_merges(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("lora_parameters: &a {rank: 4, dropout: 0.5}\nlora-parameters: {<<: *a, rank: 8}\n")
    flags = flags_of_file(path, LoraOptions)
    assert flags == ["--rank", "4", "--dropout", "0.5", "--rank", "8", "--dropout", "0.5"]


def test_no_file(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        options_of(monkeypatch, "--config", str(tmp_path / "none.yaml"))
    assert stopped.value.code == 2
    assert "does not exist" in capsys.readouterr().err
