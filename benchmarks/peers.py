"""The programs that `throughput` compares. Each has a process of its own, which runs once per line of its input.

A process prints JSON lines: first the time and memory of loading, then the speed of each run.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
Run = Callable[[list[int], int], tuple[float, float]]  # prompt, tokens -> seconds to the first token, and after it


def main(name: str, folder: Path, precision: str, prompt: list[int], tokens: int) -> None:
    load = LOADERS[name]
    for module in IMPORTS[name]:
        __import__(module)
    before, began = memory("VmRSS"), time.perf_counter()
    run = load(folder, precision)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before}), flush=True)
    for _ in sys.stdin:
        first, rest = run(prompt, tokens)
        print(json.dumps({"prompt": len(prompt) / first, "decode": (tokens - 1) / rest}), flush=True)
    os._exit(0)  # the destructor of a server without requests never returns


def memory(kind: str) -> int:
    """Resident bytes of this process: now (VmRSS) or at the peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def of_stream(stream: Callable[[list[int], int], Any]) -> Run:
    """A `Run` that times the tokens of a stream."""

    def run(prompt: list[int], tokens: int) -> tuple[float, float]:
        began, marks = time.perf_counter(), []
        for _ in stream(prompt, tokens):
            marks.append(time.perf_counter())
        assert len(marks) == tokens
        return marks[0] - began, marks[-1] - marks[0]

    return run


def minicpm_jax(folder: Path, precision: str) -> Run:
    return ours("jax", folder, precision)


def minicpm_mlx(folder: Path, precision: str) -> Run:
    return ours("mlx", folder, precision)


def ours(backend: Any, folder: Path, precision: str) -> Run:
    """Our package, in float32 if ``precision`` is float32, else in the dtype that the commands choose for the file."""
    from minicpm_serve import backends

    running = backends.get(backend)
    preferred = functools.partial(running.device.preferred_dtype, decoding=True)
    dtype = precision if precision == "float32" else preferred
    model, _ = running.load(str(folder / "model"), dtype, decoding=True)
    if backend == "jax":
        import jax

        jax.block_until_ready(jax.tree.leaves(model))
    else:
        import mlx.core as mx

        mx.eval(model.parameters())
    return of_stream(lambda prompt, tokens: running.generator.stream_generate(model, None, prompt, tokens))


def mlx_lm(folder: Path, precision: str) -> Run:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder / "model")
    return of_stream(lambda prompt, tokens: generate_step(mx.array(prompt), model, max_tokens=tokens))


def transformers(folder: Path, precision: str) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, precision)).eval()
    for weight in model.parameters():  # mapped weights are read on first use: use them now
        weight.sum()

    @torch.inference_mode()
    def stream(prompt: list[int], tokens: int):
        ids, cache = torch.tensor([prompt]), None
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(ids)

    return of_stream(stream)


def llama_cpp(folder: Path, precision: str) -> Run:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    server = xllamacpp.Server(params)

    def run(prompt: list[int], tokens: int) -> tuple[float, float]:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings = server.handle_completions(asked)["timings"]
        assert timings["prompt_n"] == len(prompt) and timings["predicted_n"] == tokens
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 * (tokens - 1) / tokens

    return run


def reading(folder: Path, precision: str) -> Run:
    """No program: read the bytes of the weight files into memory."""
    held = [np.fromfile(file, np.uint8) for file in sorted((folder / "model").glob("*.safetensors"))]
    return lambda prompt, tokens: (float(len(held)), 1.0)


LOADERS: dict[str, Callable[[Path, str], Run]] = {
    "minicpm_jax": minicpm_jax,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "minicpm_mlx": minicpm_mlx,
    "mlx_lm": mlx_lm,
    "reading the file": reading,
}
IMPORTS = {
    "minicpm_jax": [
        "minicpm_jax.generate",
        "minicpm_jax.generation.decoding",
        "minicpm_jax.loading",
        "minicpm_jax.generation.sparsity",
    ],
    "transformers": ["torch", "transformers.models.llama.modeling_llama"],
    "llama.cpp": ["xllamacpp"],
    "minicpm_mlx": [
        "minicpm_mlx.generate",
        "minicpm_mlx.generation.decoding",
        "minicpm_mlx.loading",
        "minicpm_mlx.generation.sparsity",
    ],
    "mlx_lm": ["mlx_lm", "mlx_lm.generate", "mlx_lm.models.llama"],
    "reading the file": [],
}
