"""Readers of models: config.json, weights of every form, adapters. Most are loaded with MLX, a share with JAX."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzzing import archives, binary, raw, text_readers, trees
from fuzzing.mutant import SAME, Disagreement, Expect, Mutator, Reader, always, copy
from weights_io.errors import InputError

REFERENCE = Path(__file__).parent.parent / "reference"
IDS = np.array([[1, 5, 9, 200, 7, 31, 2, 77]])
CONFIG_JUDGE = trees.json_judge(positive=True)
EVIL = f"import os\nos.system({archives.SHELL!r})\nclass Evil: pass\n"
TINY = {"intermediate_size": 64}  # rows of 32 and 64, which have blocks to be quantised in


def tiny(folder: Path) -> None:
    import tiny_model

    shutil.move(tiny_model.write(folder.with_name(f"{folder.name}-making"), **TINY), folder / "model")
    (folder / "model" / "generation_config.json").write_text(
        '{"do_sample": true, "eos_token_id": [2, 3], "top_p": 0.8}'
    )


def reference(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        copy(REFERENCE / name, folder / "model")
        (folder / "model" / "reference.npz").unlink()

    return make


def loaded(path: Path, backend: str = "mlx", **options: Any) -> dict[str, Any]:
    """What the model and its tokenizer say."""
    from importlib import import_module

    from weights_io.checkpoint import open_checkpoint

    model, tokenizer = import_module(f"minicpm_{backend}").load(path, "float32", **options)
    said = {"logits": np.asarray(model(IDS)), "eos": open_checkpoint(path).eos_token_ids}
    return said | ({} if tokenizer is None else text_readers.said(tokenizer))


def model(folder: Path) -> dict[str, Any]:
    return loaded(folder / "model")


def with_jax(folder: Path) -> dict[str, Any]:
    return loaded(folder / "model", "jax")


def adapted(folder: Path) -> dict[str, Any]:
    return loaded(folder / "model", adapter=folder / "adapter")


def inspected(folder: Path) -> dict[str, Any]:
    """The load's answer, where `weights_io.inspect` agrees that there is one."""
    from weights_io import inspect

    problem = None
    try:
        inspect.main(inspect.Options(model=str(folder / "model")))
    except InputError as error:
        problem = error
    try:
        found = model(folder)
    except InputError as error:
        if problem is None:
            raise Disagreement(f"inspect has nothing against it, and the load says: {error}") from error
        raise
    if problem is not None:
        raise Disagreement(f"the load has nothing against it, and inspect says: {problem}")
    return found


def prompt_cache(folder: Path) -> None:
    from minicpm_data.generation.prompt_cache import CachedPrompt, write_prompt_cache

    numbers = np.random.default_rng(0).normal(size=(2, 2, 1, 2, 5, 32)).astype(np.float32)
    found = CachedPrompt(5, 2, lambda layer: (numbers[0, layer], numbers[1, layer]))
    write_prompt_cache(folder / "cache.safetensors", found, "pico", {"config": "1"}, "a text", range(5))


def cached(folder: Path) -> dict[str, Any]:
    from minicpm_data.generation.prompt_cache import open_prompt_cache

    found = open_prompt_cache(folder / "cache.safetensors")
    return {f"layer {i}": np.stack(found.layer(i, 4)) for i in range(found.layers)}  # type: ignore[arg-type]


def code_beside(random: Random, folder: Path) -> tuple[str, Expect]:
    """Python files that the config names, as transformers' remote code."""
    path = folder / "model" / "config.json"
    raw_config = json.loads(path.read_bytes())
    names = ["modeling_evil", "configuration_minicpm", "tokenization_evil", "__init__", "sitecustomize"]
    name = random.choice(names)
    raw_config["auto_map"] = {"AutoConfig": f"{name}.Evil", "AutoModelForCausalLM": f"{name}.Evil"}
    path.write_text(json.dumps(raw_config))
    (path.parent / f"{name}.py").write_text(EVIL)
    return f"{name}.py beside it", SAME


def left_out(names: Sequence[str]) -> Mutator:
    """One of the files is not there, or has the other's name."""

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        name = random.choice(names)
        (folder / name).unlink()
        return f"{name}: not there", SAME

    return mutate


def exchanged(names: Sequence[str]) -> Mutator:
    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        first, second = random.sample(list(names), 2)
        (folder / first).rename(folder / "between")
        (folder / second).rename(folder / first)
        (folder / "between").rename(folder / second)
        return f"{first} and {second}: exchanged", SAME

    return mutate


def json_file(name: str, judge: Any) -> list[tuple[int, Mutator]]:
    return [(8, trees.json_of(name, judge)), (3, raw.bytes_of([name], judge)), (1, raw.spliced([name], judge))]


def config() -> list[tuple[int, Mutator]]:
    name = "model/config.json"
    return [*json_file(name, CONFIG_JUDGE), (1, raw.special([name])), (1, code_beside)]


def generation() -> list[tuple[int, Mutator]]:
    name = "model/generation_config.json"
    return [*json_file(name, trees.json_judge(passed_over=True)), (2, raw.special([name]))]


def safetensors(name: str) -> list[tuple[int, Mutator]]:
    judge = binary.safetensors_judge
    found: list[tuple[int, Mutator]] = [(6, binary.safetensors_of(name)), (3, raw.bytes_of([name], judge))]
    return [*found, (1, raw.spliced([name], judge)), (1, raw.special([name]))]


