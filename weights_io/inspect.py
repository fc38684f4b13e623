"""Describe a model from its config and the headers of its files, without reading the weights.

Only tensors that are stored twice (the head of a tied model, a tensor in two shards) are read, to compare the copies,
and some rows of the first layer, which tell whether the weights are ternary.

python -m weights_io.inspect --model openbmb/MiniCPM-2B-sft-bf16
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weights_io.checkpoint import BUFFERS, check_tensors, special_ids
from weights_io.config import COMMON_DEFAULTS, DTYPES, ModelConfig, stored_dtype
from weights_io.config_keys import sparse_note
from weights_io.errors import InputError
from weights_io.files.json_text import read_json
from weights_io.files.tensor import LazyTensor
from weights_io.memory import cache_bytes, packed_bytes, size, weight_bytes
from weights_io.parameters import EMBEDDING, HEAD, count, count_active
from weights_io.quantization.packed import PackedTensor, arithmetic_dtype
from weights_io.quantization.reading import as_matrices
from weights_io.quantization.ternary import sampled_group
from weights_io.vision.names import in_table_names

UNKNOWN = "unknown"
DEFAULT_TEMPLATE = "MiniCPM's default, <用户>{}<AI>"


@dataclass(frozen=True)
class Options:
    model: str
    """Model folder, GGUF file, hub id (owner/name, owner/name/folder) or short name. No weights are downloaded."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where --model is looked up if it is not on this disk."""
    json: bool = False
    """Print the report as JSON, for other programs."""


@dataclass
class Report:
    """The description of a model. The fields are those of ``--json``."""

    source: str  # folder, file or catalogue entry
    architecture: str
    parameters: int
    parameters_without_embedding: int  # also without an untied head
    parameters_active: int  # parameters that one token is computed with; fewer than all in a mixture of experts
    dtype: str  # the dtype that a loader uses by default
    stored: dict[str, int]  # dtype or quantized type in the files -> number of tensors
    bytes: int  # size of the weight files
    files: dict[str, dict[str, int]]  # name -> bytes, tensors
    memory: dict[str, int | None]  # bytes of all weights as stored, in bfloat16, and with --quantize; None: unknown
    cache: dict[str, int]  # dtype -> bytes of the keys and values of 1,000 tokens
    context_length: int
    config: dict[str, Any]
    derived: dict[str, float]  # factors computed from the scales of the config
    tokenizer: str | None = None
    tokenizer_ids: int | None = None
    chat_template: str = DEFAULT_TEMPLATE
    sampling: str | None = None  # defaults of a chat, and where they are stated; None: without a tokenizer, unknown
    unusual: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)  # reasons why it cannot be loaded


def main(options: Options) -> None:
    """Describe a model from its config and the headers of its files, without reading the weights."""
    from weights_io.command_line import command_above

    command_above("inspect")(options)


def without_tokenizer(path: Path, downloaded: bool = False) -> tuple[Report, Mapping[str, Any] | None]:
    """The report on a model, without its tokenizer.

    Arguments:
        path: a model folder or a GGUF file.
        downloaded: the folder is a hub's cache, where the weights may be missing.

    Returns:
        The report, and the metadata of a GGUF file (None for a folder).

    Raises:
        InputError: config.json or the GGUF header cannot be used. Other faults are listed in the report.
    """
    if path.suffix == ".gguf":
        from weights_io.files import gguf

        file = gguf.open_file(path)
        raw = file.config
        report = describe(str(path), raw, file.tensors)
        metadata: Mapping[str, Any] | None = file.metadata
    else:
        from weights_io.files.folder import open_folder

        metadata = None
        raw = read_json(path / "config.json")
        config = ModelConfig.from_dict(raw, str(path / "config.json"))
        tensors: Mapping[str, LazyTensor] = {}
        missing = contradiction = None
        try:
            tensors = in_table_names(open_folder(path), config)
        except InputError as error:
            missing = str(error)
        if tensors:
            try:
                config, tensors = as_matrices(config, raw, tensors, path)
            except InputError as error:
                contradiction = str(error)
        report = describe(str(path), raw, tensors, config)
        if contradiction:
            report.problems = [contradiction]  # without the faults that follow from it
        if missing and downloaded:
            report.unusual.append("the weights are not (or not wholly) downloaded; sizes and stored dtypes are unknown")
        elif missing:
            report.problems.append(missing)
    _collect(report, special_ids, path, raw, report.config["vocab_size"])
    return report, metadata


