"""What libtpu is told before JAX starts: how to compile, and on a machine without a TPU not to look for one."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

GOOGLE = "0x1ae0"  # PCI vendor of TPUs
# No metadata server is asked; a host of 8 v5e chips is assumed; more than one process may load it.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# MiB of a product from which XLA takes its collectives apart and runs them in turns with its pieces. That is for splits
# of activations: of weights over fsdp it makes 10,268 permutations of 33.5 GB, a step of MiniCPM-2B over 8 chips, where
# gathers and scatters that run beside the arithmetic take 22.2 GB.
WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
# Before 0.0.52 a program's int8 arrays are in tiles of 32 rows unless told otherwise, and a kernel's in tiles of 8: an
# int8 cache is copied whole in every layer (MiniCPM-2B, 4,096 slots: 127.06 GB a token with 0.0.48; told so, 6.26).
TILES = "xla_tpu_impure_enable_large_2nd_minor_layout"
TILES_OF = (42, 52)  # first release that needs it (and that `jax[tpu]` pins), and first that does not


def tell_libtpu() -> None:
    """Before JAX starts. Installed where no TPU is, libtpu would complain on every start and ask the network."""
    if importlib.util.find_spec("libtpu") is None:
        return
    flags = {WINDOWED: "100000"}
    release = re.match(r"0\.0\.(\d+)", importlib.metadata.version("libtpu"))
    if release and TILES_OF[0] <= int(release[1]) < TILES_OF[1]:
        flags[TILES] = "false"
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    added = [f"--{name}={value}" for name, value in flags.items() if name not in given]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *added]).strip()
    vendors = (path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    if GOOGLE not in vendors:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
