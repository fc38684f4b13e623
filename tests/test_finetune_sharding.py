"""Fine-tuning on eight simulated devices: the losses of one device, and a resumed run."""

import numpy as np
import pytest
import tiny_training as tiny
from tiny_training import MOE

pytest.importorskip("jax")

from minicpm_data.training import finetuning
from minicpm_jax import finetune, lora
from minicpm_jax.backend import backend
from weights_io.adapters import read_adapter
from weights_io.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow  # minutes on two cores: run with the whole suite alone

MESHES = ["fsdp=2,tensor=2,expert=2"]
MODULES = {"all weights": (finetune, "save_path"), "adapters": (lora, "adapter_path")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A mixture of experts, with one key/value head and an odd vocabulary, which two devices do not divide."""
    odd = {"num_key_value_heads": 1, "vocab_size": 483}
    return tiny.write_world(tmp_path_factory.mktemp("mesh"), **MOE, **odd)


def run(world, out, kind, mesh, **changes):
    module, folder = MODULES[kind]
    short = {"batch_size": 8, "max_seq_length": tiny.WIDTH, "iters": 4, "warmup_steps": 0, "learning_rate": 1e-2}
    common = {"model": str(world / "model"), "data": world / "data", "dtype": "float32", "mesh": mesh, folder: out}
    options = module.Options(**{**common, **short, "lr_schedule": "constant", **changes})
    finetuning.finetune(options, backend, module.trainer)
    return [record["loss"] for record in tiny.records(out)]


@pytest.fixture(scope="module", params=MODULES)
def alone(request, world, tmp_path_factory):
    return request.param, run(world, tmp_path_factory.mktemp("alone") / "out", request.param, None)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_losses_are_those_of_one_device_resumed_or_not(alone, world, tmp_path, mesh):
    kind, expected = alone
    run(world, tmp_path / "out", kind, mesh, iters=2)
    found = run(world, tmp_path / "out", kind, mesh, resume=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    config = open_checkpoint(world / "model").config
    if kind == "adapters":  # both refuse what has other shapes than the config says
        assert read_adapter(tmp_path / "out", config).tensors
    else:
        assert open_checkpoint(tmp_path / "out" / "model").config == config