def _collect(report: Report, check: Callable[..., object], *arguments: Any) -> None:
    """Call ``check`` and add its `InputError`, if any, to the report's problems."""
    try:
        check(*arguments)
    except InputError as error:
        report.problems.append(str(error))


def describe(
    source: str, raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor], config: ModelConfig | None = None
) -> Report:
    """The report on a config and its tensors.

    Arguments:
        source: what the model is called in the report.
        raw: the contents of config.json.
        tensors: Hugging Face name -> tensor; empty if the weights are not available.
        config: the config, if it does not follow from ``raw`` alone.
    """
    config = config or ModelConfig.from_dict(dict(raw), source)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    stored = Counter(stored_as(tensor) for tensor in tensors.values())
    files: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        file = files.setdefault(tensor.source.name, {"bytes": tensor.source.stat().st_size, "tensors": 0})
        file["tensors"] += 1
    embedding = tensors.get(EMBEDDING.hf_name)
    dtype = stored_dtype(dict(raw)) or (UNKNOWN if embedding is None else arithmetic_dtype(embedding))
    held = sum(file["bytes"] for file in files.values())
    as_stored = held or (weight_bytes(config, dtype) if dtype != UNKNOWN else None)
    report = Report(
        source=source,
        architecture=config.to_dict()["architectures"][0],
        parameters=count(config),
        parameters_without_embedding=count(config) - embeddings,
        parameters_active=count_active(config),
        dtype=dtype,
        stored=dict(stored),
        bytes=held,
        files=dict(sorted(files.items())),
        memory={
            "stored": as_stored,
            "bfloat16": weight_bytes(config, "bfloat16"),
            **{f"int{bits}": packed_bytes(config, "bfloat16", bits, head=True) for bits in (8, 4)},
        },
        cache={kind: cache_bytes(config, 1000, kind) for kind in ("bfloat16", "int8")},
        context_length=config.max_position_embeddings,
        config=dataclasses.asdict(config),
        derived={
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "logit_divisor": config.logit_divisor,
        },
        unusual=_absent_keys(raw, config) + _unusual_tensors(raw, config, tensors),
    )
    if tensors:
        _collect(report, check_tensors, config, tensors, Path(source))
    return report


