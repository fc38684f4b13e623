"""Quantize a model with calibration texts (GPTQ, AWQ), layer by layer.

python -m minicpm_mlx.quantize --model minicpm-2b --method gptq --data texts.jsonl --save-path quantized
"""

from typing import TYPE_CHECKING

from minicpm_data.cli.quantize import Options, quantize

if TYPE_CHECKING:
    from minicpm_data.calibration.inputs import LayerRunner


def main(options: Options) -> None:
    """Quantize a model with calibration texts and write it as a GPTQ or AWQ folder."""
    quantize(options, runner)


def runner() -> "LayerRunner":
    from minicpm_mlx.quantization.calibration import run_layer

    return run_layer


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_mlx.quantize")
