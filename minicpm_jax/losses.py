"""What training minimises.

Dims: B rows, T tokens, C of them at a time, V vocabulary, P words of it at a time, D hidden.

Labels are the tokens themselves where they are targets, -100 elsewhere; position t - 1 predicts the token at t. The
logits of a whole batch are never there at once: with 122,753 words, 8 rows of 2048 tokens would take 8 GB.
"""

import functools
import math
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
    mesh, words, (rows, width) = model.model.mesh, model.config.vocab_size, labels.shape
    own = -(-rows // rows_split(mesh))  # rows of a device
    most = max(1, LOGITS // (own * words))
    chunk = -(-width // 2 ** math.ceil(math.log2(max(width / most, 1))))  # widths are mostly powers of two
    more, filling = own * rows_split(mesh) - rows, -width % chunk
    hidden = jnp.pad(hidden, [(0, more), (0, filling), (0, 0)])
    targets = jnp.pad(labels[:, 1:], [(0, more), (0, 1 + filling)], constant_values=IGNORED)
    losses = _chunked(chunk, words, mesh, by_rows(hidden, mesh), weight, by_rows(targets, mesh))
    return jnp.pad(losses[:rows, : width - 1], [(0, 0), (1, 0)])


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
        logits = _logits(weight, x, words)
        total = jax.nn.logsumexp(logits, axis=-1)
        return _cross_entropy(logits, total, targets), total

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
        logits = _logits(weight, x, words)
        total = jax.nn.logsumexp(logits, axis=-1)
        share = _share(logits, total, targets).astype(x.dtype)
        below = jnp.einsum("bcv,vd->bcd", share, weight, precision=precision(x))
        return _cross_entropy(logits, total, targets), below

    losses, below = jax.lax.map(both, (_parts(hidden, chunk), _parts(targets, chunk)))
    return _whole(losses), _whole(below)


def _backward(chunk, words, mesh, saved, above):
    if not isinstance(saved, tuple):  # of a frozen head
        return (saved * above[..., None]).astype(saved.dtype), None, None
    hidden, weight, targets, total = saved
    if mesh is None:
        return *_gradients(words, hidden, weight, targets, total, above), None
    names, split = row_axes(mesh, len(hidden)), partition_spec(("vocab", "embed"), weight.shape, mesh)
    rows = P(names)
    below, own = jax.shard_map(
        functools.partial(_gradients, words, rows=names, vocab=split[0], embed=split[1]),
        mesh=mesh,
        in_specs=(rows, split, rows, rows, rows),
        out_specs=(rows, split),
        check_vma=False,
    )(hidden, weight, targets, total, above)
    return below, own, None


def _gradients(
    words: int,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    total: Float[Array, "B T"],
    above: Float[Array, "B T"],
    rows: tuple[str, ...] = (),
    vocab: str | None = None,
    embed: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Of hidden and weight, P words at a time, which can be as the sums of exponentials are known: what a part adds to
    the weight's gradient is whole after one product, and goes over the devices at once. C tokens at a time a chip held
    all of MiniCPM-2B's head, and its gradient in float32: 1.7 GB.

    ``rows``, ``vocab``, ``embed``: the axes of the mesh along which devices have other rows, words and columns. Of a
    part, XLA keeps the columns apart in memory ([D, P]) and scatters them; of the gradient of a whole head it put them
    last, where 288 of 2304 are no whole registers of 128, added it up in bfloat16 on every chip, and cut."""
    here = len(weight)
    count = -(-here // max(1, LOGITS // targets.size))
    height = -(-here // count)
    parts = jnp.pad(weight, [(0, count * height - here), (0, 0)]).reshape(count, height, -1)
    first = jax.lax.axis_index(vocab) * here if vocab else 0
    real = jnp.minimum(here, words - first)
    others = tuple(name for name in rows if name != embed)
    wide = {"precision": precision(hidden), "preferred_element_type": jnp.float32}

    def step(below, part):
        number, own = part
        head = jax.lax.all_gather(own, embed, axis=1, tiled=True) if embed else own
        logits = _logits(head, hidden, real - number * height)
        share = _share(logits, total, targets, first + number * height)
        share = (share * above[..., None]).astype(hidden.dtype)
        below = below + jnp.einsum("btp,pd->btd", share, head, **wide)
        added = jax.lax.psum(jnp.einsum("btp,btd->dp", share, hidden, **wide), others)
        added = jax.lax.psum_scatter(added, embed, tiled=True) if embed else added
        return below, added.astype(weight.dtype)

    below, added = jax.lax.scan(step, jnp.zeros(hidden.shape, jnp.float32), (jnp.arange(count), parts))
    below = jax.lax.psum(below, vocab) if vocab else below
    return below.astype(hidden.dtype), jnp.swapaxes(added, 1, 2).reshape(count * height, -1)[:here]


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _cross_entropy(logits: Float[Array, "B C V"], total: Float[Array, "B C"], targets: Int[Array, "B C"]):
    right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets != IGNORED, total - right, 0)


def _share(logits: Float[Array, "B C V"], total: Float[Array, "B C"], targets: Int[Array, "B C"], first=0):
    """The gradient of `_cross_entropy` with respect to the logits of the words from ``first`` on."""
    right = targets[..., None] == first + jnp.arange(logits.shape[-1])
    share = jnp.exp(logits - total[..., None]) - right
    return jnp.where((targets != IGNORED)[..., None], share, 0)


def _gathered(weight: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "V D"]:
    """Whole on every device that runs other rows, once for all chunks."""
    if mesh is None:
        return weight
    where = partition_spec(("vocab", "layers"), weight.shape, mesh)
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, where))


def _logits(
    weight: Float[Array, "V D"], x: Float[Array, "B C D"], words: int | Int[Array, ""]
) -> Float[Array, "B C V"]:
    """In float32; -inf for rows of the head that are no ``words`` but fill it up."""
    logits = product(weight, x).astype(jnp.float32)
    if isinstance(words, int) and words == len(weight):
        return logits
    return jnp.where(jnp.arange(len(weight)) < words, logits, -jnp.inf)


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
