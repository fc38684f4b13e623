"""Every field of `ModelConfig` moves the logits, in both backends: none is lost on the way from config.json."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import pytest

from weights_io.checkpoint import Checkpoint
from weights_io.config import ModelConfig
from weights_io.parameters import tensor_shapes
from weights_io.rope_config import LongRoPE, RopeScaling

BASE = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=100.0,
    rope_scaling=RopeScaling("dynamic", 4.0),
    max_position_embeddings=8,
    tie_word_embeddings=True,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=16,
)
SHORT, LONG = (1.0, 1.5, 2.0, 2.5), (2.0, 3.0, 4.0, 5.0)
# LongRoPE of 12 tokens: with the short factors, with the long ones for the length, and for max_position_embeddings.
FEW = dataclasses.replace(BASE, rope_scaling=LongRoPE(SHORT, LONG, 16), max_position_embeddings=16)
MANY = dataclasses.replace(BASE, rope_scaling=LongRoPE(SHORT, LONG, 8), max_position_embeddings=8)
EDITED = dataclasses.replace(BASE, rope_scaling=LongRoPE(SHORT, LONG, 16), max_position_embeddings=64)
EXPERTS = dataclasses.replace(BASE, num_experts=4, num_experts_per_tok=2)
FATRELU = dataclasses.replace(BASE, hidden_act="fatrelu", hidden_act_param=0.1)
LATENT = dataclasses.replace(
    BASE,
    model_type="minicpm3",
    num_key_value_heads=4,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
)
# What the fields are changed in that mean nothing in BASE.
BASES = {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "hidden_act_param": FATRELU}
BASES |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), LATENT)
# One other value for each field; where the weights keep their shapes, nothing but the field can move the logits.
CHANGES = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "num_experts": 5,
    "num_experts_per_tok": 1,
    "hidden_act": "relu",
    "hidden_act_param": 0.2,
    "rms_norm_eps": 1e-1,
    "rope_theta": 90.0,
    "rope_scaling": RopeScaling("dynamic", 3.0),
    "max_position_embeddings": 9,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "scale_emb": 11.0,
    "scale_depth": 1.3,
    "dim_model_base": 15,
}
IDS = np.arange(12)[None] * 5 % 31  # longer than max_position_embeddings


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    array: np.ndarray
    source: Path = Path("test")

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self, index=()):
        return self.array[index]


def checkpoint(config: ModelConfig) -> Checkpoint:
    """Weights that depend on a tensor's name and shape alone."""
    tensors = {}
    for name, shape in tensor_shapes(config):
        values = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        tensors[name] = ArrayTensor((values + name.endswith("norm.weight")).astype(np.float32))
    return Checkpoint(Path("test"), {}, config, tensors, "float32", (), ())


@pytest.fixture(scope="module", params=["jax", "mlx"])
def backend(request):
    """What turns a checkpoint, and a bare config, into logits."""
    if request.param == "mlx":
        mx = pytest.importorskip("mlx.core")
        from minicpm_mlx.loading import load_weights
        from minicpm_mlx.model import initialize

        return load_weights, lambda config: initialize(config, mx.random.key(0))
    jax = pytest.importorskip("jax")
    from minicpm_jax.loading import load_weights
    from minicpm_jax.model import initialize

    return load_weights, lambda config: initialize(config, jax.random.key(0))


@pytest.fixture(scope="module")
def base_logits(backend):
    bases = (BASE, *BASES.values(), FEW, MANY, EDITED)
    return {base: np.asarray(backend[0](checkpoint(base))(IDS)) for base in bases}


def test_every_field_is_changed_below():
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"vision"}  # tests/test_vision.py
    assert fields == CHANGES.keys()
    assert all(getattr(BASES.get(name, BASE), name) != value for name, value in CHANGES.items())


@pytest.mark.parametrize("field", CHANGES)
def test_field_moves_logits(backend, base_logits, field):
    load_weights, initialize = backend
    base = BASES.get(field, BASE)
    config = dataclasses.replace(base, **{field: CHANGES[field]})
    if field == "initializer_range":
        before, after = np.asarray(initialize(BASE)(IDS)), np.asarray(initialize(config)(IDS))
    else:
        before, after = base_logits[base], np.asarray(load_weights(checkpoint(config))(IDS))
    assert np.isfinite(after).all()
    assert after.shape == (1, 12, config.vocab_size)
    assert after.shape != before.shape or np.abs(after - before).max() > 1e-3


OTHER = tuple(1.1 * factor for factor in SHORT)


@pytest.mark.parametrize(
    "base, field, value, moves",
    [
        (FEW, "short_factor", OTHER, True),
        (FEW, "long_factor", OTHER, False),
        (MANY, "short_factor", OTHER, False),
        (MANY, "long_factor", OTHER, True),
        (EDITED, "short_factor", OTHER, False),
        (EDITED, "long_factor", OTHER, True),
        (EDITED, "original_max_position_embeddings", 17, True),
        (EDITED, "max_position_embeddings", 65, True),
        (FEW, "max_position_embeddings", 17, True),
        (FEW, "original_max_position_embeddings", 11, True),
        (FEW, "max_position_embeddings", 15, True),
    ],
)
def test_numbers_of_longrope_move_logits_where_they_are_used(backend, base_logits, base, field, value, moves):
    config = base
    if field == "max_position_embeddings":
        config = dataclasses.replace(base, max_position_embeddings=value)
    else:
        config = dataclasses.replace(base, rope_scaling=dataclasses.replace(base.rope_scaling, **{field: value}))
    moved = np.abs(np.asarray(backend[0](checkpoint(config))(IDS)) - base_logits[base]).max()
    assert moved > 1e-3 if moves else moved == 0


def test_kind_of_mlp_moves_logits(backend, base_logits):
    """Dense, with experts, FATReLU, with both, and latent attention."""
    both = dataclasses.replace(EXPERTS, hidden_act="fatrelu", hidden_act_param=0.1)
    kinds = [
        *(base_logits[base] for base in (BASE, EXPERTS, FATRELU, LATENT)),
        np.asarray(backend[0](checkpoint(both))(IDS)),
    ]
    for i, kind in enumerate(kinds):
        assert all(np.abs(kind - other).max() > 1e-3 for other in kinds[:i])


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0)])
def test_kind_of_rope_scaling_moves_logits(backend, base_logits, scaling):
    config = dataclasses.replace(BASE, rope_scaling=scaling)
    assert np.abs(np.asarray(backend[0](checkpoint(config))(IDS)) - base_logits[BASE]).max() > 1e-3


@pytest.mark.parametrize("base", [BASE, EXPERTS, FATRELU, LATENT])
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("dynamic", 4.0), MANY.rope_scaling])
def test_backends_agree(scaling, base):
    pytest.importorskip("mlx.core")
    pytest.importorskip("jax")
    from minicpm_jax.loading import load_weights as load_jax
    from minicpm_mlx.loading import load_weights as load_mlx

    opened = checkpoint(dataclasses.replace(base, rope_scaling=scaling, tie_word_embeddings=scaling is None))
    ids, mask = np.tile(IDS, (3, 1)), np.ones((3, 12), int)
    mask[1, :4] = 0
    mask[2, 7:] = 0
    ours, twin = (np.asarray(load(opened)(ids, mask)) for load in (load_jax, load_mlx))
    np.testing.assert_allclose(ours[mask == 1], twin[mask == 1], rtol=0, atol=1e-4)
