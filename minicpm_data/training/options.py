"""The training options of both backends, their checks, and what follows from them: the schedule and the layers."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from minicpm_data.datasets.options import DataOptions
from minicpm_data.model_options import OneDevice, SourceOptions
from minicpm_data.option_checks import check_range
from minicpm_data.schedules import Decay, WarmupStableDecay
from weights_io.adapters import AdapterConfig, adapter_folder
from weights_io.catalog import find
from weights_io.command_line import Former, Unneeded
from weights_io.errors import InputError
from weights_io.memory import ADAPTERS
from weights_io.parameters import parameters

if TYPE_CHECKING:
    from weights_io.adapters import Adapter
    from weights_io.config import ModelConfig

# Options that a resumed run may change. It must repeat all others.
RESUMABLE_OPTIONS = frozenset(
    """train test iters epochs mask_prompt learning_rate lr_schedule warmup_steps clip steps_per_report steps_per_eval
    val_batches test_batches save_every resume report_to project_name hub data config init_from tokenizer
    grad_checkpoint adapter_path ignore_keys special_tokens_as_text save_path save_dtype mesh distributed
    coordinator_address num_processes process_id join_timeout
    trust_remote_code clear_cache_threshold""".split()
)

# Options that the help of a training command shows in another group than that of a command that generates.
IN_HELP = dict.fromkeys(("seed", "batch_size", "max_seq_length"), "training") | {"ignore_chat_template": "data"}


def settings_of(options: Any) -> dict[str, Any]:
    """The options that a resumed run must repeat, as JSON values."""
    kept = {name: value for name, value in vars(options).items() if name not in RESUMABLE_OPTIONS}
    return json.loads(json.dumps(kept, default=str))


@dataclass(frozen=True)
class FinetuneOptions(DataOptions, SourceOptions):
    help_groups: ClassVar[Mapping[str, str]] = IN_HELP

    config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"])] = None
    """YAML file of options in mlx_lm's format; flags override it."""
    data: Path = Path("data")
    """Folder with train, valid (or dev) and test files (.jsonl or .json), or one such file to train on."""
    train: bool = False
    """Train. This is the default, unless --test is given without --train, --resume, --iters and --epochs."""
    test: bool = False
    """Print the loss on the test examples, after training or of an earlier run."""
    iters: int | None = None
    """Optimizer steps; default: 1000. (mlx_lm counts every batch of --grad-accumulation-steps.)"""
    epochs: float | None = None
    """Passes over the training examples, instead of --iters."""
    batch_size: int = 4
    """Examples per batch (with --pack: packed rows)."""
    grad_accumulation_steps: int = 1
    """Batches whose gradients are summed for one step; every trained token has the same weight."""
    max_seq_length: int = 2048
    """Longest example in tokens. Longer ones are cut; those whose prompt alone is longer are left out."""
    pack: bool = False
    """Pack several examples into rows of --max-seq-length; they do not attend to each other."""
    ignore_chat_template: bool = False
    """Join prompt and answer without a chat template, as generate's flag of this name does."""
    train_on_prompt: bool = False
    """Train on the whole conversation, not only on the assistant's answers."""
    mask_prompt: bool = False
    """Do not train on prompts. This is the default, unless --train-on-prompt is given."""
    loss: Literal["sft", "dpo", "orpo"] = "sft"
    """sft: cross entropy; dpo, orpo: a preference between "chosen" and "rejected" answers."""
    beta: float = 0.1
    """Strength of the preference loss."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Schedule after the warm-up; wsd is constant, then decays in the last tenth of the steps."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default: a tenth of all steps, at most 100."""
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "muon"] = "adamw"
    """Optimizer, in float32. Adafactor and Muon are those of optax or mlx, and differ between the backends."""
    weight_decay: float = 0.01
    """Weight decay of AdamW and Muon, on all weights except norms and DoRA's magnitudes."""
    clip: float = 1.0
    """Maximum norm of the gradient."""
    grad_checkpoint: bool = False
    """Recompute each layer in the backward pass: less memory, a third more computation."""
    steps_per_report: int = 10
    """Steps between printed reports."""
    steps_per_eval: int = 200
    """Steps between validation losses."""
    val_batches: int = 25
    """Batches per validation loss; -1 takes all, 0 does not validate."""
    test_batches: int = -1
    """Batches for --test; -1 takes all."""
    save_every: int = 100
    """Steps between checkpoints."""
    resume: bool = False
    """Resume the run in the output folder from its last checkpoint."""
    report_to: Literal["wandb", "tensorboard"] | None = None
    """Also send the metrics to this tool."""
    project_name: str | None = None
    """Name of the wandb project; default: the name of the output folder."""
    seed: int = 0
    """Seed of initialization, data order and dropout."""
    clear_cache_threshold: Annotated[
        int | None, tyro.conf.Suppress, Unneeded("MLX frees memory when others need it")
    ] = None
    """Accepted for scripts of mlx_lm; it changes nothing."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        raise NotImplementedError

    @property
    def training(self) -> bool:
        return self.train or self.resume or not self.test or (self.iters or self.epochs) is not None

    @property
    def adapter(self) -> AdapterConfig | None:
        """The config of the adapter to train; None where all weights are trained."""
        return None


@dataclass(frozen=True)
class FullOptions(FinetuneOptions):
    save_path: Path = Path("finetuned")
    """Folder for the finished model (in model/), the checkpoints and the loss curve."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the finished model; default: the checkpoint's own."""

    @property
    def out(self) -> Path:
        return self.save_path

    def loading(self) -> dict[str, Any]:
        return {"dequantize": True, "remedy": ADAPTERS}


