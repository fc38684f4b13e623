"""Long-context retrieval: the needle tasks of InfiniteBench at any length.

    python -m minicpm_serve.longcontext --backend mlx --model minicpm-2b-128k --task passkey --max-seq-length 16384

The score is reported by depth of the needle. ``--rope-scaling`` overrides the RoPE scaling of the model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.cli.evaluate import replies
from minicpm_data.generation.options import CacheOptions
from minicpm_data.model_options import load_model, note_context, open_early, open_source
from minicpm_data.option_checks import check_new_file, check_range
from minicpm_data.plots import heat_map
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
    lengths: tuple[int, ...] = ()
    """Several maximum numbers of tokens, in place of --max-seq-length, each with --num-samples texts: 1024 2048."""
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
    kv_bits: Literal[4, 8] | None = None
    """Bits of the quantized key/value cache (JAX: 8)."""
    kv_group_size: int | None = None
    """Group size of --kv-bits in MLX. By default 64, or 32 if the head dimension is not a multiple of 64."""
    prefill_step_size: int = 512
    """Chunk size of a text in tokens. A smaller chunk takes less memory."""
    save_path: Annotated[Path | None, Former("json")] = None
    """JSON file for the score, the samples and the replies. By default no file is written."""
    plot: Path | None = None
    """PNG file for a heat map of the score, by the depth of the needle and --lengths. By default none is drawn."""


def main(options: Options) -> None:
    """Hide a needle in long texts, ask for it, and count the right answers by depth."""
    from minicpm_data.tokenizer.from_checkpoint import tokenizer_of

    options.check_placement()
    check_range(options, "num_samples", "max_seq_length", "batch_size", least=1)
    if options.lengths and min(options.lengths) < 1:
        raise InputError(f"is {min(options.lengths)}; it must be at least 1.", option="lengths")
    if wrong := [depth for depth in options.depth if not 0 <= depth <= 1]:
        raise InputError(f"is {wrong[0]:g}; it must be a number from 0 to 1.", option="depth")
    cache = CacheOptions(
        kv_bits=options.kv_bits, prefill_step_size=options.prefill_step_size, kv_group_size=options.kv_group_size
    )
    if options.save_path is not None and not options.save_path.expanduser().absolute().parent.is_dir():
        raise InputError(f"is {options.save_path}, in a folder that does not exist; make it first.", option="save_path")
    if options.plot is not None:
        check_new_file(options.plot, "plot", ".png")
    here = open_early(options)
    backend = backends.get(options.backend)
    source = open_source(options, here)
    config, tokenizer = source.checkpoint.config, tokenizer_of(source.checkpoint)
    if tokenizer is None:
        path = source.checkpoint.path
        raise InputError(f"{path} holds no tokenizer files; put the model's tokenizer.json beside its weights.")
    encode = _in_template(tokenizer) if options.chat else tokenizer.encode
    lengths, how = options.lengths or (options.max_seq_length,), (options.num_samples, options.seed, options.depth)
    with waiting("writing the texts"):
        texts = {length: evaluation_samples(options.task, encode, length, *how) for length in lengths}
    most = answer_tokens(options.task, encode)
    longest = max(len(sample.ids) for samples in texts.values() for sample in samples)
    note_context(config, longest + most, "; --rope-scaling can extend it", options.rescaled)
    model, tokenizer = load_model(backend, options, decoding=True, source=source)
    backend.device.warn_idle_axes(model, options.batch_size)
    stop = tokenizer.turn_markers if options.chat else ()
    results: dict[int, Result] = {}
    for length, samples in texts.items():
        prompts = [sample.ids for sample in samples]
        said = list(replies(backend, model, tokenizer, prompts, options.batch_size, most, stop, cache))
        right = [is_right(sample, reply) for sample, reply in zip(samples, said, strict=True)]
        results[length] = Result(samples, said, right)
        print("\n".join(table(samples, right)))
        print(f"{options.task} at {length} tokens: {counted(right)}", flush=True)
        if options.plot is not None:  # after each length, as the long ones take longest
            draw(options, results)
    if options.save_path is not None:
        write_whole(options.save_path, json.dumps(_report(options, config, results), indent=1) + "\n")


@dataclass(frozen=True)
class Result:
    """The texts of one length, with a reply to each and whether it is right."""

    samples: Sequence[Sample]
    said: Sequence[str]
    right: Sequence[bool]


def draw(options: Options, results: Mapping[int, Result]) -> None:
    """Draw the heat map of --plot: a row for each tenth of the depth that has a needle, a column for each length."""
    columns = [by_depth(result.samples, result.right) for result in results.values()]
    rows = [group for group in range(GROUPS) if any(column[group] for column in columns)]
    shares = [[sum(c[group]) / len(c[group]) if c[group] else None for c in columns] for group in rows]
    names = [depth_of(group) for group in rows], [f"{length:,}" for length in results]
    title = f"{options.task}, {options.model or 'pico'}"
    assert options.plot is not None
    heat_map(options.plot, shares, *names, "depth of the needle", "tokens of the text", title)


def table(samples: Sequence[Sample], right: Sequence[bool]) -> list[str]:
    """The score as lines, one per tenth of the depth that has a needle."""
    lines = [f"{'depth':>10} {'right':>6} {'of':>4}"]
    for group, here in enumerate(by_depth(samples, right)):
        if here:
            lines.append(f"{depth_of(group):>10} {sum(here):>6} {len(here):>4}")
    return lines


def by_depth(samples: Sequence[Sample], right: Sequence[bool]) -> list[list[bool]]:
    """Whether the replies are right, for each tenth of the depth."""
    groups: list[list[bool]] = [[] for _ in range(GROUPS)]
    for sample, found in zip(samples, right, strict=True):
        groups[min(int(sample.depth * GROUPS), GROUPS - 1)].append(found)
    return groups


def depth_of(group: int) -> str:
    return f"{100 * group // GROUPS}-{100 * (group + 1) // GROUPS} %"


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


def _report(options: Options, config: ModelConfig, results: Mapping[int, Result]) -> dict[str, Any]:
    """The file of --save-path. With --lengths, the scores are a list, one for each length."""
    chosen = {name: getattr(options, name) for name in ("model", "revision", "backend", "task", "seed")}
    scaling = {"rope_scaling": config.to_dict()["rope_scaling"]}
    if options.lengths:
        scores = [{"length": length} | _score(result) for length, result in results.items()]
        return {**chosen, **scaling, "lengths": scores}
    return {**chosen, "length": options.max_seq_length, **scaling, **_score(results[options.max_seq_length])}


def _score(result: Result) -> dict[str, Any]:
    right = result.right
    asked = [
        {"depth": sample.depth, "tokens": len(sample.ids), "answer": sample.answer, "reply": reply, "right": found}
        for sample, reply, found in zip(result.samples, result.said, right, strict=True)
    ]
    score = {"right": sum(right), "of": len(right), "score": sum(right) / len(right)}
    return {**score, "interval": list(wilson(sum(right), len(right))), "samples": asked}


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.longcontext")
