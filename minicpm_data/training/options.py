"""The options of training, which both backends have, and what they mean: schedule, layers, and what cannot be."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicpm_data.datasets.options import DataOptions
from minicpm_data.model_options import OneDevice, SourceOptions
from minicpm_data.option_checks import check_range
from minicpm_data.schedules import Decay, WarmupStableDecay
from weights_io.adapters import AdapterConfig
from weights_io.catalog import find
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.memory import ADAPTERS
from weights_io.parameters import parameters

if TYPE_CHECKING:
    from weights_io.adapters import Adapter
    from weights_io.config import ModelConfig

# A resumed run must agree on all options but these.
RESUMABLE_OPTIONS = frozenset(
    """train test iters epochs mask_prompt learning_rate lr_schedule warmup_steps clip steps_per_report steps_per_eval
    val_batches test_batches save_every resume report_to project_name hub data config init_from tokenizer
    grad_checkpoint adapter_path ignore_keys special_tokens_as_text save_path save_dtype mesh distributed
    coordinator_address num_processes process_id join_timeout""".split()
)


def settings_of(options: Any) -> dict[str, Any]:
    """What a resumed run must agree on, as JSON has it."""
    kept = {name: value for name, value in vars(options).items() if name not in RESUMABLE_OPTIONS}
    return json.loads(json.dumps(kept, default=str))


@dataclass(frozen=True)
class FinetuneOptions(DataOptions, SourceOptions):
    config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"])] = None
    """YAML file of options, as mlx_lm has it; flags go before it."""
    data: Path = Path("data")
    """Folder with train, valid (or dev) and test as .jsonl or .json, or one such file to train on."""
    train: bool = False
    """Train; that is what happens anyway, unless --test comes without --train, --iters and --epochs."""
    test: bool = False
    """Print the loss on the test examples: after training, or of what was trained before."""
    iters: int | None = None
    """Optimiser steps (mlx_lm counts each batch of --grad-accumulation-steps); 1000 by default."""
    epochs: float | None = None
    """Passes over the examples, in place of --iters."""
    batch_size: int = 4
    """Examples (with --pack: rows of them) that are run together."""
    grad_accumulation_steps: int = 1
    """Batches whose gradients make one step; every trained token weighs the same."""
    max_seq_length: int = 2048
    """Longer examples are cut; those whose prompt alone is longer are left out."""
    pack: bool = False
    """Fill rows of --max-seq-length with several examples, which do not see each other."""
    ignore_chat_template: bool = False
    """Join prompt and answer as they stand, as generate's flag of this name does."""
    train_on_prompt: bool = False
    """Train on the whole conversation, not only on the assistant's answers."""
    mask_prompt: bool = False
    """Prompts are masked anyway, unless --train-on-prompt is given."""
    loss: Literal["sft", "dpo", "orpo"] = "sft"
    """Cross entropy, or a preference between "chosen" and "rejected" answers."""
    beta: float = 0.1
    """Strength of the preference."""
    learning_rate: float = 5e-5
    """Highest learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """What it does after the warm-up; wsd is constant, and falls in the last tenth."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default a tenth of all, 100 at most."""
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "muon"] = "adamw"
    """Optimiser, in float32; Adafactor and Muon are each library's own, and not the same in both backends."""
    weight_decay: float = 0.01
    """AdamW's and Muon's, on all but norms and DoRA's magnitudes."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    grad_checkpoint: bool = False
    """Recompute each layer in the backward pass: less memory, a third more work."""
    steps_per_report: int = 10
    """Steps between lines on the screen."""
    steps_per_eval: int = 200
    """Steps between losses on the valid examples."""
    val_batches: int = 25
    """Batches of such a loss; -1 takes all."""
    test_batches: int = -1
    """Batches of --test; -1 takes all."""
    save_every: int = 100
    """Steps between checkpoints."""
    resume: bool = False
    """Go on with the run in the output folder, from its last checkpoint."""
    report_to: Literal["wandb", "tensorboard"] | None = None
    """Also send the figures there."""
    project_name: str | None = None
    """Name of wandb's project; by default that of the output folder."""
    seed: int = 0
    """Of initialisation, data order and dropout."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        raise NotImplementedError

    @property
    def training(self) -> bool:
        return self.train or self.resume or not self.test or (self.iters or self.epochs) is not None

    @property
    def adapter(self) -> AdapterConfig | None:
        """None where all weights are trained."""
        return None


@dataclass(frozen=True)
class FullOptions(FinetuneOptions):
    save_path: Path = Path("finetuned")
    """Folder for the finished model (in model/), the checkpoints and the curve."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the finished model; by default the checkpoint's own."""

    @property
    def out(self) -> Path:
        return self.save_path

    def loading(self) -> dict[str, Any]:
        return {"remedy": ADAPTERS}


