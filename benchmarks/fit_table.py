"""Write docs/fit.md: what our programs need on TPUs. Needs no TPU, and takes a quarter of an hour on two cores.

python -m benchmarks.fit_table --save-path docs/fit.md
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import flag
from weights_io.memory import size

TEXT = """# What it takes on a TPU

Each row is a program of this package, compiled for absent chips by `python -m minicpm_jax.fit`. The columns are:

- **memory a chip**: the memory that XLA planned (arguments + temporaries), of the memory of a chip;
- **HBM traffic**: the bytes that one call reads and writes. A call is a decoding step with a full cache, a prefill
  chunk of 512 tokens that attends to a full cache, or a training step. If it is unknown, JAX cannot read the program
  back from libtpu;
- **compiling**: the CPU time of tracing and compiling where it says so, otherwise the time that two busy cores took;
- **between chips**: the bytes of each kind of collective;
- **tokens/s**: an upper bound from the HBM traffic and the arithmetic, or from the arithmetic alone if the traffic is
  unknown.

The dtype is bfloat16. Training uses `--grad-checkpoint`. In generation, `--quantize 4` and 8 store the head in 8 bits.
With `--quantize gptq-int4` and the other formats, the layers are those of a released file, and the head has 16 bits
unless `--head-bits 8` is given.
Nothing here has been run on a TPU, and real programs are slower. `python -m benchmarks.fit_table` writes this file.
MiniCPM4.1-8B has the shapes of MiniCPM4-8B, so the rows `lora` of the one hold for the other.

| program | chips | rows x tokens | mesh | memory a chip | fits | compiling | HBM traffic | between chips | tokens/s |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Options:
    save_path: Annotated[Path, Former("out")] = Path("docs/fit.md")
    """File to write."""
    only: str = ""
    """Compile only programs with this text in the first cells of their line. The other lines of the file stay."""


