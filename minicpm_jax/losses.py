"""What training minimises.

Dims: B rows, T tokens, C of them at a time, V vocabulary, D hidden.

Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts the token at t. The
logits of a whole batch are never there at once: with 122,753 words, 8 rows of 2048 tokens would take 8 GB.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from minicpm_data.batches import IGNORED
from minicpm_jax.arithmetic import divided, precision, product
from minicpm_jax.attention import positions_of
from minicpm_jax.model import Model
from minicpm_jax.sharding import by_rows, partition_spec, row_axes, rows_split

LOGITS = 2**26  # most logits at once: 0.27 GB in float32

Batch = dict[str, Array]  # ids, labels, segments [B, T]; for DPO reference [B]
Sums = tuple[Float[Array, ""], dict[str, Array]]


def token_losses(model: Model, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross entropy of each label in float32, at its own position; 0 where there is none."""
    hidden = divided(hidden, model.config.logit_divisor)
    weight = model.model.embed_tokens.weight[...] if model.lm_head is None else model.lm_head.weight[...]
    width, words = labels.shape[1], model.config.vocab_size
    mesh = model.model.mesh
    rows = -(-labels.shape[0] // rows_split(mesh))  # of a device
    chunk = max(1, min(width - 1, LOGITS // (rows * words)))
    filling = -(width - 1) % chunk
    hidden = jnp.pad(hidden[:, :-1], [(0, 0), (0, filling), (0, 0)])
    targets = jnp.pad(labels[:, 1:], [(0, 0), (0, filling)], constant_values=IGNORED)
    losses = _chunked(chunk, words, mesh, by_rows(hidden, mesh), weight, by_rows(targets, mesh))
    return jnp.pad(losses[:, : width - 1], [(0, 0), (1, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    chunk: int,
    words: int,
    mesh: Mesh | None,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Cross entropies, C tokens of each row at a time. The gradient is spelled out: JAX would keep all the logits, or
    add up the weight's gradient in the weight's dtype. ``words``: V, without what a mesh has filled up."""
    return _cross_entropies(chunk, words, mesh, hidden, weight, targets)[0]


def _cross_entropies(chunk, words, mesh, hidden, weight, targets) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """And the logarithm of the sum of exponentials of each token's logits."""
    weight = _gathered(weight, mesh)

    def losses(part):
        x, targets = part
        logits, target, trained = _logits(x, targets, weight, words)
        total = jax.nn.logsumexp(logits, axis=-1)
        return _cross_entropy(logits, total, target, trained), total

    found = jax.lax.map(losses, (_parts(hidden, chunk), _parts(targets, chunk)))
    return _whole(found[0]), _whole(found[1])


def _forward(chunk, words, mesh, hidden, weight, targets):
    """Where the head is frozen, hidden's gradient but for the factor that comes from above is made of the logits while
    they are there: two products with the head, not three."""
    frozen = not weight.perturbed
    hidden, weight, targets = hidden.value, weight.value, targets.value
    if not frozen:
        losses, total = _cross_entropies(chunk, words, mesh, hidden, weight, targets)
        return losses, (hidden, weight, targets, total)

    weight = _gathered(weight, mesh)

    def both(part):
        x, targets = part
        logits, target, trained = _logits(x, targets, weight, words)
        total = jax.nn.logsumexp(logits, axis=-1)
        share = _share(logits, total, target, trained).astype(x.dtype)
        below = jnp.einsum("bcv,vd->bcd", share, weight, precision=precision(x))
        return _cross_entropy(logits, total, target, trained), below

    losses, below = jax.lax.map(both, (_parts(hidden, chunk), _parts(targets, chunk)))
    return _whole(losses), _whole(below)


def _backward(chunk, words, mesh, saved, gradient):
    if not isinstance(saved, tuple):  # of a frozen head
        return (saved * gradient[..., None]).astype(saved.dtype), None, None
    hidden, weight, targets, total = saved
    gathered = _gathered(weight, mesh)
    groups = rows_split(mesh) if len(hidden) % rows_split(mesh) == 0 else 1

    def step(added, part):
        x, targets, total, above = part
        logits, target, trained = _logits(x, targets, gathered, words)
        share = (_share(logits, total, target, trained) * above[..., None]).astype(x.dtype)
        wide = {"precision": precision(x), "preferred_element_type": jnp.float32}
        rows = (y.reshape(groups, -1, *y.shape[1:]) for y in (share, x))
        added = _by_device(added + jnp.einsum("gbcv,gbcd->gdv", *rows, **wide), mesh)
        return added, jnp.einsum("bcv,vd->bcd", share, gathered, precision=precision(x))

    parts = tuple(_parts(x, chunk) for x in (hidden, targets, total, gradient))
    nothing = _by_device(jnp.zeros((groups, *weight.shape[::-1]), jnp.float32), mesh)
    added, below = jax.lax.scan(step, nothing, parts)
    return _whole(below), _added(added, mesh).T.astype(weight.dtype), None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _cross_entropy(logits: Float[Array, "B C V"], total: Float[Array, "B C"], target, trained) -> Float[Array, "B C"]:
    right = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.where(trained, total - right, 0)


def _share(logits: Float[Array, "B C V"], total: Float[Array, "B C"], target, trained) -> Float[Array, "B C V"]:
    """The gradient of `_cross_entropy` with respect to the logits."""
    right = target[..., None] == jnp.arange(logits.shape[-1])
    return jnp.where(trained[..., None], jnp.exp(logits - total[..., None]) - right, 0)


def _gathered(weight: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "V D"]:
    """Whole on every device that runs other rows, once for all chunks."""
    return _head(weight, mesh, "vocab", "layers")


def _by_device(sums: Float[Array, "G D V"], mesh: Mesh | None) -> Float[Array, "G D V"]:
    """The sum of each device's rows, on that device: added up over the devices once, not for each chunk."""
    if mesh is None:
        return sums
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, _sums_spec(sums, mesh)))


def _sums_spec(sums: Float[Array, "G D V"], mesh: Mesh) -> P:
    return P(row_axes(mesh, len(sums)), *partition_spec(("layers", "vocab"), sums.shape[1:], mesh))


def _added(sums: Float[Array, "G D V"], mesh: Mesh | None) -> Float[Array, "D V"]:
    """Over the devices, each of which gets what it keeps of the head. In the step of MiniCPM-2B XLA makes of it an
    all-reduce in bfloat16 that is then cut; held to a reduce-scatter in float32 by a layout the step takes 8.45 GB a
    chip, not 7.73."""
    if mesh is None:
        return sums[0]
    rows, spec = row_axes(mesh, len(sums)), partition_spec(("embed", "vocab"), sums.shape[1:], mesh)

    def add(own):
        others = [name for name in rows if name != spec[0]]
        own = jax.lax.psum(own[0], others) if others else own[0]
        return jax.lax.psum_scatter(own, spec[0], tiled=True) if spec[0] in rows else own

    out = spec if spec[0] in rows else P(None, spec[1])
    return jax.shard_map(add, mesh=mesh, in_specs=_sums_spec(sums, mesh), out_specs=out, check_vma=False)(sums)


def _head(weight: Float[Array, "V D"], mesh: Mesh | None, *axes: str) -> Float[Array, "V D"]:
    if mesh is None:
        return weight
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, partition_spec(axes, weight.shape, mesh)))


def _logits(x, targets, weight, words):
    """Logits in float32, -inf for rows of the head that are no ``words`` (see `padded`); targets with 0 for those that
    are ignored; which are not."""
    logits = product(weight, x).astype(jnp.float32)
    if len(weight) > words:
        logits = jnp.where(jnp.arange(len(weight)) < words, logits, -jnp.inf)
    return logits, jnp.maximum(targets, 0), targets != IGNORED


def _parts(x: Float[Array, "B T ..."], chunk: int) -> Float[Array, "N B C ..."]:
    """Along T, so that a batch that is spread over devices stays so."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _whole(parts: Float[Array, "N B C ..."]) -> Float[Array, "B T ..."]:
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])


@dataclass(frozen=True)
class Objective:
    """``name``: sft (cross entropy), dpo (arXiv 2305.18290) or orpo (2403.07691), whose strength is ``beta``.
    ``balance``: weight of the experts' `moe.imbalance`. ``remat``: recompute layers in the backward pass."""

    name: Literal["sft", "dpo", "orpo"] = "sft"
    beta: float = 0.1
    balance: float = 0.01
    remat: bool = False

    def __call__(self, model: Model, batch: Batch) -> Sums:
        """The sum to be minimised over a batch, and sums to be reported: ``weight`` is what they are divided by, the
        number of trained tokens (sft) or of pairs."""
        positions = positions_of(model.config, batch["ids"].shape, segments=batch["segments"])
        x, _, imbalance = model.model(model.model.embed(batch["ids"]), positions, remat=self.remat)
        losses = token_losses(model, model.model.norm(x), batch["labels"])
        trained = batch["labels"][:, 1:] != IGNORED
        sums = OBJECTIVES[self.name](losses, trained, batch, self.beta)
        total = sums["loss"]
        if model.config.num_experts:
            sums["imbalance"] = imbalance * sums["weight"]
            total = total + self.balance * sums["imbalance"]
        return total, sums


def _supervised(losses, trained, batch, beta) -> dict[str, Array]:
    return {"loss": jnp.sum(losses), "weight": jnp.sum(trained)}


def _dpo(losses, trained, batch, beta) -> dict[str, Array]:
    """-log sigmoid(beta (how much likelier than under the reference the chosen answer is, less that of the rejected)).
    The first half of the rows are chosen, the second rejected ones; log-probabilities are sums over the answer."""
    chosen, rejected = jnp.split(-jnp.sum(losses, axis=1) - batch["reference"], 2)
    real = jnp.any(jnp.split(trained, 2)[0], axis=1)  # not a row that fills up the batch
    margin = beta * (chosen - rejected)
    return {
        "loss": -jnp.sum(jax.nn.log_sigmoid(margin) * real),
        "margin": jnp.sum(margin * real),
        "accuracy": jnp.sum((margin > 0) & real),
        "weight": jnp.sum(real),
    }


def _orpo(losses, trained, batch, beta) -> dict[str, Array]:
    """Mean cross entropy of the chosen answer - beta log sigmoid(log odds ratio), with mean log-probabilities."""
    mean = -jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(trained, axis=1), 1)
    real = jnp.any(jnp.split(trained, 2)[0], axis=1)
    # A row of nothing has the log-probability 0, whose odds are infinite.
    mean = jnp.where(jnp.any(trained, axis=1), mean, -1.0)
    odds = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-6)))
    (chosen, _), (better, worse) = jnp.split(mean, 2), jnp.split(odds, 2)
    ratio = better - worse
    return {
        "loss": jnp.sum((-chosen - beta * jax.nn.log_sigmoid(ratio)) * real),
        "margin": jnp.sum(ratio * real),
        "accuracy": jnp.sum((ratio > 0) & real),
        "weight": jnp.sum(real),
    }