@dataclass(frozen=True)
class LoraOptions(FinetuneOptions):
    adapter_path: Path = Path("adapters")
    """Folder for the adapter, the checkpoints and the curve."""
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    """DoRA also trains the length of each row of the weights; full is the command finetune."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 32.0
    """Adapters count alpha / rank times."""
    dropout: float = 0.1
    """Share of the adapters' inputs that a step leaves out."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Matrices with adapters, by name; all-linear takes all of the layers (a router only by name)."""
    num_layers: int = -1
    """Only so many layers, the last ones; -1 takes all."""
    quantize: Literal[4, 8] | None = None
    """Keep the base's matrices in so many bits (QLoRA)."""
    resume_adapter_file: Path | None = None
    """Begin with this adapter (a folder, or its safetensors file)."""

    @property
    def out(self) -> Path:
        return self.adapter_path

    def loading(self) -> dict[str, Any]:
        return {"quantize": self.quantize, "quantize_head": False}

    @property
    def adapter(self) -> AdapterConfig:
        dora = self.fine_tune_type == "dora"
        return AdapterConfig(self.rank, self.alpha, self.dropout, dora, tuple(self.targets), self.base_model)

    @property
    def base_model(self) -> str:
        """Where the adapter's reader finds its base: a repository rather than our short name, the whole of a path."""
        model = self.model or "pico"
        entry = find(model)
        if entry is not None:
            return entry.repo or entry.name
        return str(Path(model).resolve()) if Path(model).exists() else model


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(DataOptions, OneDevice):
    tokenizer: Path
    """Folder of the tokenizer."""
    data: Path
    """Folder with stable/ and decay/, each with train.jsonl and valid.jsonl."""
    save_path: Annotated[Path, Former("out")]
    """Folder for checkpoints, metrics and the finished model."""
    config: Path | None = None
    """config.json of the model to make from nothing."""
    init_from: str | None = None
    """Begin with this model's weights (folder, hub id or short name) in place of --config."""
    from_step: int = 0
    """Begin at this step of the schedule: there is no warm-up after it, and the data is that of its stage."""
    iters: Annotated[int, Former("steps")] = 5000
    """Optimiser steps in all."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 500
    """Steps of the decay stage, at the end; 10 percent of all is enough."""
    decay: Decay = "exponential"
    """Form of the decay."""
    half_life: float = 140.0
    """Steps in which the exponential decay halves the learning rate."""
    batch_size: int = 16
    """Windows a step."""
    max_seq_length: Annotated[int, Former("seq_length")] = 256
    """Tokens a window."""
    learning_rate: float = 0.01
    """Rate of the stable stage; matrices get muP's share of it."""
    weight_decay: float = 0.1
    """AdamW's, on matrices."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.95
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this; masters and moments are float32. Default: bfloat16, and float32 on a CPU and TPU v2 or v3."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the finished model."""
    grad_checkpoint: Annotated[bool, Former("remat")] = False
    """Recompute each layer in the backward pass: less memory, a third more work."""
    save_every: int = 500
    """Steps between checkpoints."""
    steps_per_eval: Annotated[int, Former("valid_every")] = 250
    """Steps between validation losses."""
    resume: bool = False
    """Go on with the run in the output folder, from its last checkpoint."""
    report_to: Literal["wandb", "tensorboard"] | None = None
    """Also send the figures there."""
    project_name: str | None = None
    """Name of wandb's project; by default that of the output folder."""
    seed: int = 0
    """Of initialisation and data order."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.save_path


def schedule_of(options: FinetuneOptions, steps: int) -> Callable[[int], float]:
    """Learning rate by step. A decay would end one step after the last, so that the last still learns."""
    warmup = min(100, steps // 10) if options.warmup_steps is None else options.warmup_steps
    if warmup > steps:
        raise InputError(f"{warmup} is more than the {steps} steps of the run.", option="warmup_steps")
    if options.lr_schedule == "constant":
        return WarmupStableDecay(options.learning_rate, steps, warmup, 0)
    falling = max(1, steps // 10) if options.lr_schedule == "wsd" else steps - warmup
    form: Decay = "cosine" if options.lr_schedule == "cosine" else "linear"
    return WarmupStableDecay(options.learning_rate, steps + 1, warmup, min(falling, steps - warmup) + 1, form)


def check(options: FinetuneOptions) -> None:
    """Refuse what cannot work before anything is imported or written."""
    check_range(options, "iters", "batch_size", "grad_accumulation_steps", "steps_per_report", least=1)
    check_range(options, "steps_per_eval", "save_every", least=1)
    check_range(options, "max_seq_length", least=2)
    check_range(options, "learning_rate", "clip", "beta", "epochs", above=0)
    check_range(options, "seed", least=0, below=2**32)
    check_range(options, "weight_decay", least=0, below=1)
    check_range(options, "warmup_steps", least=0)
    if options.iters is not None and options.epochs is not None:
        raise InputError("and {epochs} both say how long to train; leave one of them out.", "iters", ["epochs"])
    for name in ("val_batches", "test_batches"):
        if (value := getattr(options, name)) != -1 and value < 1:
            raise InputError(f"is {value}; it must be at least 1, or -1 for all.", option=name)
    options.check_placement()
    if options.pack and options.loss != "sft":
        raise InputError("is for {loss} sft; pairs stand in rows of their own.", "pack", ["loss"])
    if options.train_on_prompt and (options.mask_prompt or options.loss != "sft"):
        raise InputError(
            "goes with neither {mask_prompt} nor a preference loss; leave one of them out.",
            option="train_on_prompt",
            others=["mask_prompt"],
        )
    if not options.data.exists():
        raise InputError(
            f"{options.data} does not exist; give a folder with train.jsonl, or such a file.", option="data"
        )
    if getattr(options, "fine_tune_type", None) == "full":
        raise InputError("full is a command of its own: finetune in place of lora.", option="fine_tune_type")
    _ = options.adapter  # checks rank, alpha and dropout


def check_layers(options: FinetuneOptions, config: "ModelConfig") -> None:
    """Refuse adapters that the model has no place for."""
    from weights_io.adapters import target_parameters

    if options.adapter is None:
        return
    target_parameters(config, options.adapter.targets)
    layers, most = getattr(options, "num_layers", -1), config.num_hidden_layers
    if layers != -1 and not 1 <= layers <= most:
        raise InputError(f"is {layers}; the model has {most} layers (-1 takes all).", option="num_layers")


def adapted_layers(options: LoraOptions, config: "ModelConfig") -> range:
    """The layers that get adapters."""
    count = config.num_hidden_layers
    return range(0 if options.num_layers == -1 else count - options.num_layers, count)


def given_adapter(options: LoraOptions, config: "ModelConfig") -> "Adapter":
    """The adapter of --resume-adapter-file, which must be of the kind that is to be trained."""
    from weights_io.adapters import read_adapter, target_parameters
    from weights_io.parameters import layer_of

    assert options.resume_adapter_file is not None
    found = read_adapter(options.resume_adapter_file, config)
    wanted = options.adapter
    layers = adapted_layers(options, config)
    tensors = [t for p in target_parameters(config, wanted.targets) for of in p.mlx_names(config).values() for t in of]
    ours = {tensor.removesuffix(".weight") for tensor in tensors if layer_of(tensor) in layers}
    for name, there, here in (
        ("rank", found.config.rank, wanted.rank),
        ("alpha", found.config.alpha, wanted.alpha),
        ("DoRA", found.config.dora, wanted.dora),
    ):
        if there != here:
            raise InputError(
                f"the adapter in {options.resume_adapter_file} has {name} {there}, and the options say {here}; "
                "give the options that it was trained with."
            )
    if different := sorted(ours ^ found.tensors.keys()):
        place = "not on" if different[0] in ours else "on"
        raise InputError(
            f"the adapter in {options.resume_adapter_file} is {place} {different[0]}, and the options say otherwise; "
            "give the --targets and --num-layers that it was trained with."
        )
    return found


def is_decayed(name: str, config: "ModelConfig") -> bool:
    """Whether weight decay goes on the weight of this name, in either backend: the table says so, and of an adapter's
    parts not on DoRA's magnitude, which is a length."""
    return name not in _not_decayed(config) and name.rpartition(".")[2] != "magnitude"


@functools.cache
def _not_decayed(config: "ModelConfig") -> frozenset[str]:
    """Names in the JAX model, and in the MLX model."""
    spared = [parameter for parameter in parameters(config) if not parameter.is_decayed]
    return frozenset(name for parameter in spared for name in (parameter.name, *parameter.mlx_names(config)))