Row = tuple[str, str, str, int, int, dict[str, int | str]]  # model, topology, job, batch, seq, other flags
ROWS: tuple[Row, ...] = (
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {}),
    ("minicpm-2b", "v5e:1x1", "generate", 4, 4096, {}),
    ("minicpm-2b", "v5e:1x1", "generate", 8, 4096, {"kv_bits": 8}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": 8}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": 4}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": "gptq-int4"}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": "gptq-int4", "head_bits": 8}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": "gptq-int8"}),
    ("minicpm-2b", "v5e:1x1", "generate", 1, 4096, {"quantize": "gptq-int8", "head_bits": 8}),
    ("minicpm-2b", "v5e:1x1", "prefill", 1, 4096, {}),
    ("minicpm-2b", "v5e:1x1", "prefill", 1, 4096, {"quantize": 4}),
    ("minicpm-2b", "v5e:1x1", "prefill", 1, 4096, {"quantize": "gptq-int4"}),
    ("minicpm-1b", "v5e:1x1", "generate", 1, 4096, {}),
    ("minicpm-1b", "v5e:1x1", "generate", 16, 4096, {}),
    ("minicpm3-4b", "v5e:1x1", "generate", 1, 4096, {}),
    ("minicpm3-4b", "v5e:1x1", "generate", 16, 4096, {}),
    ("minicpm3-4b", "v5e:1x1", "generate", 7, 32768, {}),
    ("minicpm3-4b", "v5e:1x1", "generate", 1, 32768, {"kv_bits": 8}),
    ("minicpm3-4b", "v5e:1x1", "generate", 1, 4096, {"quantize": 4}),
    ("minicpm-moe-8x2b", "v5e:2x4", "generate", 1, 4096, {}),
    ("minicpm-2b", "v5e:2x4", "generate", 1, 4096, {}),
    ("minicpm-2b", "v5e:2x4", "generate", 1, 4096, {"quantize": "gptq-int4"}),
    ("minicpm-2b", "v5e:2x4", "prefill", 1, 4096, {"quantize": "gptq-int4"}),
    ("minicpm-2b-128k", "v5e:2x2", "generate", 1, 131072, {}),
    ("minicpm-2b-128k", "v5e:2x4", "generate", 1, 131072, {}),
    ("minicpm-2b-128k", "v5e:2x4", "generate", 1, 131072, {"kv_bits": 8}),
    ("minicpm-2b-128k", "v5e:2x4", "prefill", 1, 131072, {}),
    ("minicpm-2b-128k", "v6e:2x4", "generate", 1, 131072, {}),
    ("minicpm-2b-128k", "v6e:2x4", "prefill", 1, 131072, {}),
    ("minicpm-2b", "v5e:1x1", "lora", 1, 2048, {}),
    ("minicpm-2b", "v5e:1x1", "lora", 8, 2048, {}),
    ("minicpm-2b", "v6e:1x1", "lora", 8, 2048, {}),
    ("minicpm-2b", "v5e:1x1", "lora", 8, 4096, {"quantize": 4}),
    ("minicpm-1b", "v5e:1x1", "lora", 8, 2048, {}),
    ("minicpm-moe-8x2b", "v5e:2x4", "lora", 8, 2048, {}),
    ("minicpm-2b", "v5e:2x4", "finetune", 8, 4096, {}),
    ("minicpm-2b", "v5e:2x4", "finetune", 8, 4096, {"mesh": "fsdp=4,tensor=2"}),
    ("minicpm4-8b", "v5e:1x1", "generate", 1, 4096, {}),
    ("minicpm4-8b", "v5e:1x1", "generate", 1, 32768, {"quantize": 8}),
    ("minicpm4-8b", "v5e:1x1", "generate", 1, 32768, {"quantize": 4}),
    ("minicpm4-8b", "v5e:1x1", "prefill", 1, 32768, {"quantize": 4}),
    ("minicpm4-8b", "v5e:2x4", "prefill", 1, 32768, {"quantize": 4, "mesh": "tensor=8"}),
    ("minicpm4.1-8b", "v5e:1x1", "generate", 1, 65536, {"quantize": 4}),
    ("minicpm4.1-8b", "v5e:1x1", "generate", 1, 65536, {"quantize": "awq-int4"}),
    ("minicpm4.1-8b", "v5e:1x1", "prefill", 1, 65536, {"quantize": "awq-int4"}),
    ("minicpm4.1-8b", "v5e:1x1", "prefill", 1, 65536, {"quantize": 4}),
    ("minicpm5-1b", "v5e:1x1", "generate", 1, 131072, {}),
    ("minicpm5-1b", "v5e:1x1", "prefill", 1, 131072, {}),
    ("minicpm4-8b", "v5e:2x4", "generate", 1, 32768, {}),
    ("minicpm4-8b", "v5e:2x4", "generate", 1, 32768, {"mesh": "tensor=8"}),
    ("minicpm4-8b", "v5e:2x4", "prefill", 1, 32768, {}),
    ("minicpm4.1-8b", "v5e:2x4", "generate", 1, 65536, {}),
    ("minicpm4.1-8b", "v5e:2x4", "prefill", 1, 65536, {}),
    ("minicpm5-1b", "v5e:2x4", "generate", 1, 131072, {}),
    ("minicpm5-1b", "v5e:2x4", "prefill", 1, 131072, {}),
    ("minicpm4-8b", "v6e:1x1", "generate", 1, 32768, {}),
    ("minicpm4-8b", "v6e:1x1", "prefill", 1, 32768, {}),
    ("minicpm4.1-8b", "v6e:1x1", "generate", 1, 65536, {}),
    ("minicpm4.1-8b", "v6e:1x1", "prefill", 1, 65536, {}),
    ("minicpm5-1b", "v6e:1x1", "generate", 1, 131072, {}),
    ("minicpm5-1b", "v6e:1x1", "prefill", 1, 131072, {}),
    ("minicpm5-1b", "v5e:1x1", "lora", 8, 2048, {}),
    ("minicpm3-4b", "v5e:1x1", "prefill", 1, 32768, {}),
    ("minicpm3-4b", "v5e:2x4", "generate", 1, 32768, {}),
    ("minicpm3-4b", "v5e:2x4", "generate", 64, 4096, {}),
    ("minicpm3-4b", "v5e:2x4", "prefill", 1, 32768, {}),
    ("minicpm3-4b", "v6e:1x1", "generate", 1, 32768, {}),
    ("minicpm3-4b", "v6e:1x1", "prefill", 1, 32768, {}),
    ("minicpm3-4b", "v5e:1x1", "lora", 8, 2048, {}),
    ("minicpm3-4b", "v5e:2x4", "lora", 8, 2048, {}),
    ("minicpm3-4b", "v5e:1x1", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm3-4b", "v5e:2x4", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm3-4b", "v6e:1x1", "lora", 8, 2048, {}),
    ("minicpm3-4b", "v6e:1x1", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm4-8b", "v5e:1x1", "lora", 1, 2048, {}),
    ("minicpm4-8b", "v5e:1x1", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm4-8b", "v5e:2x4", "lora", 8, 2048, {}),
    ("minicpm4-8b", "v5e:2x4", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm4-8b", "v6e:1x1", "lora", 8, 2048, {}),
    ("minicpm4-8b", "v6e:1x1", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm5-1b", "v5e:1x1", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm5-1b", "v5e:2x4", "lora", 8, 2048, {}),
    ("minicpm5-1b", "v5e:2x4", "lora", 8, 2048, {"quantize": 4}),
    ("minicpm5-1b", "v6e:1x1", "lora", 8, 2048, {}),
    ("minicpm5-1b", "v6e:1x1", "lora", 8, 2048, {"quantize": 4}),
)


def main(options: Options) -> None:
    """Compile the programs of the table and write it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    before = options.save_path.read_text().splitlines() if options.save_path.exists() else []
    table = [next((line for line in before if line.startswith(beginning(row))), "") for row in ROWS]
    options.save_path.parent.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(ROWS):
        if options.only in beginning(row):
            table[number] = next(lines([row]))
            print(table[number], flush=True)
            options.save_path.write_text(TEXT + "".join(line + "\n" for line in table if line))


def beginning(row: Row) -> str:
    model, topology, kind, batch, seq, flags = row
    what = " ".join([model, kind, *(f"{flag(name)} {value}" for name, value in flags.items())])
    return f"| {what} | {topology} | {batch} x {seq:,} | "


def lines(rows: Sequence[Row]) -> Iterator[str]:
    from minicpm_jax import fit
    from minicpm_jax.aot.report import report

    for row in rows:
        model, topology, kind, batch, seq, flags = row
        training = kind == "lora" or kind == "finetune"
        given = fit.Options(model, topology, kind, batch, seq, grad_checkpoint=training, **flags)  # type: ignore[arg-type]
        before = time.process_time()
        found = report(fit.job_of(given))
        compiling = time.process_time() - before
        needed = size(found.needed)
        if found.arguments:
            needed += f" ({size(found.arguments)} + {size(found.temporaries)})"
        fits = "yes" if found.fits else "**no**"
        cells = [found.mesh, f"{needed} of {size(found.hbm)}", fits, "", "", "", ""]
        if found.arguments:
            travels = (f"{kind} {of['count']:,}: {size(of['bytes'])}" for kind, of in found.collectives.items())
            cells[3:] = [f"{compiling:.0f} s CPU", size(found.hbm_traffic or None), ", ".join(travels)]
            cells.append(f"{found.tokens_per_second:,.0f}")
        yield beginning(row) + " | ".join(cells) + " |"


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.fit_table")
