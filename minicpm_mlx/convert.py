"""Convert a model to a folder for mlx_lm and MLX; the same command as `weights_io.convert`, with mlx_lm's defaults.

python -m minicpm_mlx.convert --hf-path openbmb/MiniCPM-2B-sft-bf16 --mlx-path mlx_model -q
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from weights_io import convert
from weights_io.command_line import Former
from weights_io.convert import main


@dataclass(frozen=True)
class Options(convert.Options):
    to: Literal["hf", "llama", "mlx"] = "mlx"
    """mlx: a folder that mlx_lm opens with --trust-remote-code if this package is installed; hf: the Hugging Face
    layout in the model's own architecture; llama: LlamaForCausalLM, with MiniCPM's scales folded in."""
    save_path: Annotated[Path, Former("out", "mlx_path")] = Path("mlx_model")
    """Folder to write (--mlx-path in mlx_lm). It must be empty or not exist yet."""


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_mlx.convert")
