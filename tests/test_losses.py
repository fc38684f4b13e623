"""What training minimises, against the formulas in numpy: token losses, preferences, and the experts' imbalance."""

import re

import numpy as np
import pytest
import tiny_training as tiny
from tiny_training import BACKENDS, MOE, UNTIED, part

from minicpm_data.datasets.batches import Batches
from minicpm_data.datasets.examples import IGNORED, Example
from minicpm_data.training import objectives
from minicpm_jax.training import cross_entropy
from weights_io.config import ModelConfig

pytest.importorskip("jax")
pytest.importorskip("mlx.core")

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "dim_model_base": 16}
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
LONGROPE = {
    "max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 1.5, 3.0, 8.0],
        "original_max_position_embeddings": 16,
    },
}
B, T, V, D = 3, 12, 199, 32


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def initialised(backend, config, seed=0):
    if backend == "minicpm_jax":
        import jax

        return part(backend, "model").initialize(config, jax.random.key(seed))
    import mlx.core as mx

    return part(backend, "model").initialize(config, mx.random.key(seed))


def value_and_gradients(backend, config, hidden, weight, labels, above, dtype="float32", mesh=None):
    """Token losses [B, T], and the gradients of their sum times ``above`` with respect to hidden and head; in JAX over
    the devices of a mesh."""
    token_losses = part(backend, "training.cross_entropy").token_losses
    model = initialised(backend, config)
    if backend == "minicpm_jax":
        import jax
        import jax.numpy as jnp

        from minicpm_jax.model import Model, nested
        from minicpm_jax.training.step import weights_of

        head = "model.embed_tokens.weight" if model.lm_head is None else "lm_head.weight"

        def total(hidden, weight):
            changed = Model(nested({**weights_of(model), head: weight}), config, mesh=mesh)
            losses = token_losses(changed, hidden, jnp.asarray(labels))
            return jnp.sum(losses * above), losses

        gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        found, losses = gradient(jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype))
        return np.asarray(losses), *(np.asarray(array, np.float32) for array in found)
    import mlx.core as mx

    def total(hidden, weight):
        owner = model.model.embed_tokens if model.lm_head is None else model.lm_head
        owner.weight = weight
        losses = token_losses(model, hidden, mx.array(labels))
        return (losses * mx.array(above)).sum(), losses

    inputs = (mx.array(array, getattr(mx, dtype)) for array in (hidden, weight))
    (_, losses), found = mx.value_and_grad(total, argnums=(0, 1))(*inputs)
    return np.asarray(losses), *(np.asarray(array.astype(mx.float32)) for array in found)


def plain(config, hidden, weight, labels, above):
    """The same in float64, with all logits at once."""
    hidden, weight = hidden[:, :-1].astype(np.float64) / config.logit_divisor, weight.astype(np.float64)
    targets, above = labels[:, 1:], np.where(labels[:, 1:] == IGNORED, 0, above[:, 1:])
    logits = hidden @ weight.T
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    shares = exponents / exponents.sum(-1, keepdims=True)
    right = np.eye(len(weight))[np.maximum(targets, 0)]
    losses = np.where(targets == IGNORED, 0, -np.log((shares * right).sum(-1)))
    back = (shares - right) * above[..., None]
    of_hidden = back @ weight / config.logit_divisor
    first, last = np.zeros((len(hidden), 1)), np.zeros((len(hidden), 1, hidden.shape[-1]))
    of_weight = np.einsum("btv,btd->vd", back, hidden)
    return np.concatenate([first, losses], 1), np.concatenate([of_hidden, last], 1), of_weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])  # tokens of a row at a time; 4 does not divide the 11
