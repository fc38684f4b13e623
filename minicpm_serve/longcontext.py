"""Long-context retrieval: the needle tasks of InfiniteBench at any length.

    python -m minicpm_serve.longcontext --backend mlx --model minicpm-2b-128k --task passkey --max-seq-length 16384

The score is reported by depth of the needle. ``--rope-scaling`` overrides the RoPE scaling of the model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicpm_data.cli.evaluate import replies
from minicpm_data.generation.options import CacheOptions
from minicpm_data.model_options import load_model, note_context, open_early, open_source
from minicpm_data.option_checks import check_range
from minicpm_serve import backends
from minicpm_serve.evaluation.needles import Encode, Sample, TaskName, answer_tokens, evaluation_samples, is_right
from weights_io.command_line import Former
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.files.partial import write_whole
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

GROUPS = 10  # rows of the table
CONFIDENCE = 1.96  # standard deviations: 95 %


@dataclass(frozen=True, kw_only=True)
class Options(backends.BackendOptions):
    task: TaskName = "passkey"
    """passkey: 5 digits; number_string: a sequence of 10 digits; kv_retrieval: a value of a JSON object."""
    max_seq_length: Annotated[int, Former("length")] = 4096
    """Maximum number of tokens of a prompt with its answer. The texts are made just short enough."""
    num_samples: Annotated[int, Former("samples")] = 20
    """Number of texts."""
    depth: tuple[float, ...] = ()
    """Positions of the needles, from 0 (beginning) to 1 (end), used in turn. By default they are evenly spread."""
    seed: int = 0
    """Seed of the needles."""
    batch_size: int = 1
    """Texts in a batch."""
    chat: bool = False
    """Use the model's chat template. By default the model continues the raw text."""
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """RoPE scaling that replaces the checkpoint's, such as {"type": "linear", "factor": 4}. null: no scaling."""
    kv_bits: Literal[4, 8] | None = None
    """Bits of the quantized key/value cache (JAX: 8)."""
    kv_group_size: int | None = None
    """Group size of --kv-bits in MLX. By default 64, or 32 if the head dimension is not a multiple of 64."""
    prefill_step_size: int = 512
    """Chunk size of a text in tokens. A smaller chunk takes less memory."""
    save_path: Annotated[Path | None, Former("json")] = None
    """JSON file for the score, the samples and the replies. By default no file is written."""


def main(options: Options) -> None:
    """Hide a needle in long texts, ask for it, and count the right answers by depth."""
    from minicpm_data.tokenizer.from_checkpoint import tokenizer_of

    options.check_placement()
    check_range(options, "num_samples", "max_seq_length", "batch_size", least=1)
    if wrong := [depth for depth in options.depth if not 0 <= depth <= 1]:
        raise InputError(f"is {wrong[0]:g}; it must be a number from 0 to 1.", option="depth")
    cache = CacheOptions(
        kv_bits=options.kv_bits, prefill_step_size=options.prefill_step_size, kv_group_size=options.kv_group_size
    )
    scaling = [] if options.rope_scaling is None else [_parsed(options.rope_scaling)]
    if options.save_path is not None and not options.save_path.expanduser().absolute().parent.is_dir():
        raise InputError(f"is {options.save_path}, in a folder that does not exist; make it first.", option="save_path")
    here = open_early(options)
    backend = backends.get(options.backend)
    source = open_source(options, here)
    config, tokenizer = source.checkpoint.config, tokenizer_of(source.checkpoint)
    if tokenizer is None:
        path = source.checkpoint.path
        raise InputError(f"{path} holds no tokenizer files; put the model's tokenizer.json beside its weights.")
    for raw in scaling:
        config = with_rope_scaling(config, raw)
    encode = _in_template(tokenizer) if options.chat else tokenizer.encode
    with waiting("writing the texts"):
        samples = evaluation_samples(
            options.task, encode, options.max_seq_length, options.num_samples, options.seed, options.depth
        )
    most = answer_tokens(options.task, encode)
    note_context(config, max(len(sample.ids) for sample in samples) + most, "; --rope-scaling stretches them")
    model, tokenizer = load_model(backend, options, decoding=True, source=source)
    backend.device.warn_idle_axes(model, options.batch_size)
    model.config = config
    stop = tokenizer.turn_markers if options.chat else ()
    prompts = [sample.ids for sample in samples]
    said = list(replies(backend, model, tokenizer, prompts, options.batch_size, most, stop, cache))
    right = [is_right(sample, reply) for sample, reply in zip(samples, said, strict=True)]
    print("\n".join(table(samples, right)))
    print(f"{options.task} at {options.max_seq_length} tokens: {counted(right)}")
    if options.save_path is not None:
        write_whole(options.save_path, json.dumps(_report(options, config, samples, said, right), indent=1) + "\n")


def with_rope_scaling(config: ModelConfig, raw: Any) -> ModelConfig:
    """The config with another ``rope_scaling``, written as in config.json. Raises `InputError` for an invalid one."""
    return ModelConfig.from_dict({**config.to_dict(), "rope_scaling": raw}, "--rope-scaling")


def table(samples: Sequence[Sample], right: Sequence[bool]) -> list[str]:
    """The score as lines, one per tenth of the depth that has a needle."""
    lines = [f"{'depth':>10} {'right':>6} {'of':>4}"]
    for group in range(GROUPS):
        here = [r for s, r in zip(samples, right, strict=True) if min(int(s.depth * GROUPS), GROUPS - 1) == group]
        if here:
            depth = f"{100 * group // GROUPS}-{100 * (group + 1) // GROUPS} %"
            lines.append(f"{depth:>10} {sum(here):>6} {len(here):>4}")
    return lines


def counted(right: Sequence[bool]) -> str:
    """``17 of 20 right, 85.0 % (64.0 to 94.8 with 95 % confidence)``."""
    low, high = wilson(sum(right), len(right))
    share = sum(right) / len(right)
    text = f"{sum(right)} of {len(right)} right, {100 * share:.1f} %"
    return f"{text} ({100 * low:.1f} to {100 * high:.1f} with 95 % confidence)"


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's confidence interval (E. B. Wilson, 1927) of a proportion: ``right`` successes in ``count`` trials."""
    share, z = right / count, CONFIDENCE
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def _in_template(tokenizer: "Tokenizer") -> Encode:
    return lambda text: tokenizer.apply_chat([{"role": "user", "content": text}])


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error}); give an object or null.", option="rope_scaling") from None


def _report(
    options: Options, config: ModelConfig, samples: Sequence[Sample], said: Sequence[str], right: Sequence[bool]
) -> dict[str, Any]:
    asked = [
        {"depth": sample.depth, "tokens": len(sample.ids), "answer": sample.answer, "reply": reply, "right": found}
        for sample, reply, found in zip(samples, said, right, strict=True)
    ]
    chosen = {name: getattr(options, name) for name in ("model", "revision", "backend", "task", "seed")}
    chosen["length"] = options.max_seq_length
    low, high = wilson(sum(right), len(right))
    score = {"right": sum(right), "of": len(right), "score": sum(right) / len(right), "interval": [low, high]}
    return {**chosen, "rope_scaling": config.to_dict()["rope_scaling"], **score, "samples": asked}


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.longcontext")