OBJECTIVES: dict[str, Callable[..., dict[str, Array]]] = {"sft": _supervised, "dpo": _dpo, "orpo": _orpo}


def packed_loss(model: Model, windows: Int[Array, "B T"], bos_token_id: int, remat: bool = False) -> Float[Array, ""]:
    """Mean cross entropy over windows of documents that each begin with BOS: a document neither sees nor predicts
    another one. A mixture of experts has a hundredth of its imbalance added."""
    begins = windows == bos_token_id
    segments = 1 + jnp.cumsum(begins, axis=1)  # 1 is what a window begins in the middle of
    batch = {"ids": windows, "labels": jnp.where(begins, IGNORED, windows), "segments": segments}
    total, sums = Objective(remat=remat)(model, batch)
    return total / jnp.maximum(sums["weight"], 1)


def mean_loss(model: Model, ids: Int[Array, "B T"], labels: Int[Array, "B T"], mask: Int[Array, "B T"] | None = None):
    """The loss that the original returns for ``labels``: a mean over all labels but -100."""
    return _mean_loss(model, ids, labels, mask)


@jax.jit
def _mean_loss(model: Model, ids, labels, mask):
    hidden = model.hidden_states(ids, positions_of(model.config, ids.shape, mask=mask))
    return jnp.sum(token_losses(model, hidden, labels)) / jnp.sum(labels[:, 1:] != IGNORED)
