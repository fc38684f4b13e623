"""Live comparisons with PyTorch, transformers and peft: ``make test-interop``."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Other runs do not even import these files: torch may be missing, and takes seconds where it is not."""
    wanted = config.getoption("markexpr")
    return True if "interop" not in wanted or "not interop" in wanted else None


@pytest.fixture(autouse=True, scope="session")
def quiet_torch() -> None:
    """One thread, since the models are tiny; no progress bars in the report of a failure."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