def lines(report: Report) -> list[str]:
    """The report as lines of text."""
    config = report.config
    heads = f"{config['num_attention_heads']} heads"
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        heads += f" ({config['num_key_value_heads']} for keys and values)"
    widths = f"{config['head_dim']}"
    if config["kv_lora_rank"]:
        key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        latent = f"latents of {config['kv_lora_rank']} and a rotary key of {config['qk_rope_head_dim']}"
        widths = f"{widths} (keys of {key}), cached as {latent} a token"
    rope = f"RoPE base {config['rope_theta']:g}"
    if scaling := config["rope_scaling"]:
        longrope = scaling["type"] == "longrope"
        rope += f", {scaling['type']} " + (
            f"of {scaling['original_max_position_embeddings']:,}" if longrope else f"scaling by {scaling['factor']:g}"
        )
    stored = ", ".join(f"{kind} ({n})" for kind, n in report.stored.items())
    derived = report.derived
    tokenizer = report.tokenizer or ("none" if report.files else "unknown")
    if report.tokenizer_ids is not None:
        tokenizer += f", {report.tokenizer_ids:,} ids"
    kind, parameters = (
        "dense",
        f"{report.parameters:,} ({report.parameters_without_embedding:,} without embedding and head)",
    )
    if config["num_experts"]:
        kind = f"{config['num_experts_per_tok']} of {config['num_experts']} experts a token"
        parameters += f", {report.parameters_active:,} active a token"
    activation = config["hidden_act"]
    if config["hidden_act_param"] is not None:
        activation += f" from {config['hidden_act_param']:g} up"
    computed = {kind: held for kind, held in report.memory.items() if kind != "stored"}
    whole = {kind: count * report.context_length // 1000 for kind, count in report.cache.items()}
    table = {
        "model": report.source,
        "architecture": f"{report.architecture} ({kind}), {'tied' if config['tie_word_embeddings'] else 'untied'} head",
        "parameters": parameters,
        "dtype": f"{report.dtype}; tensors stored as {stored}" if stored else report.dtype,
        "size": f"{report.bytes:,} bytes" if report.files else "unknown",
        "weights": f"{size(report.memory['stored'])} as stored; {_sizes(computed)}",
        "cache": f"{_sizes(report.cache)} for 1,000 tokens; {_sizes(whole)} for {report.context_length:,}",
        "context": f"{report.context_length:,} tokens, {rope}",
        "shape": f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, MLP "
        f"{config['intermediate_size']} ({activation}), {heads} of {widths}, vocabulary "
        f"{config['vocab_size']:,}",
        "scales": f"embedding x {derived['embedding_scale']:g}, residual x {derived['residual_scale']:.7g}, "
        f"logits / {derived['logit_divisor']:.7g}",
        "norm": f"RMS, epsilon {config['rms_norm_eps']:g}",
        "tokenizer": tokenizer,
        "chat template": report.chat_template if report.tokenizer else tokenizer,
        **({"sampling": report.sampling} if report.sampling else {}),
    }
    text = [f"{name:14} {value}" for name, value in table.items()]
    text += [
        f"{'file':14} {name}: {file['bytes']:,} bytes, {file['tensors']} tensors" for name, file in report.files.items()
    ]
    return text + [f"{'unusual':14} {note}" for note in report.unusual]


def _sizes(sizes: Mapping[str, int | None]) -> str:
    return ", ".join(f"{size(held)} in {kind}" for kind, held in sizes.items())


def _absent_keys(raw: Mapping[str, Any], config: ModelConfig) -> list[str]:
    given = set(raw) | set(raw.get("rope_parameters") or {})
    used = dataclasses.asdict(config)
    defaults = COMMON_DEFAULTS | config.family.defaults | {"model_type": config.model_type}
    del defaults["initializer_range"]  # describes only the initial weights of training
    absent = [key for key, default in defaults.items() if default is not None and key not in given]
    notes = {key: f"the default {json.dumps(used[key])} is taken" for key in sorted(absent)}
    if "tie_word_embeddings" in notes and config.tie_word_embeddings != defaults["tie_word_embeddings"]:
        notes["tie_word_embeddings"] = "the stored head is taken, which differs from the embedding"
    return [f"config.json has no {key}; {note}" for key, note in notes.items()]


def _unusual_tensors(raw: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> list[str]:
    notes = []
    if config.tie_word_embeddings and HEAD.hf_name in tensors:
        notes.append("the tied head is stored a second time; a loader compares it with the embedding")
    buffers = [name for name in tensors if name.endswith(BUFFERS)]
    if buffers:
        notes.append(f"rotary buffers are stored ({len(buffers)} tensors); they are passed over and computed anew")
    whole = {name: x for name, x in tensors.items() if name not in buffers and not isinstance(x, PackedTensor)}
    dtypes = sorted({tensor.dtype.name for tensor in whole.values()})
    said = stored_dtype(dict(raw))
    if len(dtypes) > 1:
        notes.append(f"the tensors are of several dtypes: {', '.join(dtypes)}")
    if said and dtypes and dtypes != [said]:
        notes.append(f"config.json says {said} and the tensors are {' and '.join(dtypes)}")
    if (group := sampled_group(config, {n: x for n, x in whole.items() if stored_as(x) in DTYPES})) is not None:
        notes.append(
            f"the weights are ternary (three values in each group of {group}): convert --to mlx -q --ternary packs "
            "them in 2 bits without an error"
        )
    if (sparse := sparse_note(raw)) is not None:
        notes.append(sparse)
    if "auto_map" in raw:
        notes.append("config.json points to Python code of its own (auto_map), which is never run here")
    if any(tensor.source.suffix == ".bin" for tensor in tensors.values()):
        notes.append("the weights are torch pickles; they are read without running them")
    return notes


def stored_as(tensor: LazyTensor) -> str:
    """How a tensor is stored: its dtype, or its quantization (``GPTQ 4-bit in groups of 32``, ``Q4_K`` for GGUF)."""
    from weights_io.files.gguf import BlockTensor, UnpermutedTensor

    if isinstance(tensor, UnpermutedTensor):
        tensor = tensor.stored
    return tensor.kind if isinstance(tensor, BlockTensor | PackedTensor) else tensor.dtype.name


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m weights_io.inspect")
