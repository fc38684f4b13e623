"""The engine's programs over a cache of pages, compiled for a TPU: compile time, memory, HBM traffic.

    python -m benchmarks.paging_programs --model minicpm-2b --pool 24000

Lengths are those of `benchmarks.paging`, scaled to fill the pool where the rows would be more. The kernel's traffic
is counted from its index maps; that of everything else from the compiled program.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.paging import ANSWER, PROMPT, lengths
from weights_io import command_line


@dataclass(frozen=True)
class Options:
    model: str = "minicpm-2b"
    """Model of the catalogue, in bfloat16."""
    topology: str = "v5e:1x1"
    """One chip."""
    batches: tuple[int, ...] = (1, 16, 64, 128)
    """Rows of the decoding step."""
    pool: int = 24000
    """Tokens in the pool."""
    context: int = 4096
    """Tokens that a table has room for."""
    page: int = 32
    """Tokens of a page."""
    kv_bits: Literal[8] | None = None
    """8: an int8 cache."""
    layers: int | None = None
    """Layers; by default all of the model's."""
    num_draft_tokens: int = 0
    """Guesses of each row, in place of the decoding step: they are verified."""


def main(options: Options) -> None:
    """Compile the decoding step for several numbers of rows, and a chunk of a prompt."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from minicpm_data.generation.options import Sampling
    from minicpm_jax.aot.hlo_cost import traffic
    from minicpm_jax.aot.libtpu import tell_libtpu
    from minicpm_jax.aot.programs import compiled, config_of
    from minicpm_jax.generation.decoding import State, decode, prefill
    from minicpm_jax.generation.sampling import SamplingParams
    from minicpm_jax.generation.verification import verify_rows
    from minicpm_jax.layers.kernels.paging import Paging
    from minicpm_jax.layers.kernels.tiling import Tiling
    from minicpm_jax.layers.paged_cache import PagedCache
    from minicpm_jax.model import abstract
    from minicpm_jax.parallel.chips import Topology

    tell_libtpu()
    config = config_of(options.model)
    if options.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    where = SingleDeviceSharding(Topology.parse(options.topology).devices()[0])

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: array(x.shape, x.dtype), tree)

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    guesses = options.num_draft_tokens
    pages, width, number = options.pool // options.page + 1, options.context // options.page, array((), jnp.int32)
    model = placed(abstract(config))
    print("| program | compile | temporaries | arguments less weights and pool | HBM beside the kernel | of the need |")
    print("|---|---|---|---|---|---|")
    for batch in (*options.batches, 0):
        rows = array((max(1, batch),), jnp.int32)
        given = config, max(1, batch), pages, options.page, width, jnp.bfloat16, options.kv_bits
        cache = placed(jax.eval_shape(lambda given=given: PagedCache.of_pages(*given)))
        if batch:
            keys = placed(jax.eval_shape(lambda batch=batch: jax.random.split(jax.random.key(0), batch)))
            state = State(cache, rows, None, keys, array((batch,), bool), array((1,), jnp.int32))
            params = placed(SamplingParams.of(Sampling(), config.vocab_size))
            lowered = decode.lower(model, state, number, params)
            if guesses:
                given, forced = array((batch, guesses), jnp.int32), array((guesses + 1, batch), jnp.int32)
                allowed = array((batch, -(-config.vocab_size // 32)), jnp.uint32)
                lowered = verify_rows.lower(model, state, given, given, params, forced, allowed)
        else:
            last, ids = array((1, 1, config.hidden_size), jnp.bfloat16), array((1, 512), jnp.int32)
            lowered = prefill.lower(model, ids, cache, last, number, rows)
        began = time.perf_counter()
        program = compiled(lowered)
        seconds, memory = time.perf_counter() - began, program.memory_analysis()
        pool = size([getattr(cache, name) for name in ("k", "v", "k_scale", "v_scale")])
        weights, name = size(model), f"decode, {batch} rows" if batch else "512 tokens of a prompt"
        name = f"verify {guesses} guesses, {batch} rows" if batch and guesses else name
        of_page = pool // pages
        tiling = Tiling.of(
            max(1, batch),
            guesses + 1 if batch else 512,
            config.num_attention_heads,
            config.head_dim,
            options.context,
            config.num_key_value_heads,
            cache.k.dtype.itemsize,
        )
        paging = Paging.of(tiling, options.page)
        declared = paging.cost(cache, 0, 0, 0).bytes_accessed * config.num_hidden_layers
        beside, share = traffic(program.as_text()).hbm - declared, ""
        if batch:
            held = filled(batch, options)
            fetched = fetches(held, paging.pages)
            share = f"{(beside + fetched * of_page) / (weights + sum(held) * of_page):.3f}"
        print(
            f"| {name} | {seconds:.1f} s | {memory.temp_size_in_bytes / 1e6:.2f} MB | "
            f"{(memory.argument_size_in_bytes - weights - pool) / 1e6:.2f} MB | {beside / 1e6:,.0f} MB (weights "
            f"{weights / 1e6:,.0f}) | {share} |",
            flush=True,
        )


def filled(batch: int, options: Options) -> list[int]:
    """The pages of each row, in the middle of its answer; fewer tokens where all would not fit the pool."""
    random = np.random.default_rng(0)
    tokens = np.array(lengths(batch, PROMPT, random)) + np.array(lengths(batch, ANSWER, random)) // 2
    room = options.pool - batch * options.page
    if tokens.sum() > room:
        tokens = tokens * room // tokens.sum()
    return [-(-int(count) // options.page) for count in np.maximum(tokens, 1)]


def fetches(held: list[int], pages: int) -> int:
    """Pages that the kernel fetches for rows of so many pages: each of the block's places fetches where its page is
    another one than in the step before."""
    before: list[Any] = [None] * pages
    count = 0
    for row, length in enumerate(held):
        for block in range(-(-length // pages)):
            for place in range(pages):
                entry = block * pages + place
                entry = entry if entry < length or entry < pages else entry - pages
                page = (row, entry) if entry < length else "nobody's"
                count += page != before[place]
                before[place] = page
    return count


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.paging_programs")