def shards(index: str, files: Sequence[str], of_one: Sequence[tuple[int, Mutator]]) -> list[tuple[int, Mutator]]:
    found: list[tuple[int, Mutator]] = [*json_file(index, always(SAME)), *of_one]
    return [*found, (1, left_out(files)), (1, exchanged(files)), (1, raw.special([index, *files]))]


def torch_file(name: str) -> list[tuple[int, Mutator]]:
    found: list[tuple[int, Mutator]] = [(8, archives.pickle_of(name)), (4, archives.zip_of(name))]
    return [
        *found,
        (2, raw.bytes_of([name], always(SAME))),
        (1, raw.spliced([name], always(SAME))),
        (1, raw.special([name])),
    ]


def adapter(form: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import tiny_adapter

        from weights_io.adapters import save_adapter
        from weights_io.checkpoint import open_checkpoint

        tiny(folder)
        checkpoint = open_checkpoint(folder / "model")
        save_adapter(folder / "adapter", tiny_adapter.make(checkpoint), checkpoint.config, form=form)  # type: ignore

    return make


def adapters(weights: str) -> list[tuple[int, Mutator]]:
    return [*json_file("adapter/adapter_config.json", CONFIG_JUDGE), *safetensors(f"adapter/{weights}")]


def gguf_file(kind: str, tokenizer: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    """The tiny model as llama.cpp's converter would write it."""

    def make(folder: Path) -> None:
        import gguf

        from weights_io.checkpoint import open_checkpoint

        tiny(folder)
        checkpoint = open_checkpoint(folder / "model")
        config, stored = checkpoint.config, gguf.GGMLQuantizationType[kind]
        writer = gguf.GGUFWriter(folder / "model.gguf", "minicpm")
        for key, value in {**gguf_numbers(config), **tokenizer()}.items():
            key = key if "." in key and not key.startswith(("attention.", "rope.")) else f"minicpm.{key}"
            add = {str: writer.add_string, list: writer.add_array, float: writer.add_float32, bool: writer.add_bool}
            add.get(type(value), writer.add_uint32)(key, value)
        for name, tensor in checkpoint.tensors.items():
            array = tensor.read().astype(np.float32)
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:
                    array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            if array.ndim == 1:
                writer.add_tensor(gguf_name(name), array)
            else:
                writer.add_tensor(gguf_name(name), gguf.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shutil.rmtree(folder / "model")

    return make


def gguf_numbers(config: Any) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "embedding_scale": float(config.scale_emb),
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_divisor,
    }


def gguf_name(name: str) -> str:
    from weights_io.files.gguf import LAYER_MODULES, MODULES

    for ours, theirs in {**{v: k for k, v in MODULES.items()}, **{v: k for k, v in LAYER_MODULES.items()}}.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")


def gguf_model(folder: Path) -> dict[str, Any]:
    return loaded(folder / "model.gguf")


def gguf() -> list[tuple[int, Mutator]]:
    name = "model.gguf"
    found: list[tuple[int, Mutator]] = [(8, binary.gguf_of(name)), (3, raw.bytes_of([name], binary.gguf_judge))]
    return [*found, (1, raw.spliced([name], always(SAME))), (1, raw.special([name]))]


SHARDS = [f"model/model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
TORCH_SHARDS = [f"model/pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
WEIGHTS = "model/model.safetensors"
READERS = [
    Reader("config", 14, tiny, model, config()),
    Reader("generation", 5, tiny, model, generation()),
    Reader("safetensors", 14, tiny, model, safetensors(WEIGHTS)),
    Reader(
        "sharded",
        8,
        reference("sharded"),
        model,
        shards("model/model.safetensors.index.json", SHARDS, safetensors(SHARDS[1])),
    ),
    Reader("gptq", 4, reference("quant/gptq_int4_g32_asym_desc_act"), model, safetensors(WEIGHTS)),
    Reader("mlx-affine", 3, reference("quant/mlx_affine_4bit"), model, safetensors(WEIGHTS)),
    Reader("torch", 16, reference("bin"), model, torch_file("model/pytorch_model.bin")),
    Reader(
        "torch-sharded",
        5,
        reference("bin_sharded"),
        model,
        shards("model/pytorch_model.bin.index.json", TORCH_SHARDS, torch_file(TORCH_SHARDS[0])),
    ),
    Reader("gguf-f16", 10, gguf_file("F16", text_readers.gguf_llama), gguf_model, gguf()),
    Reader("gguf-q8", 5, gguf_file("Q8_0", text_readers.gguf_llama), gguf_model, gguf()),
    Reader("gguf-q4", 5, gguf_file("Q4_0", text_readers.gguf_gpt2), gguf_model, gguf()),
    Reader("peft", 8, adapter("peft"), adapted, adapters("adapter_model.safetensors")),
    Reader("mlx-lm", 8, adapter("mlx_lm"), adapted, adapters("adapters.safetensors")),
    Reader("prompt-cache", 5, prompt_cache, cached, safetensors("cache.safetensors")),
    Reader(
        "inspect",
        8,
        tiny,
        inspected,
        [*config(), *generation(), (4, binary.safetensors_of(WEIGHTS)), *text_readers.tokenizer_files("model/")],
    ),
    Reader(
        "jax",
        4,
        tiny,
        with_jax,
        [*config(), *generation(), *safetensors(WEIGHTS)],
        seconds=60,  # a program is compiled for each new shape
        needs=("jax",),
    ),
]
