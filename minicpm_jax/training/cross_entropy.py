"""Cross entropy of each token, computed in chunks so that the logits of a whole batch never exist at once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from minicpm_data.datasets.examples import IGNORED
from minicpm_jax.layers.kernels.precision import precision
from minicpm_jax.layers.ops import divide, linear
from minicpm_jax.model import Model
from minicpm_jax.parallel.activations import shard_batch
from minicpm_jax.parallel.mesh import batch_shards, row_axes, with_model_mesh
from minicpm_jax.parallel.sharding import partition_spec

LOGITS = 2**26  # most logits of a chunk: 0.27 GB in float32


@with_model_mesh
def token_losses(model: Model, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross entropy of each label in float32, at the label's own position; 0 where there is no label."""
    hidden = divide(hidden, model.config.logit_divisor)
    weight = model.model.embed_tokens.weight[...] if model.lm_head is None else model.lm_head.weight[...]
    mesh, vocab_size, (rows, width) = model.mesh, model.config.vocab_size, labels.shape
    own = -(-rows // batch_shards(mesh))  # rows per device
    most = max(1, LOGITS // (own * vocab_size))
    chunk = -(-width // 2 ** math.ceil(math.log2(max(width / most, 1))))  # widths are mostly powers of two
    more, filling = own * batch_shards(mesh) - rows, -width % chunk
    hidden = jnp.pad(hidden, [(0, more), (0, filling), (0, 0)])
    targets = jnp.pad(labels[:, 1:], [(0, more), (0, 1 + filling)], constant_values=IGNORED)
    losses = _chunked(chunk, vocab_size, mesh, shard_batch(hidden), weight, shard_batch(targets))
    return jnp.pad(losses[:rows, : width - 1], [(0, 0), (1, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    chunk: int,
    vocab_size: int,
    mesh: Mesh | None,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Cross entropies, C tokens of each row at a time. The gradient is custom: JAX would store all logits, or
    accumulate the weight's gradient in the weight's dtype. ``vocab_size``: V without a mesh's padding."""
    return _cross_entropies(chunk, vocab_size, mesh, hidden, weight, targets)[0]


def _cross_entropies(
    chunk, vocab_size, mesh, hidden, weight, targets
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The losses, and the logsumexp of each token's logits."""
    weight = _gathered(weight, mesh)

    def losses(part):
        x, targets = part
        logits = _logits(weight, x, vocab_size)
        total = jax.nn.logsumexp(logits, axis=-1)
        return _cross_entropy(logits, total, targets), total

    found = jax.lax.map(losses, (_parts(hidden, chunk), _parts(targets, chunk)))
    return _whole(found[0]), _whole(found[1])


def _forward(chunk, vocab_size, mesh, hidden, weight, targets):
    """With a frozen head, hidden's gradient (up to the incoming factor) is computed while the logits exist: two
    products with the head instead of three."""
    frozen = not weight.perturbed
    hidden, weight, targets = hidden.value, weight.value, targets.value
    if not frozen:
        losses, total = _cross_entropies(chunk, vocab_size, mesh, hidden, weight, targets)
        return losses, (hidden, weight, targets, total)

    weight = _gathered(weight, mesh)

    def both(part):
        x, targets = part
        logits = _logits(weight, x, vocab_size)
        total = jax.nn.logsumexp(logits, axis=-1)
        share = _share(logits, total, targets).astype(x.dtype)
        below = jnp.einsum("bcv,vd->bcd", share, weight, precision=precision(x))
        return _cross_entropy(logits, total, targets), below

    losses, below = jax.lax.map(both, (_parts(hidden, chunk), _parts(targets, chunk)))
    return _whole(losses), _whole(below)


def _backward(chunk, vocab_size, mesh, saved, above):
    if not isinstance(saved, tuple):  # the head is frozen
        return (saved * above[..., None]).astype(saved.dtype), None, None
    hidden, weight, targets, total = saved
    if mesh is None:
        return *_gradients(vocab_size, hidden, weight, targets, total, above), None
    names, split = row_axes(mesh, len(hidden)), partition_spec(("vocab", "embed"), weight.shape, mesh)
    rows = P(names)
    below, own = jax.shard_map(
        functools.partial(_gradients, vocab_size, rows=names, vocab=split[0], embed=split[1]),
        mesh=mesh,
        in_specs=(rows, split, rows, rows, rows),
        out_specs=(rows, split),
        check_vma=False,
    )(hidden, weight, targets, total, above)
    return below, own, None


def _gradients(
    vocab_size: int,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    total: Float[Array, "B T"],
    above: Float[Array, "B T"],
    rows: tuple[str, ...] = (),
    vocab: str | None = None,
    embed: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Gradients of hidden and weight, one vocabulary chunk of P at a time; the logsumexps are known already. A
    chunk's gradient of the weight is complete after one product and is communicated at once. In chunks of C tokens a
    chip held the whole head of MiniCPM-2B and its gradient in float32: 1.7 GB.

    ``rows``, ``vocab``, ``embed``: the mesh axes that shard rows, vocabulary and columns. For one vocabulary chunk
    XLA uses layout [D, P] and emits a reduce-scatter. For the whole head's gradient it chose [P, D], whose 288-wide
    shards are not lane-aligned, and fell back to a bfloat16 all-reduce and a slice.
    """
    here = len(weight)
    count = -(-here // max(1, LOGITS // targets.size))
    height = -(-here // count)
    parts = jnp.pad(weight, [(0, count * height - here), (0, 0)]).reshape(count, height, -1)
    first = jax.lax.axis_index(vocab) * here if vocab else 0
    real = jnp.minimum(here, vocab_size - first)
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


def _cross_entropy(logits: Float[Array, "B C V"], total: Float[Array, "B C"], targets: Int[Array, "B C"]):
    right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets != IGNORED, total - right, 0)


def _share(logits: Float[Array, "B C V"], total: Float[Array, "B C"], targets: Int[Array, "B C"], first=0):
    """The gradient of `_cross_entropy` with respect to the logits of the vocabulary from index ``first`` on."""
    right = targets[..., None] == first + jnp.arange(logits.shape[-1])
    share = jnp.exp(logits - total[..., None]) - right
    return jnp.where((targets != IGNORED)[..., None], share, 0)


def _gathered(weight: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "V D"]:
    """Gather the head once for all chunks, onto every device that runs other rows."""
    if mesh is None:
        return weight
    where = partition_spec(("vocab", "layers"), weight.shape, mesh)
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, where))


def _logits(
    weight: Float[Array, "V D"], x: Float[Array, "B C D"], vocab_size: int | Int[Array, ""]
) -> Float[Array, "B C V"]:
    """Logits in float32; -inf for the padding of the vocabulary (indices from ``vocab_size`` on)."""
    logits = linear(weight, x).astype(jnp.float32)
    if isinstance(vocab_size, int) and vocab_size == len(weight):
        return logits
    return jnp.where(jnp.arange(len(weight)) < vocab_size, logits, -jnp.inf)


def _parts(x: Float[Array, "B T ..."], chunk: int) -> Float[Array, "N B C ..."]:
    """Split along T, so that a batch sharded over devices stays sharded."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _whole(parts: Float[Array, "N B C ..."]) -> Float[Array, "B T ..."]:
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])
