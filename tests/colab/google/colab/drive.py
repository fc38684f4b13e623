"""Google Drive is the folder that COLAB_DRIVE names; without one the user has refused it."""

import os
from pathlib import Path


def mount(mountpoint: str, force_remount: bool = False, timeout_ms: int = 120000, readonly: bool = False) -> None:
    if Path(mountpoint).is_symlink():
        print(f"Drive already mounted at {mountpoint}.")
        return
    if "COLAB_DRIVE" not in os.environ:
        raise ValueError("mount failed")
    Path(mountpoint).symlink_to(os.environ["COLAB_DRIVE"])
