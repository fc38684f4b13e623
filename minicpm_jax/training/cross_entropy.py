"""Cross entropy of each token, computed in chunks so that no array of all logits exists."""

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
from minicpm_jax.parallel.mesh import over_its_mesh, row_axes, rows_split
from minicpm_jax.parallel.sharding import partition_spec

LOGITS = 2**26  # most logits at once: 0.27 GB in float32


@over_its_mesh
def token_losses(model: Model, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross entropy of each label in float32, at its own position; 0 where there is none."""
    hidden = divide(hidden, model.config.logit_divisor)
    weight = model.model.embed_tokens.weight[...] if model.lm_head is None else model.lm_head.weight[...]
    mesh, words, (rows, width) = model.mesh, model.config.vocab_size, labels.shape
    own = -(-rows // rows_split(mesh))  # rows of a device
    most = max(1, LOGITS // (own * words))
    chunk = -(-width // 2 ** math.ceil(math.log2(max(width / most, 1))))  # widths are mostly powers of two
    more, filling = own * rows_split(mesh) - rows, -width % chunk
    hidden = jnp.pad(hidden, [(0, more), (0, filling), (0, 0)])
    targets = jnp.pad(labels[:, 1:], [(0, more), (0, 1 + filling)], constant_values=IGNORED)
    losses = _chunked(chunk, words, mesh, shard_batch(hidden), weight, shard_batch(targets))
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
    logits = linear(weight, x).astype(jnp.float32)
    if isinstance(words, int) and words == len(weight):
        return logits
    return jnp.where(jnp.arange(len(weight)) < words, logits, -jnp.inf)


def _parts(x: Float[Array, "B T ..."], chunk: int) -> Float[Array, "N B C ..."]:
    """Along T, so that a batch that is spread over devices stays so."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _whole(parts: Float[Array, "N B C ..."]) -> Float[Array, "B T ..."]:
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])
