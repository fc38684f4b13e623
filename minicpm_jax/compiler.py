"""libtpu on a machine without a TPU: it compiles for one, if it is told not to look for it."""

import importlib.util
import os
from pathlib import Path

GOOGLE = "0x1ae0"  # PCI vendor of TPUs
# No metadata server is asked; a host of 8 v5e chips is assumed; more than one process may load it.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tell_libtpu_it_is_alone() -> None:
    """Before JAX starts: else libtpu, installed where no TPU is, complains on every start and asks the network."""
    if importlib.util.find_spec("libtpu") is None:
        return
    vendors = (path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    if GOOGLE not in vendors:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
