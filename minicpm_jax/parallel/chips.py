"""The TPUs that a program can be compiled for, and their rates."""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from weights_io.errors import InputError, listed

LANES = 128  # of a TPU's registers and tiles


@dataclass(frozen=True)
class Chip:
    """One chip; where a program sees its two cores as devices (v2, v3), each has half."""

    name: str
    kinds: tuple[str, ...]  # how JAX names it: `jax.Device.device_kind`
    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of HBM
    hbm: int  # bytes
    axes: int  # of a topology: 2x4, or 2x2x1
    bfloat16_kernels: bool = True  # whether those of attention compile for it in bfloat16

    @property
    def example(self) -> str:
        """A topology that there is."""
        return f"{self.name}:{'x'.join(('2', '2', '1')[: self.axes])}"

    def check_dtype(self, dtype: str) -> None:
        """`InputError` where the model cannot be computed in it."""
        if dtype == "bfloat16" and not self.bfloat16_kernels:
            raise InputError(
                f"attention's kernels do not compile for {self.name} in bfloat16; compute in float32 (--dtype float32)."
            )


GIB = 2**30
# Google's figures a chip (cloud.google.com/tpu/docs, one page for each); of v3 the lower of the two peaks it gives.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", ("TPU v2",), 46e12, 0.7e12, 16 * GIB, 2, bfloat16_kernels=False),
        Chip("v3", ("TPU v3",), 123e12, 0.9e12, 32 * GIB, 2, bfloat16_kernels=False),
        Chip("v4", ("TPU v4",), 275e12, 1.23e12, 32 * GIB, 3),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 0.82e12, 16 * GIB, 2),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 2.77e12, 95 * GIB, 3),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1.64e12, 32 * GIB, 2),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None: no TPU, or one that is not in the table."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are wired: ``v5e:2x4``."""

    chip: Chip
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> "Topology":
        """Raises `InputError` where it is not of that form."""
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        if not found or found[1] not in CHIPS:
            raise InputError(f"{text} is not of the form v5e:2x4; the chips are {listed(CHIPS)}.", option="topology")
        chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
        if len(shape) != chip.axes or not all(shape):
            raise InputError(f"{text} cannot be: {chip.name} comes as {chip.example} and the like.", option="topology")
        return Topology(chip, shape)

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def doubled(self) -> "Topology":
        """The next larger one."""
        least = self.shape.index(min(self.shape[:2]))
        return Topology(self.chip, tuple(2 * n if i == least else n for i, n in enumerate(self.shape)))

    def devices(self) -> Sequence[Any]:
        """Of a program for it, none of which need exist. Raises `InputError` without libtpu, or where it knows no such
        topology."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "compiling for a TPU needs libtpu, which is not installed: pip install 'minicpm-jax-mlx[fit]' (Linux "
                "on x86-64)."
            )
        from jax.experimental import topologies

        # Of a host, along each axis. libtpu 0.0.50 and later assume this too; earlier ones assume 2x2x1 whatever the
        # shape, and so refuse a single chip.
        chosen: dict[str, Any] = {"chips_per_host_bounds": (min(2, self.shape[0]), min(2, self.shape[1]), 1)}
        if self.chip.name == "v4":  # whose cores are one device to JAX, which makes no mesh of two
            chosen["chip_config_name"] = "megacore"
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=str(self), **chosen).devices
        except Exception as error:  # libtpu's own kinds, which it does not export
            reason = str(error).partition("\n")[0].rpartition("INVALID_ARGUMENT: ")[2].rstrip(".")
            raise InputError(f"{self} cannot be ({reason}); try {self.chip.example}.", option="topology") from None


def platform() -> str:
    """``cpu``, ``tpu``. Raises `InputError` where JAX finds no device."""
    try:
        return jax.default_backend()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"JAX cannot start ({reason}); install JAX's build for it, or set JAX_PLATFORMS=cpu."
        ) from None
