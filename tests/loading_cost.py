"""What loading a checkpoint costs a process of its own: for test_jax_loading.py and test_mlx_loading.py."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from weights_io.config import ModelConfig
from weights_io.files.safetensors import Computed
from weights_io.parameters import count, parameters, tensor_shapes
from weights_io.write import save_checkpoint

DENSE = ModelConfig(  # 194 MB in float32, 28 MB a layer
    vocab_size=8000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
)
EXPERTS = dataclasses.replace(  # 251 MB, 57 MB a layer
    DENSE, num_hidden_layers=4, intermediate_size=640, num_experts=8, num_experts_per_tok=2
)
CONFIGS = {"dense": DENSE, "experts": EXPERTS}
MEASURED = Path("/proc/self/clear_refs").exists()  # Linux: its peak is this process's own, and can be set back
DTYPES = {"float32": 1.0, "bfloat16": 0.5}  # and what a model is of its size in float32
# Loads once more than it counts, as the first time compiles. The peak counts from what the process holds before.
SCRIPT = """
import gc, importlib, json, re, sys
from pathlib import Path
backend, tries, *runs = sys.argv[1:]
status = lambda key: 1024 * int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load = importlib.import_module(f"minicpm_{backend}").load
def cost(folder, dtype):
    gc.collect()
    if backend == "mlx":
        mlx.core.clear_cache()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loaded = load(folder, dtype=dtype)
    if backend == "mlx":
        mlx.core.eval(loaded[0].parameters())
    return status("VmHWM") - before, status("VmRSS") - before
if backend == "mlx":
    import mlx.core
for run in runs:
    folder, dtype = run.rsplit(":", 1)
    cost(folder, dtype)
    print(json.dumps(min(cost(folder, dtype) for _ in range(int(tries)))))
"""


def weights(name: str) -> int:
    """Bytes in float32."""
    return 4 * count(CONFIGS[name])


def layer(name: str) -> int:
    """Bytes in float32 of one layer."""
    return 4 * sum(math.prod(p.layer_shape(CONFIGS[name])) for p in parameters(CONFIGS[name]) if p.per_layer)


def big_checkpoint(folder: Path, name: str) -> Path:
    dtype = np.dtype(np.float32)

    def tensor(shape: tuple[int, ...]) -> Computed:
        return Computed(shape, dtype, lambda: np.full(shape, 0.01, dtype))

    config = CONFIGS[name]
    save_checkpoint(folder, config, {name: tensor(shape) for name, shape in tensor_shapes(config)})
    return folder


def peaks_and_held(backend: str, root: Path, tries: int = 1) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes above the process before loading, at the most and afterwards: the least of so many tries, of each config in
    each dtype, whose checkpoints come under ``root``."""
    folders = {name: big_checkpoint(root / name, name) for name in CONFIGS}
    runs = [(name, dtype) for name in CONFIGS for dtype in DTYPES]
    # Freed memory goes back at once, so that what is measured is what the loader holds, not what malloc keeps.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(tries), *(f"{folders[name]}:{dtype}" for name, dtype in runs)],
        capture_output=True, text=True, check=True, env=env, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return {run: tuple(json.loads(line)) for run, line in zip(runs, done.stdout.splitlines(), strict=True)}
