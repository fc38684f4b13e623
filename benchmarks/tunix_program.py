"""Compile programs of google-tunix for absent TPUs. `tunix_peer` runs this file with the Python that has google-tunix.

The model is its Llama3 (PyPI google-tunix 0.1.7), with its own sampler and loss. Nothing of our package is imported.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def measured(function: Any, arguments: tuple[Any, ...], out: Path, fixed: Mapping[str, Any]) -> None:
    """Trace, lower and compile. Write the figures to ``out``.json and the program's text to ``out``.txt."""
    began = time.perf_counter()
    lowered = function.lower(*arguments, **fixed)
    traced = time.perf_counter()
    figures: dict[str, Any] = {"tracing": traced - began}
    try:
        program = lowered.compile()
    except Exception as error:  # jax.errors.JaxRuntimeError, which has no subclasses by cause
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures["exhausted"] = str(error).partition("\n")[0]
    else:
        memory = program.memory_analysis()
        figures |= {
            "compiling": time.perf_counter() - traced,
            "code": memory.generated_code_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        out.with_suffix(".txt").write_text(program.as_text(), "utf-8")
    out.with_suffix(".json").write_text(json.dumps(figures), "utf-8")


def main(case: dict[str, Any], out: Path) -> None:
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    devices = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"]).devices
    sizes = {"fsdp": case["fsdp"], "tp": case["tensor"]}
    mesh = Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))
    training, shape = case["job"] == "train", case["shape"]

    def constrained(x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    llama3.shard = constrained  # their function does this on a TPU, but nothing if JAX runs on a CPU, as here
    config = llama3.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=shape["rms_norm_eps"],
        weight_tying=True,
        remat_config=llama3.RematConfig.DECODER if training else llama3.RematConfig.NONE,
        shd_config=llama3.ShardingConfig.get_default_sharding(is_sampling=not training),
    )
    model = nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    specs = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=lambda x: isinstance(x, P))
    leaves, tree = jax.tree.flatten(state)
    assert len(leaves) == len(specs)
    placed = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]
    weights = jax.tree.unflatten(tree, placed)

    def rows(shape: tuple[int, ...], dtype: Any, *more: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("fsdp", *more)))

    batch, seq = case["batch"], case["seq"]
    if training:
        from tunix.sft.peft_trainer import _default_loss_fn

        def step(weights: Any, batch: dict[str, Any]) -> Any:
            return jax.value_and_grad(lambda w: _default_loss_fn(nnx.merge(graph, w), **batch))(weights)

        inputs = {
            "input_tokens": rows((batch, seq), jnp.int32),
            "input_mask": rows((batch, seq), jnp.bool_),
            "positions": rows((batch, seq), jnp.int32),
            "attention_mask": rows((batch, seq, seq), jnp.bool_),
        }
        where = jax.tree.map(lambda x: x.sharding, weights)
        measured(jax.jit(step, out_shardings=(None, where)), (weights, inputs), out, {})
        return
    function, arguments = decoding(model, graph, weights, rows, batch, seq, mesh)
    measured(function, arguments, out, {})


def decoding(model: Any, graph: Any, weights: Any, rows: Any, batch: int, seq: int, mesh: Mesh) -> Any:
    """The greedy loop of its `Sampler` and its arguments, with a cache length and a token buffer of ``seq``."""
    from tunix.generate.sampler import CacheConfig, Sampler, _init_cache, _SamplingState

    class Tokenizer:
        def pad_id(self) -> int:
            return 0

    config, everywhere = model.config, NamedSharding(mesh, P())
    sampler = object.__new__(Sampler)  # its __init__ would need real arrays and a tokenizer
    sampler.tokenizer, sampler._transformer_graphdef = Tokenizer(), graph
    sampler.cache_config = CacheConfig(seq, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler.eos_ids = jnp.array([2])

    def one(dtype: Any = jnp.int32, shape: tuple[int, ...] = ()) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    shape = config.num_layers, seq, batch, config.num_kv_heads, config.head_dim, jnp.bfloat16
    cache = jax.tree.map(
        lambda x: rows(x.shape, x.dtype, *((None, "tp", None) if x.ndim == 4 else ())),
        jax.eval_shape(lambda: _init_cache(*shape)),
    )
    state = _SamplingState(
        decoding_step=one(),
        num_input_tokens=1,
        token_buffer=rows((batch, seq), jnp.int32),
        positions=rows((batch, seq), jnp.int32),
        logits_buffer=None,
        logprobs_buffer=None,
        cache=cache,
        done=rows((batch,), jnp.bool_),
        total_sampling_steps=one(),
        forbidden_token_ids=None,
        temperature=0.0,
        sampling_parameters={},
        seed=jax.eval_shape(lambda: jax.random.key(0)),
        sampling_mode="greedy",
    )
    return jax.jit(sampler._decode_fn, donate_argnums=1), (weights, state)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