def test_token_losses_in_chunks_are_cross_entropy(backend, monkeypatch, tied, chunk):
    config = ModelConfig.from_dict({**SHAPE, "vocab_size": V, "tie_word_embeddings": tied, "intermediate_size": 32})
    monkeypatch.setattr(part(backend, "training.cross_entropy"), "LOGITS", B * V * chunk)
    random = np.random.default_rng(0)
    hidden, weight = random.normal(size=(B, T, D)).astype(np.float32), random.normal(size=(V, D)).astype(np.float32)
    labels = np.where(random.random((B, T)) < 0.3, IGNORED, random.integers(0, V, (B, T))).astype(np.int32)
    above = random.normal(size=(B, T)).astype(np.float32)
    found = value_and_gradients(backend, config, hidden, weight, labels, above)
    for array, expected in zip(found, plain(config, hidden, weight, labels, above), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "devices", "words"),
    [("fsdp=8", 8, 199), ("data=2,fsdp=2,tensor=2", 8, 200), ("fsdp=2,tensor=3", 6, 200), ("fsdp=5", 5, 199)],
)
def test_over_devices_the_heads_gradient_is_the_same(monkeypatch, mesh, devices, words):
    """Three rows divide over none of them, the words over two alone, the 32 columns not over five; and what fills up
    the words (to 7 parts) is of no consequence where all logits are far below 0."""
    import jax

    from minicpm_jax.parallel.mesh import make_mesh

    config = ModelConfig.from_dict({**SHAPE, "vocab_size": words, "intermediate_size": 32, "dim_model_base": 32})
    monkeypatch.setattr(cross_entropy, "LOGITS", T * 29)
    random = np.random.default_rng(0)
    hidden, weight = random.normal(size=(B, T, D)), random.normal(size=(words, D))
    hidden[0], weight[:, 0] = 100 * np.eye(D)[0], weight[:, 0] / 10 - 1.5  # logits of about -150
    hidden, weight = hidden.astype(np.float32), weight.astype(np.float32)
    labels, above = random.integers(0, words, (B, T)).astype(np.int32), random.normal(size=(B, T)).astype(np.float32)
    over = make_mesh(mesh, jax.devices()[:devices])
    found = value_and_gradients("minicpm_jax", config, hidden, weight, labels, above, mesh=over)
    for array, expected in zip(found, plain(config, hidden, weight, labels, above), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_heads_gradient_is_made_with_the_loss(backend, monkeypatch, tied):
    """Hidden's gradient alone, where the factor from above comes later; in MLX a model that is not being trained makes
    nothing ahead, and its gradient is the same."""
    config = ModelConfig.from_dict({**SHAPE, "vocab_size": V, "tie_word_embeddings": tied, "intermediate_size": 32})
    cross_entropy = part(backend, "training.cross_entropy")
    monkeypatch.setattr(cross_entropy, "LOGITS", B * V * 4)
    random, model = np.random.default_rng(0), initialised(backend, config)
    hidden = random.normal(size=(B, T, D)).astype(np.float32)
    labels = np.where(random.random((B, T)) < 0.3, IGNORED, random.integers(0, V, (B, T))).astype(np.int32)
    above = random.normal(size=(B, T)).astype(np.float32)
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    expected = plain(config, hidden, np.asarray(head.weight), labels, above)[1]
    if backend == "minicpm_jax":
        import jax
        import jax.numpy as jnp

        def total(hidden, model):
            return jnp.sum(cross_entropy.token_losses(model, hidden, jnp.asarray(labels)) * above)

        gradient = jax.jit(jax.grad(total))
        products = re.findall(r"dot_general\[", str(jax.make_jaxpr(gradient)(hidden, model)))
        assert len(products) == 2  # not three: logits, and what goes below
        found = [gradient(hidden, model)]
    else:
        import mlx.core as mx

        def total(hidden):
            return (cross_entropy.token_losses(model, hidden, mx.array(labels)) * mx.array(above)).sum()

        model.freeze()
        found = [mx.grad(total)(mx.array(hidden)) for model in (model.train(), model.eval())]
    for array in found:
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_the_heads_gradient_is_added_up_in_float32(backend, monkeypatch):
    """256 equal parts in bfloat16 would stop growing at 256 times the first; here there are 1024."""
    config = ModelConfig.from_dict({**SHAPE, "vocab_size": V, "intermediate_size": 32})
    monkeypatch.setattr(part(backend, "training.cross_entropy"), "LOGITS", V)  # a token at a time
    hidden, weight = np.ones((1, 1025, D), np.float32), np.zeros((V, D), np.float32)
    labels, above = np.full((1, 1025), 7), np.ones((1, 1025), np.float32)
    _, _, gradient = value_and_gradients(backend, config, hidden, weight, labels, above, dtype="bfloat16")
    np.testing.assert_allclose(gradient, plain(config, hidden, weight, labels, above)[2], rtol=0.01)


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_the_logits_of_a_batch_are_never_there_at_once(backend, monkeypatch, head):
    width, vocabulary, rows = 257, 32768, 2
    whole = rows * (width - 1) * vocabulary * 4  # 67 MB
    monkeypatch.setattr(part(backend, "training.cross_entropy"), "LOGITS", 2**17)  # 0.5 MB
    raw = {**SHAPE, "hidden_size": 8, "vocab_size": vocabulary, "intermediate_size": 32}
    config, token_losses = ModelConfig.from_dict(raw), part(backend, "training.cross_entropy").token_losses
    model = part(backend, "model").abstract(config, "float32")
    if backend == "minicpm_jax":
        import jax
        import jax.numpy as jnp

        def total(hidden, model, labels):
            return jnp.sum(token_losses(model, hidden, labels))

        shapes = jax.ShapeDtypeStruct((rows, width, 8), "float32"), jax.ShapeDtypeStruct((rows, width), "int32")
        gradient = jax.jit(jax.grad(total, argnums=(0, 1) if head == "trained" else 0))
        program = gradient.lower(shapes[0], model, shapes[1]).compile()
        taken = program.memory_analysis().temp_size_in_bytes
    else:
        import mlx.core as mx

        labels = mx.zeros((rows, width), mx.int32)
        if head == "frozen":
            model.freeze()

        def total(hidden, weight):
            model.model.embed_tokens.weight = weight
            return token_losses(model, hidden, labels).sum()

        inputs = mx.ones((rows, width, 8)), mx.ones((vocabulary, 8))
        mx.eval(inputs, labels)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(total, argnums=(0, 1) if head == "trained" else 0)(*inputs))
        taken = mx.get_peak_memory() - before
    assert taken < whole / 5, f"{taken / 1e6:.1f} of {whole / 1e6:.1f} MB"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("losses")
    kinds = {"untied": UNTIED, "moe": MOE, "dynamic": DYNAMIC, "longrope": LONGROPE}
    return {name: tiny.write_world(root / name, **changes) / "model" for name, changes in kinds.items()}


