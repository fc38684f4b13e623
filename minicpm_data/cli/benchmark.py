"""The command benchmark of both backends: the speed and memory of generation on this machine."""

import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import tyro

from minicpm_data.generation.api import Backend
from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.model_options import ModelOptions, Source, load_model, note_context, open_source
from minicpm_data.option_checks import check_range
from weights_io import command_line

LIBRARIES = {"jax": ("jax",), "mlx": ("mlx", "mlx-lm")}  # whose versions a row names


@dataclass(frozen=True)
class BenchmarkOptions(ModelOptions):
    prompt_tokens: Annotated[int, tyro.conf.arg(aliases=("-p",))] = 512
    """Tokens of a prompt. They are random."""
    generation_tokens: Annotated[int, tyro.conf.arg(aliases=("-g",))] = 1024
    """Tokens of an answer."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("-b",))] = 1
    """Prompts in a batch."""
    num_trials: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 5
    """Number of measurements."""
    prefill_step_size: int = 512
    """Chunk size of the prompt in tokens."""
    delay: float = 0
    """Seconds to wait before each measurement."""
    seed: int = 0
    """Seed of the prompts."""


@dataclass(frozen=True)
class Trial:
    """One measurement. Speeds are in tokens per second of the whole batch."""

    prompt_tps: float
    generation_tps: float
    peak_memory: float  # GB
    total_time: float  # seconds

    @classmethod
    def average(cls, trials: "list[Trial]") -> "Trial":
        names = ("prompt_tps", "generation_tps", "peak_memory", "total_time")
        return cls(*(sum(getattr(trial, name) for trial in trials) / len(trials) for name in names))

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:.3f}" for name, value in vars(self).items())


def run_benchmark(
    backend: Callable[[], Backend[ModelT]],
    prog: str,
    name: str,
    options: type[BenchmarkOptions] = BenchmarkOptions,
) -> None:
    """``python -m PACKAGE.benchmark``. ``backend`` is imported only when the flags are valid; ``name`` is its name."""

    def main(options: BenchmarkOptions) -> None:
        """Measure how fast a model reads a prompt and generates, and print a row for docs/measured.md."""
        import numpy as np

        options.check_placement()
        check_range(options, "prompt_tokens", "generation_tokens", "batch_size", "num_trials", least=1)
        check_range(options, "delay", least=0, below=86400)
        cache = CacheOptions(prefill_step_size=options.prefill_step_size)
        running = backend()
        source = open_source(options)
        model, _ = load_model(running, options, decoding=True, source=source)
        running.device.warn_idle_axes(model, options.batch_size)
        size = (options.batch_size, options.prompt_tokens)
        prompts = np.random.default_rng(options.seed).integers(0, model.config.vocab_size, size)
        note_context(model.config, options.prompt_tokens + options.generation_tokens, rescaled=options.rescaled)
        request = GenerationRequest.of(model, None, prompts.tolist(), options.generation_tokens, cache=cache)
        request = replace(request, end_ids=frozenset())  # a random prompt may end at once
        say = print if running.device.is_first() else lambda *_, **__: None
        say("Running warmup..", flush=True)
        trial(running, model, request)
        named = "prompt_tokens", "generation_tokens", "batch_size"
        say("Timing with " + ", ".join(f"{name}={getattr(options, name)}" for name in named) + ".", flush=True)
        trials = []
        for number in range(1, options.num_trials + 1):
            time.sleep(options.delay)
            trials.append(trial(running, model, request))
            say(f"Trial {number}:  {trials[-1]}", flush=True)
        average = Trial.average(trials)
        say(f"Averages: {average}")
        say(f"\nA row for docs/measured.md:\n\n{row(name, options, source, running, average)}")

    command_line.run(main, options, prog)


def trial(backend: Backend[ModelT], model: ModelT, request: GenerationRequest) -> Trial:
    """Generate once, greedily."""
    decoding, batch = backend.generator.decoding, len(request.prompts)
    decoding.check(model, request)
    clock = [time.perf_counter()]
    for _ in decoding.stream_tokens(model, request):
        clock.append(time.perf_counter())
    read, total = clock[1] - clock[0], clock[-1] - clock[0]
    made = batch * (len(clock) - 2)  # the first token comes with the prompt
    return Trial(
        batch * request.longest / max(read, 1e-9),
        made / max(total - read, 1e-9) if made else 0.0,
        backend.device.peak_memory() / 1e9,
        total,
    )


def row(name: str, options: BenchmarkOptions, source: Source, backend: Backend[ModelT], found: Trial) -> str:
    """The measurement as a row of the table in docs/measured.md."""
    preferred = backend.device.preferred_dtype
    dtype = options.dtype or preferred(source.checkpoint, decoding=True, **source.placement)
    bits = f", {options.quantize} bits" if options.quantize else ""
    batch = f"{options.batch_size} x " if options.batch_size > 1 else ""
    cells = (
        datetime.date.today().isoformat(),
        machine(),
        chip(backend.device.description()),
        system(),
        versions(name),
        options.model or "pico",
        f"{dtype}{bits}",
        f"{batch}{options.prompt_tokens} + {options.generation_tokens}",
        f"{found.prompt_tps:.1f}",
        f"{found.generation_tps:.1f}",
        f"{found.peak_memory:.2f} GB",
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def machine() -> str:
    """``Mac14,6, 64 GB``; ``x86_64, 2 cores, 24 GB``."""
    named = asked("sysctl", "-n", "hw.model") if sys.platform == "darwin" else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    size = f", {memory / 2**30:.0f} GB" if memory else ""
    return (named or f"{platform.machine()}, {os.cpu_count()} cores") + size


def chip(device: str) -> str:
    """The accelerator, or the name of the CPU."""
    if device.partition(" ")[0] != "cpu":
        return device
    if sys.platform == "darwin":
        return asked("sysctl", "-n", "machdep.cpu.brand_string") or device
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU ({names[0]})" if names else device


def system() -> str:
    """``macOS 15.5``; ``Linux 6.8``."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def versions(name: str) -> str:
    """``minicpm-jax-mlx 0.1.0, mlx 0.32.4, Python 3.11.9``."""
    found = []
    for distribution in ("minicpm-jax-mlx", *LIBRARIES[name]):
        try:
            found.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:  # a source tree that is not installed
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])


def asked(*command: str) -> str:
    """The output of a short command of the system; empty where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