@dataclass(frozen=True)
class LoraOptions(FinetuneOptions):
    help_groups: ClassVar[Mapping[str, str]] = IN_HELP | {"adapter_path": "output"}

    adapter_path: Path = Path("adapters")
    """Folder for the adapter, the checkpoints and the loss curve."""
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    """dora also trains the norm of each weight row; for full, use the command finetune."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 32.0
    """The adapters are scaled by alpha / rank."""
    dropout: float = 0.1
    """Dropout rate of the adapters' inputs."""
    targets: tuple[str, ...] | None = None
    """Names of the matrices with adapters; all-linear takes all in the layers (a router only by name). By default as in
    OpenBMB's script: q_proj and v_proj; in MiniCPM3 q_a_proj, q_b_proj, kv_a_proj_with_mqa and kv_b_proj."""
    num_layers: int = -1
    """Number of layers with adapters, counted from the last; -1 takes all."""
    quantize: Literal[4, 8] | None = None
    """Quantize the base model's matrices to this many bits (QLoRA)."""
    resume_adapter_file: Path | None = None
    """Start from this adapter (a folder, or its safetensors file)."""

    @property
    def out(self) -> Path:
        return self.adapter_path

    def loading(self) -> dict[str, Any]:
        return {"quantize": self.quantize, "quantize_head": False}

    @property
    def adapter(self) -> AdapterConfig:
        dora = self.fine_tune_type == "dora"
        targets = None if self.targets is None else tuple(self.targets)
        return AdapterConfig(self.rank, self.alpha, self.dropout, dora, targets, self.base_model)

    @property
    def base_model(self) -> str:
        """The base model as the adapter's readers find it: a short name's repository, a folder's absolute path."""
        model = self.model or "pico"
        entry = find(model)
        if entry is not None:
            return entry.repo or entry.name
        return str(Path(model).resolve()) if Path(model).exists() else model


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(DataOptions, OneDevice):
    help_groups: ClassVar[Mapping[str, str]] = IN_HELP

    tokenizer: Path
    """Folder of the tokenizer."""
    data: Path
    """Folder with stable/ and decay/, each with train.jsonl and valid.jsonl."""
    save_path: Annotated[Path, Former("out")]
    """Folder for checkpoints, metrics and the finished model."""
    config: Path | None = None
    """config.json of a model to train from scratch."""
    init_from: str | None = None
    """Start from this model's weights (folder, hub id or short name) instead of --config."""
    from_step: int = 0
    """Start at this step of the schedule: without a new warm-up, and with the data of the step's stage."""
    iters: Annotated[int, Former("steps")] = 5000
    """Total optimizer steps."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 500
    """Steps of the decay stage, at the end; 10 percent of all steps is enough."""
    decay: Decay = "exponential"
    """Shape of the decay."""
    half_life: float = 140.0
    """Steps in which the exponential decay halves the learning rate."""
    batch_size: int = 16
    """Windows per step."""
    max_seq_length: Annotated[int, Former("seq_length")] = 256
    """Tokens per window."""
    learning_rate: float = 0.01
    """Learning rate of the stable stage; muP scales it for matrices."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, on matrices."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.95
    """AdamW's beta2."""
    clip: float = 1.0
    """Maximum norm of the gradient."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation; masters and moments are float32. Default: bfloat16; float32 on a CPU and TPU v2 or v3."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the finished model."""
    grad_checkpoint: Annotated[bool, Former("remat")] = False
    """Recompute each layer in the backward pass: less memory, a third more computation."""
    save_every: int = 500
    """Steps between checkpoints."""
    steps_per_eval: Annotated[int, Former("valid_every")] = 250
    """Steps between validation losses."""
    resume: bool = False
    """Resume the run in the output folder from its last checkpoint."""
    report_to: Literal["wandb", "tensorboard"] | None = None
    """Also send the metrics to this tool."""
    project_name: str | None = None
    """Name of the wandb project; default: the name of the output folder."""
    seed: int = 0
    """Seed of initialization and data order."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.save_path


def schedule_of(options: FinetuneOptions, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step.

    A decay reaches 0 one step after the last one, so that the last step still learns.

    Arguments:
        options: the peak, the form and the warm-up.
        steps: the total number of optimizer steps.

    Raises:
        InputError: the warm-up has more steps than the run.
    """
    warmup = min(100, steps // 10) if options.warmup_steps is None else options.warmup_steps
    if warmup > steps:
        raise InputError(f"{warmup} is more than the {steps} steps of the run.", option="warmup_steps")
    if options.lr_schedule == "constant":
        return WarmupStableDecay(options.learning_rate, steps, warmup, 0)
    falling = max(1, steps // 10) if options.lr_schedule == "wsd" else steps - warmup
    form: Decay = "cosine" if options.lr_schedule == "cosine" else "linear"
    return WarmupStableDecay(options.learning_rate, steps + 1, warmup, min(falling, steps - warmup) + 1, form)


def check(options: FinetuneOptions) -> None:
    """Raises `InputError` for options that cannot work, before anything is imported or written."""
    check_range(options, "iters", "batch_size", "grad_accumulation_steps", "steps_per_report", least=1)
    check_range(options, "steps_per_eval", "save_every", least=1)
    check_range(options, "max_seq_length", least=2)
    check_range(options, "learning_rate", "clip", "beta", "epochs", above=0)
    check_range(options, "seed", least=0, below=2**32)
    check_range(options, "weight_decay", least=0, below=1)
    check_range(options, "warmup_steps", least=0)
    if options.iters is not None and options.epochs is not None:
        raise InputError("and {epochs} both say how long to train; leave one of them out.", "iters", ["epochs"])
    for name, least, of in (("val_batches", 0, " (0 does not validate)"), ("test_batches", 1, "")):
        if (value := getattr(options, name)) != -1 and value < least:
            raise InputError(f"is {value}; it must be at least {least}{of}, or -1 for all.", option=name)
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
    if (start := getattr(options, "resume_adapter_file", None)) is not None:
        adapter_folder(start)
    if getattr(options, "fine_tune_type", None) == "full":
        raise InputError("full is a command of its own: finetune in place of lora.", option="fine_tune_type")
    _ = options.adapter  # checks rank, alpha and dropout


def check_layers(options: FinetuneOptions, config: "ModelConfig") -> None:
    """Raises `InputError` where the model has no matrices or layers for the adapters."""
    from weights_io.adapters import target_parameters

    if options.adapter is None:
        return
    target_parameters(config, options.adapter.targets)
    layers, most = getattr(options, "num_layers", -1), config.num_hidden_layers
    if layers != -1 and not 1 <= layers <= most:
        raise InputError(f"is {layers}; the model has {most} layers (-1 takes all).", option="num_layers")


def adapted_layers(options: LoraOptions, config: "ModelConfig") -> range:
    """The indices of the layers that get adapters."""
    count = config.num_hidden_layers
    return range(0 if options.num_layers == -1 else count - options.num_layers, count)


def given_adapter(options: LoraOptions, config: "ModelConfig") -> "Adapter":
    """Read the adapter of --resume-adapter-file.

    Raises:
        InputError: it differs from the options in rank, alpha, DoRA, matrices or layers.
    """
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
    """Whether weight decay applies to a weight.

    The parameter table decides for the model's weights. An adapter's weights decay, except DoRA's magnitude, which is a
    length.

    Arguments:
        name: the weight's name in the JAX or the MLX model.
        config: the model's config.
    """
    return name not in _not_decayed(config) and name.rpartition(".")[2] != "magnitude"


@functools.cache
def _not_decayed(config: "ModelConfig") -> frozenset[str]:
    """The names of the weights without decay, in the JAX model and in the MLX model."""
    spared = [parameter for parameter in parameters(config) if not parameter.is_decayed]
    return frozenset(name for parameter in spared for name in (parameter.name, *parameter.mlx_names(config)))