def examples(lengths, seed=0):
    random = np.random.default_rng(seed)
    ids = [random.integers(3, 300, length).astype(np.int32) for length in lengths]
    return [Example(i, random.random(len(i)) < 0.6) for i in ids]


@pytest.mark.parametrize("kind", ["untied", "moe", "dynamic", "longrope"])
def test_packed_or_not_and_in_either_backend_the_gradients_are_the_same(folders, kind):
    """Of experts the imbalance too: padding does not count. Nor does it in the length that scales RoPE."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 300, length).astype(np.int32) for length in (9, 17, 14, 22, 6, 28)]
    examples = [Example(i, random.random(len(i)) < 0.6) for i in ids]
    apart, packed = Batches(examples, 6, 64, seed=0), Batches(examples, 2, 64, seed=0, pack=True)
    assert (apart.per_epoch, packed.per_epoch) == (1, 1) and packed[0].segments.max() > 2
    models = {backend: tiny.load(backend, folders[kind]) for backend in BACKENDS}
    (sums, expected), *others = (
        tiny.gradients(backend, model, batches[0].arrays(), balance=0.5)
        for backend, model in models.items()
        for batches in (apart, packed)
    )
    assert sums["weight"] == apart[0].tokens == packed[0].tokens and ("imbalance" in sums) == (kind == "moe")
    for also, gradients in others:
        assert also == pytest.approx(sums, rel=1e-5)
        tiny.same(gradients, expected, 2e-5)


def sums(backend, name, losses, labels, beta, reference=None):
    """An objective's sums, from token losses."""
    if backend == "minicpm_jax":
        import jax.numpy as np_
    else:
        import mlx.core as np_
    batch = {} if reference is None else {"reference": np_.array(reference)}
    trained = np_.array(labels[:, 1:] != IGNORED)
    found = objectives.OBJECTIVES[name](np_, np_.array(losses), trained, batch, beta)
    return {key: float(value) for key, value in found.items()}


