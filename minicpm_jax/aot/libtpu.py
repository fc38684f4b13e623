"""Configures libtpu before JAX starts: compiler flags, and no search for a TPU on machines without one."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

GOOGLE = "0x1ae0"  # PCI vendor of TPUs
# Query no metadata server; assume a host of 8 v5e chips; allow several processes to load libtpu.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Size in MiB from which XLA decomposes the collectives of a product and overlaps them with its parts. That helps
# sharded activations. For weights sharded over fsdp it makes 10,268 permutations of 33.5 GB in a step of MiniCPM-2B
# over 8 chips, where asynchronous all-gathers and reduce-scatters take 22.2 GB.
WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
# Before 0.0.52 XLA tiles a program's int8 arrays in 32 rows by default, and a kernel's in 8. An int8 cache is then
# copied whole in every layer (MiniCPM-2B, 4,096 slots: 127.06 GB per token with 0.0.48; with this flag 6.26).
TILES = "xla_tpu_impure_enable_large_2nd_minor_layout"
TILES_OF = (42, 52)  # first release that needs it (and that `jax[tpu]` pins), and first that does not


def tell_libtpu() -> None:
    """Set libtpu's flags. Call it before JAX starts. On a machine without a TPU, an installed libtpu would print
    warnings at every start and query the network."""
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
