"""Check a conversion: compare a model with the results of another program for the same weights.

    python -m minicpm_mlx.parity --model DIR --reference FILE.npz

`minicpm_data.diagnostics.parity` says which arrays the file may hold. The exit code is 0 if all arrays agree, 1 if some
do not, and 2 if the comparison is not possible.
"""

from typing import Any

from minicpm_data.diagnostics import parity
from minicpm_data.diagnostics.vision_parity import VisionBackend
from minicpm_mlx.generation.image_stages import seen, stages
from minicpm_mlx.generation.teacher_forcing import continued, logits, states
from weights_io import command_line


def main(options: parity.Options) -> None:
    """Compare a model with the results of another program for the same weights."""

    def load(*where: Any, **how: Any) -> Any:
        import minicpm_mlx

        return minicpm_mlx.load(*where, **how)

    parity.run(options, parity.ParityBackend(load, logits, states, continued, VisionBackend(stages, seen)))


if __name__ == "__main__":
    command_line.run(main, parity.Options, "python -m minicpm_mlx.parity")