@pytest.fixture(scope="module")
def answers():
    """Losses [2 P, T] of the answers to three questions, and labels; the last of four pairs is an empty row."""
    random = np.random.default_rng(3)
    labels = np.where(random.random((8, T)) < 0.5, IGNORED, 5)
    labels[[3, 7]] = IGNORED
    losses = np.where(labels == IGNORED, 0, random.gamma(2, 1, (8, T))).astype(np.float32)
    losses[:, 0], labels[:, 0] = 0, IGNORED
    return losses, labels


def softplus(x):
    return np.logaddexp(0, x)


def test_dpo_is_equation_7_of_its_paper(backend, answers):
    losses, labels = answers
    reference = np.random.default_rng(4).normal(-8, 3, 8).astype(np.float32)
    reference[[3, 7]] = 0
    log_ratio = -losses.sum(1).astype(np.float64) - reference
    margin = 0.3 * (log_ratio[:3] - log_ratio[4:7])
    expected = {"loss": softplus(-margin).sum(), "margin": margin.sum(), "accuracy": (margin > 0).sum(), "weight": 3}
    assert sums(backend, "dpo", losses, labels, 0.3, reference) == pytest.approx(expected, rel=1e-5)
    begin = sums(backend, "dpo", losses, labels, 0.3, -losses.sum(1))
    begin.pop("accuracy")  # of margins of nothing but rounding
    assert begin == pytest.approx({"loss": 3 * np.log(2), "margin": 0, "weight": 3}, rel=1e-6, abs=1e-6)


def test_orpo_is_equation_6_of_its_paper(backend, answers):
    losses, labels = answers
    rows = [0, 1, 2, 4, 5, 6]
    mean = -losses[rows].sum(1).astype(np.float64) / (labels[rows] != IGNORED).sum(1)
    odds = np.log(np.exp(mean) / (1 - np.exp(mean)))
    ratio = odds[:3] - odds[3:]
    total = (-mean[:3] + 0.3 * softplus(-ratio)).sum()
    expected = {"loss": total, "margin": ratio.sum(), "accuracy": (ratio > 0).sum(), "weight": 3}
    assert sums(backend, "orpo", losses, labels, 0.3) == pytest.approx(expected, rel=1e-5)


def test_imbalance(backend):
    """Against E sum_e f_e P_e, and its gradient by the router's logits, E / R p (f - sum_e f_e p_e)."""
    moe, random = part(backend, "layers.moe"), np.random.default_rng(5)
    logits, real = random.normal(size=(40, 4)).astype(np.float32), random.random((2, 20)) < 0.7

    def formula(logits, chosen):
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        taken = np.array([np.mean(chosen == expert) for expert in range(4)])
        back = 4 / len(logits) * shares * (taken - (shares @ taken)[:, None])
        return 4 * (taken * shares.mean(0)).sum(), back

    if backend == "minicpm_jax":
        import jax
        import jax.numpy as np_

        value_and_grad = jax.value_and_grad
    else:
        import mlx.core as np_

        value_and_grad = np_.value_and_grad
    _, chosen = moe.route(np_.array(logits), 2)
    taken, rows = np.asarray(chosen), real.reshape(-1)
    assert sorted(taken[0]) == sorted(np.argsort(-logits[0])[:2])
    found, back = value_and_grad(moe.load_balancing_loss)(np_.array(logits), chosen)
    expected, expected_back = formula(logits, taken)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(back, expected_back, atol=1e-6)
    assert np.abs(expected_back).max() > 1e-3  # what the router learns from it
    found = moe.load_balancing_loss(np_.array(logits), chosen, np_.array(real))
    assert float(found) == pytest.approx(formula(logits[rows], taken[rows])[0], rel=1e-5)
    alike = np_.array(np.array([[0, 1], [2, 3]] * 20))
    assert float(moe.load_balancing_loss(np_.array(logits), alike)) == pytest.approx(
        1, rel=1e-5
    )  # f = 1 / E whatever P is
