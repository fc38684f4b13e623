"""Names of a package that are imported on first use, each tried in an interpreter that has imported nothing yet."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "statement",
    [
        "from minicpm_data import tokenizer; assert tokenizer.__name__ == 'minicpm_data.tokenizer'",
        "import minicpm_data.tokenizer.tokenizer; assert callable(minicpm_data.load_tokenizer)",
        "from minicpm_data import Tokenizer; assert Tokenizer.__module__ == 'minicpm_data.tokenizer.tokenizer'",
        "from minicpm_data import *; assert callable(stream_text) and callable(load_tokenizer)",
        "import minicpm_data; assert not hasattr(minicpm_data, 'nonsense')",
        "import minicpm_data; assert 'load_tokenizer' in dir(minicpm_data)",
        "import sys, minicpm_data; assert 'minicpm_data.tokenizer.tokenizer' not in sys.modules",
        # The module of the command must not take the place of the function of its name.
        "import minicpm_jax.generate, minicpm_jax; assert callable(minicpm_jax.generate)",
    ],
)
def test_in_a_fresh_interpreter(statement):
    run = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.strip().splitlines()[-1]
